"""What moves while a run works: a spinner or a bar with its seconds on a terminal, lines in a file
or a pipe.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

FIRST_LINE_S = 10.0
"""Off a terminal a bar is a line after so many seconds; each further one comes after twice as
many, so that a log stays short."""


def announce(console: Console, what: str) -> None:
    """A line about what begins, off a terminal: there a bar or a spinner shows it."""
    if not console.is_terminal:
        console.print(f"{what} …", highlight=False, soft_wrap=True)


@contextmanager
def waiting(console: Console, what: str) -> Iterator[None]:
    """Show that `what` has begun, that it goes on (on a terminal), and how long it took."""
    begun = time.monotonic()
    if console.is_terminal:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as spinner:
            spinner.add_task(f"{what} …", total=None)
            yield
    else:
        announce(console, what)
        yield
    console.print(f"{what}: {time.monotonic() - begun:.1f} s", highlight=False, soft_wrap=True)


@contextmanager
def progress_bar(console: Console, title: str, total: int | None, show: bool) -> Iterator[Any]:
    """A bar that vanishes when done, off a terminal a few lines; yields `advance(done, total=None,
    note="")`, of which `total` replaces the first one."""
    if not console.is_terminal:
        yield _Lines(console, title, total, show).advance
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=not show)
    with bar:
        task = bar.add_task(title, total=total)
        yield lambda done, total=None, note="": bar.update(
            task, completed=done, total=total, description=f"{title} ({note})" if note else title
        )


class _Lines:
    """A bar as lines that become rarer."""

    def __init__(self, console: Console, title: str, total: int | None, show: bool) -> None:
        self._console, self._title, self._total, self._show = console, title, total, show
        self._begun, self._next = time.monotonic(), FIRST_LINE_S

    def advance(self, done: int, total: int | None = None, note: str = "") -> None:
        self._total = self._total if total is None else total
        seconds = time.monotonic() - self._begun
        if not self._show or seconds < self._next:
            return
        self._next = 2 * seconds
        of = "" if self._total is None else f" of {self._total:,}"
        more = f", {note}" if note else ""
        line = f"{self._title}: {done:,}{of} in {seconds:.0f} s{more}"
        self._console.print(line, highlight=False, soft_wrap=True)
