"""What a check says: a line that is fine, doubtful or a failure, and then what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from rich.console import Console
from rich.markup import escape


class Status(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


MARKS = {Status.OK: "[green]ok     [/]", Status.WARNING: "[yellow]warning[/]",
         Status.FAILURE: "[red]failure[/]"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a report."""

    name: str
    """What was looked at, in a word or two."""
    status: Status
    detail: str
    """What was seen, in numbers where there are some."""
    remedy: str = ""
    """What to do; empty only where nothing has to be done."""

    def __post_init__(self) -> None:
        assert bool(self.remedy) == (self.status is not Status.OK), f"{self.name}: remedy"


@dataclass(frozen=True, slots=True)
class Check:
    """Something to look at; `look` may take seconds and yields what it finds as it finds it."""

    name: str
    look: Callable[[], Iterable[Finding]]


def ok(name: str, detail: str) -> Finding:
    """A check that passed."""
    return Finding(name, Status.OK, detail)


def warning(name: str, detail: str, remedy: str) -> Finding:
    """A check that found something worth a look; a run can start."""
    return Finding(name, Status.WARNING, detail, remedy)


def failure(name: str, detail: str, remedy: str) -> Finding:
    """A check that found what keeps a run from starting."""
    return Finding(name, Status.FAILURE, detail, remedy)


def examine(checks: Iterable[Check]) -> Iterator[Finding]:
    """The findings of all checks. An exception of a check is a finding too: on a broken
    installation any import may raise anything."""
    for check in checks:
        try:
            yield from check.look()
        except ValueError as fault:
            yield _of_value(check.name, fault)
        except Exception as fault:  # the boundary of a diagnosis: nothing may hide the rest
            text = " ".join(str(fault).split())[:300]
            yield failure(
                check.name,
                f"{type(fault).__name__}: {text}",
                "look at the message; if the lines above are all ok, install anew (make clean "
                "install) and report it",
            )


def _of_value(name: str, fault: ValueError) -> Finding:
    """A configuration error reads `key=value: what is wrong; remedy`."""
    text = " ".join(str(fault).split())
    detail, separator, remedy = text.rpartition("; ")
    if not separator:
        detail, separator, remedy = text.rpartition(": ")
    if not separator:
        detail, remedy = text, "correct the value"
    return failure(name, detail, remedy)


def print_finding(console: Console, finding: Finding, where: str = "") -> None:
    """One finding, its remedy below it."""
    line = f"{where}{finding.name}: {finding.detail}"
    console.print(f"{MARKS[finding.status]}  {escape(line)}", soft_wrap=True)
    if finding.remedy:
        console.print(f"         -> {escape(finding.remedy)}", soft_wrap=True)
