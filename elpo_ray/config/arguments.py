"""What all commands share: the exit codes, and the parser of those that do without Hydra.

Exit codes: 0 done; 1 a fault that leaves something to continue from; 2 a mistake in the call or the
configuration, one line on stderr and no engine started; 130 on Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_FAULT, EXIT_CONFIGURATION, EXIT_INTERRUPTED = 1, 2, 130


class Parser(argparse.ArgumentParser):
    """The command line of `python -m elpo_ray.NAME`; a mistake is one line, without the usage."""

    def __init__(self, name: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=f"python -m elpo_ray.{name}",
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self._name = name

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_CONFIGURATION, f"elpo_ray.{self._name}: {message}; try --help\n")

    def run(self, command: Callable[[], None]) -> int:
        """Call the command and return its exit code. A ValueError of it is printed in one line."""
        try:
            command()
        except ValueError as error:
            print(f"elpo_ray.{self._name}: {error}", file=sys.stderr)
            return EXIT_CONFIGURATION
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
        return 0
