"""`metrics.jsonl`: one object a step, written as the run goes and read back as columns.

Step 0 is the model before training; it has a row if it was evaluated. What a file holds never
raises: what cannot be read becomes a `Notice`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from elpo_ray.types import Values

LOG = "metrics.jsonl"
PASS_AT_1 = "eval/pass_at_1"
"""The metric of the pass@1 of all held-out problems that were evaluated."""
HELD_OUT = re.compile(r"eval/(?:(?P<benchmark>.+)/)?pass_at_1")
"""`PASS_AT_1`, or the same of one benchmark of several."""
TAIL = 1 << 16
"""Bytes from the end of a log in which its last line is looked for first."""
Column = list[float | None]
Columns = dict[str, Column]
"""Metric -> its value in each row, None where the row has none; `step` is one of them."""


@dataclass(frozen=True)
class Notice:
    """One thing in a run folder that cannot be shown as it should."""

    text: str
    where: str
    """It names file and line, within the run folder."""


@dataclass(frozen=True)
class HeldOut:
    """One held-out pass@1: a point of the learning curve."""

    step: int
    pass_at_1: float
    low: float
    high: float
    """The ends of its 95 % interval over problems."""


class JsonlSink:
    """One JSON object a line, `step` first. Numbers of the step that the last line is about are
    added to that line; a killed writer leaves at most that one line cut off."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self._file = path.open("r+b", buffering=0)

    def write(self, step: int, values: Values) -> None:
        start, last = self._last()
        row: dict[str, Any] = {"step": step, **values}
        if last.get("step") == step:
            row = last | row
            self._file.seek(start)
        else:
            self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.truncate()

    def last(self) -> dict[str, Any]:
        """The last row; empty if there is none."""
        return self._last()[1]

    def close(self) -> None:
        self._file.close()

    def _last(self) -> tuple[int, dict[str, Any]]:
        """Where the last line begins, and its row. The file is looked at, since a run that goes
        back to a checkpoint shortens it."""
        end, size = self._file.seek(0, os.SEEK_END), TAIL
        while True:
            begin = max(0, end - size)
            self._file.seek(begin)
            tail = self._file.read(end - begin)
            place = tail.rfind(b"\n", 0, max(0, len(tail) - 1))
            if place >= 0 or begin == 0:
                return begin + place + 1, parsed(tail[place + 1 :].decode())[0]
            size *= 2


def read_columns(run: Path) -> tuple[Columns, list[Notice]]:
    """The columns of a run's log, sorted by `step`; the last line of a step counts. A value that is
    missing or no finite number is None."""
    rows: dict[float, dict[str, Any]] = {}
    notices = []
    for number, line in lines(run / LOG):
        where = f"{LOG}:{number}"
        row, problem = parsed(line)
        step = finite(row.get("step"))
        if problem:
            notices.append(Notice(problem, where))
        elif step is None:
            notices.append(Notice("no step in this line", where))
        else:
            rows[step] = row
    ordered = [rows[step] for step in sorted(rows)]
    keys = list(dict.fromkeys(key for row in ordered for key in row))
    columns = {key: [finite(row.get(key)) for row in ordered] for key in keys}
    return {key: values for key, values in columns.items() if any(values) or 0 in values}, notices


def held_out(columns: Mapping[str, Sequence[float | None]]) -> dict[str, list[HeldOut]]:
    """The points of each learning curve in a log's columns: under "" that of all held-out problems,
    then that of each benchmark, if there are several."""
    curves: dict[str, list[HeldOut]] = {}
    for key in columns:
        found = HELD_OUT.fullmatch(key)
        if found is not None:
            names = ("step", key, f"{key}_low", f"{key}_high")
            rows = zip_longest(*(columns.get(name, []) for name in names))
            curves[found["benchmark"] or ""] = [
                HeldOut(
                    int(step), mean, mean if low is None else low, mean if high is None else high
                )
                for step, mean, low, high in rows
                if step is not None and mean is not None
            ]
    return dict(sorted(curves.items()))


def last_step(run: Path) -> int:
    """The step of the last row of a run's log; 0 if it has none."""
    columns, _ = read_columns(run)
    return int(max((step for step in columns.get("step", []) if step is not None), default=0))


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines that are not blank; none of a file that is not there."""
    try:
        file = path.open(encoding="utf-8", errors="replace")
    except OSError:
        return
    with file:
        for number, line in enumerate(file, start=1):
            if not line.isspace():
                yield number, line


def parsed(line: str) -> tuple[dict[str, Any], str]:
    """Return the object on a line, or what is wrong with it."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        if not line.endswith("\n"):
            cut = "the last line is cut off: it is still being written, or the writer was killed"
            return {}, cut
        return {}, "not JSON"
    return (record, "") if isinstance(record, dict) else ({}, "not a JSON object")


def finite(value: Any) -> float | None:
    """Return the value if it is a number that a browser knows too."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    fits = math.isfinite(value) if isinstance(value, float) else abs(value) < 1 << 53
    return float(value) if fits else None
