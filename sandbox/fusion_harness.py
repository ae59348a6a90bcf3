"""Runs on a remote executor, as source text: all cells of a session, and reports the last one.

Standard library only. `run_cells` prints one line after whatever the last cell printed: the mark
and a JSON object with how it ended, and a digest for each cell before it, by which the caller knows
that they came to the same as at first. Texts are cut and digests taken exactly as by a session of
our own, so that a state may go from one kind of host to the other.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import os
import random
import re
import sys
import tempfile
import traceback
from collections.abc import Iterable
from typing import Any

MAX_FILE_BYTES = 2 << 20
"""A larger file does not fit into an answer."""
HOME = os.getcwd()
Said = tuple[str, "str | None", "str | None", str]
"""Kind, value, error type and traceback of a cell."""


def digest(said: Iterable[str | None], accidental: str) -> str:
    """The digest of `CallResult.digest`; `said` is kind, stdout, value and error type."""
    masked = re.sub(accidental, "~", repr(tuple(said)))
    return hashlib.sha256(masked.encode("ascii", "backslashreplace")).hexdigest()[:32]


def cut_printed(data: bytes, keep: int) -> str:
    """Cut printed bytes as `HeadTail` does."""
    half = keep // 2
    if len(data) <= 2 * half:
        return data.decode("utf-8", "replace")
    head, tail = (part.decode("utf-8", "replace") for part in (data[:half], data[-half:]))
    return f"{head}\n... [{len(data) - 2 * half} bytes left out] ...\n{tail}"


def cut_text(text: str, keep: int) -> str:
    """Cut a text as the runner does."""
    half = keep // 2
    if len(text) <= keep:
        return text
    return f"{text[:half]}\n... [{len(text) - 2 * half} left out] ...\n{text[-half:]}"


def run_step(step: str | list[str], number: int, names: dict[str, Any], keep: int) -> Said:
    """Run one cell, or deal with a file: ["put", name, data in base64] or ["get", name], whose
    value is the data in base64."""
    if isinstance(step, str):
        return run_cell(step, number, names, keep)
    word, name, *given = step
    path = os.path.join(HOME, name)
    try:
        if word == "put":
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(base64.b64decode(given[0]))
            return "ok", None, None, ""
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) <= MAX_FILE_BYTES:
            return "ok", base64.b64encode(data).decode(), None, ""
        said = f"it has more than {MAX_FILE_BYTES >> 20} MiB"
    except OSError as error:
        said = str(error.strerror)
    return "error", None, "FileRefused", f"file {name!r}: {said}"


def run_cell(code: str, number: int, names: dict[str, Any], keep: int) -> Said:
    """Run one cell."""
    name = f"<cell {number}>"
    try:
        tree = ast.parse(code, name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec", dont_inherit=True), names)
        value = None
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval"), names)
        return "ok", None if value is None else cut_text(repr(value), keep), None, ""
    except MemoryError:
        return "memory", None, "MemoryError", "MemoryError"
    except BaseException as error:
        report = traceback.TracebackException(type(error), error, error.__traceback__)
        own = [frame for frame in report.stack if frame.filename.startswith("<cell ")]
        report.stack = traceback.StackSummary.from_list(own)
        kind = "exited" if isinstance(error, SystemExit) else "error"
        return kind, None, type(error).__name__[:200], cut_text("".join(report.format()), keep)


def run_quietly(
    step: str | list[str], number: int, names: dict[str, Any], keep: int
) -> tuple[Said, bytes]:
    """One step, and what it printed to stdout, by whatever way."""
    sys.stdout.flush()
    saved = [os.dup(number) for number in (1, 2)]
    with tempfile.TemporaryFile() as printed, open(os.devnull, "wb") as nowhere:
        os.dup2(printed.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        said = run_step(step, number, names, keep)
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in zip((1, 2), saved):  # noqa: B905 - for Python before 3.10
            os.dup2(descriptor, number)
            os.close(descriptor)
        printed.seek(0)
        return said, printed.read()


def run_cells(
    setup: str, cells: list[str | list[str]], mark: str, keep: int, accidental: str
) -> None:
    """Run the setup and all cells, or what `run_step` has beside them; report the last one. `keep`
    bounds each text."""
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    random.seed(0)
    names: dict[str, Any] = {"__name__": "__main__"}
    digests = []
    if setup:
        (kind, _, _, trace), _ = run_quietly(setup, 0, names, keep)
        if kind != "ok":
            print(mark + json.dumps({"setup": trace}))
            return
    *before, last = cells
    for number, step in enumerate(before, 1):
        (kind, value, error_type, _), data = run_quietly(step, number, names, keep)
        digests.append(digest((kind, cut_printed(data, keep), value, error_type), accidental))
    told = run_step(last, len(cells), names, keep)
    print("\n" + mark + json.dumps({"told": told, "digests": digests}), flush=True)
