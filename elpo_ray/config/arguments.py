"""What all commands share: exit codes, overrides over a schema, and the parser of those commands
that do without Hydra. Nothing here takes long to import.

Exit codes: 0 done; 1 a fault that leaves something to continue from; 2 a mistake in the call or the
configuration, one line on stderr and nothing started; 130 on Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from elpo_ray.config.errors import explain

EXIT_FAULT, EXIT_CONFIGURATION, EXIT_INTERRUPTED = 1, 2, 130
T = TypeVar("T")


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


def overridden(schema: type[T], values: Any, overrides: Sequence[str]) -> T:
    """The checked dataclass of `values`, then each `key=value` of `overrides`, over `schema`.

    Raises ValueError in one line, as a command over Hydra prints it.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), values)
        for override in overrides:
            try:
                merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([override]))
            except (OmegaConfBaseException, YAMLError) as error:
                done = "parsing" if isinstance(error, YAMLError) else "merging"
                raise ValueError(f"Error {done} override {override}") from error
        return typed(schema, merged)
    except (OmegaConfBaseException, ValueError) as error:
        raise ValueError(explain(error, schema)) from None


def typed(schema: type[T], composed: Any) -> T:
    """The checked dataclass. Merged into the schema once more: `+key=value` may have added a key
    that it does not have."""
    plain: Any = OmegaConf.create(OmegaConf.to_container(composed))
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), plain))
    assert isinstance(config, schema)
    return config
