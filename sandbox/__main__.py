"""`python -m sandbox [MODULE ...]`: an isolated REPL, with the named modules imported beforehand.

Reads one cell (a statement with its block, as Python's own prompt does), prints the result. Figures
are saved in a folder for temporary files, and their paths are printed. Ctrl-C ends the cell that
runs, and the session goes on in the state before it; at the prompt it drops the cell begun.
"""

from __future__ import annotations

import argparse
import asyncio
import codeop
import importlib.util
import signal
import sys
import tempfile
from pathlib import Path

from sandbox.png import size_of
from sandbox.results import CallResult, Kind, SandboxFailure, SandboxUnavailable
from sandbox.supervisor import Sandbox, Session

_SOON_S = 0.05


class Reader:
    """Cells from standard input, read in a thread."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self.reads = False
        """Whether somebody may be typing."""

    def drop(self) -> None:
        """Forget the lines of a cell that is not complete. For another thread."""
        self._lines = []
        print()
        self._ask()

    def next(self) -> str | None:
        """The next complete cell; None at the end."""
        self._lines, self.reads = [], True
        try:
            return self._read()
        finally:
            self.reads = False
        """Whether somebody may be typing."""

    def _read(self) -> str | None:
        while True:
            self._ask()
            line = sys.stdin.readline()
            if not line:
                return "".join(self._lines) if self._lines else None
            lines = self._lines = [*self._lines, line]
            cell = "".join(lines)
            try:
                incomplete = codeop.compile_command(cell, symbol="single") is None
            except (SyntaxError, ValueError, OverflowError):
                return cell
            if not incomplete and (len(lines) == 1 or not line.strip()):
                return cell

    def _ask(self) -> None:
        if sys.stdin.isatty():
            print("... " if self._lines else ">>> ", end="", flush=True)


class Printer:
    """What becomes of results."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        """Where figures are saved, once there is one."""
        self._figures = 0

    def show(self, result: CallResult) -> None:
        """Print a result, and save its figures."""
        print(result.stdout, end="")
        print(result.stderr, end="", file=sys.stderr)
        if result.value is not None:
            print(result.value)
        for image in result.figures:
            width, height = size_of(image)
            print(f"[figure {self._figures + 1}: {width} x {height}, {self._saved(image)}]")
        if result.kind is not Kind.OK:
            print(f"[{result.kind.value}] {result.traceback.rstrip()}", file=sys.stderr)

    def _saved(self, image: bytes) -> str:
        """Save a figure; its path, or why there is none."""
        self._figures += 1
        try:
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix="figures-"))
            path = self._folder / f"{self._figures}.png"
            path.write_bytes(image)
        except OSError as error:
            return f"not saved: {error}"
        return str(path)


async def _repl(preload: list[str]) -> None:
    async with Sandbox(preload=preload) as sandbox:
        session = await sandbox.open()
        layers = ", ".join(sandbox.layers)
        print(f"tier {sandbox.isolation} ({layers}); end of file ends it", file=sys.stderr)
        reader, printer = Reader(), Printer()
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, _interrupt, session, reader)
        while (cell := await asyncio.to_thread(reader.next)) is not None:
            printer.show(await session.call(cell))


def _interrupt(session: Session, reader: Reader) -> None:
    if session.interrupt():
        return
    if reader.reads:
        reader.drop()
    else:  # the cell is about to run
        asyncio.get_running_loop().call_later(_SOON_S, _interrupt, session, reader)


def _missing(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is None
    except (ImportError, ValueError):
        return True


def main() -> int:
    """Exit status 1 when this machine cannot isolate, 2 for wrong arguments, 130 for a Ctrl-C
    before there is a prompt."""
    parser = argparse.ArgumentParser(prog="python -m sandbox", description="An isolated REPL.")
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="imported beforehand")
    modules = parser.parse_args().modules
    for name in modules:
        if _missing(name):
            print(f"no module named {name!r}: install it, or leave it out", file=sys.stderr)
            return 2
    try:
        asyncio.run(_repl(modules))
    except (SandboxUnavailable, SandboxFailure) as failure:
        print(failure, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
