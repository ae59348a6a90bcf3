"""What all commands share: the exit codes, and the parser of those that do without Hydra.

Exit codes: 0 done; 1 a fault that leaves something to continue from; 2 a mistake in the call or the
configuration, one line on stderr and no engine started; 130 on Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

EXIT_FAULT, EXIT_CONFIGURATION, EXIT_INTERRUPTED, EXIT_CLOSED_PIPE = 1, 2, 130, 141
VERSION = "--version"


def version() -> str:
    """The name and version of the installed package, in one line."""
    try:
        return f"elpo_ray {importlib.metadata.version('elpo_ray')}"
    except importlib.metadata.PackageNotFoundError:
        return "elpo_ray, from a checkout that is not installed"


@contextmanager
def into_a_pipe() -> Iterator[None]:
    """End the process without a word, with code 141 as a shell's own programs do, if the reader of
    its output has gone, as in `elpo --help | head`. Other broken pipes raise BrokenPipeError."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the last flush
        sys.exit(EXIT_CLOSED_PIPE)


def _reader_has_gone() -> bool:
    poll = select.poll()
    poll.register(sys.stdout, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


class Parser(argparse.ArgumentParser):
    """The command line of `elpo NAME`; a mistake is one line, without the usage."""

    def __init__(self, name: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=f"elpo {name}",
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument(VERSION, action="version", version=version())
        self._name = name

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """As argparse has it, but without a default it lists words of which there may be none
        among the required ones."""
        if settings.get("nargs") == "*":
            settings.setdefault("default", [])
        return super().add_argument(*names, **settings)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Options may also stand between the positional words, unless `--` ends the options."""
        words = list(sys.argv[1:] if args is None else args)
        with into_a_pipe():  # --help
            if "--" in words:
                return super().parse_args(words, namespace)
            return super().parse_intermixed_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_CONFIGURATION, f"elpo_ray.{self._name}: {message}; try --help\n")

    def run(self, command: Callable[[], None]) -> int:
        """Call the command and return its exit code. A ValueError of it is printed in one line."""
        try:
            with into_a_pipe():
                command()
        except ValueError as error:
            print(f"elpo_ray.{self._name}: {error}", file=sys.stderr)
            return EXIT_CONFIGURATION
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
        return 0
