"""`python -m sandbox [MODULE ...]`: an isolated REPL, with the named modules imported beforehand.

Reads one cell (a statement with its block, as Python's own prompt does), prints the result.
"""

from __future__ import annotations

import asyncio
import codeop
import sys

from sandbox.results import CallResult, Kind, SandboxUnavailable
from sandbox.supervisor import Sandbox


def _read_cell() -> str | None:
    """The next complete cell from standard input; None at its end."""
    lines: list[str] = []
    while True:
        if sys.stdin.isatty():
            print("... " if lines else ">>> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return "".join(lines) if lines else None
        lines.append(line)
        cell = "".join(lines)
        try:
            incomplete = codeop.compile_command(cell, symbol="single") is None
        except (SyntaxError, ValueError, OverflowError):
            return cell
        if not incomplete and (len(lines) == 1 or not line.strip()):
            return cell


def _show(result: CallResult) -> None:
    print(result.stdout, end="")
    print(result.stderr, end="", file=sys.stderr)
    if result.value is not None:
        print(result.value)
    if result.kind is not Kind.OK:
        print(f"[{result.kind.value}] {result.traceback.rstrip()}", file=sys.stderr)


async def _repl(preload: list[str]) -> None:
    async with Sandbox(preload=preload) as sandbox:
        session = await sandbox.open()
        print(f"isolated by {', '.join(sandbox.layers)}; end of file ends it", file=sys.stderr)
        while (cell := await asyncio.to_thread(_read_cell)) is not None:
            _show(await session.call(cell))


def main() -> int:
    """Exit status 1 when this machine cannot isolate."""
    try:
        asyncio.run(_repl(sys.argv[1:]))
    except SandboxUnavailable as unavailable:
        print(unavailable, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
