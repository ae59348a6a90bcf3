"""What a call format finds in a turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class RawCall:
    """A call as it was written: name and arguments not yet checked against any schema."""

    name: Any
    arguments: Any


@dataclass(frozen=True, slots=True)
class Reading:
    """The turn as text for people, and its calls in order. A malformed call is what is wrong with
    it, in words meant for the policy."""

    text: str
    calls: Sequence[RawCall | str] = ()


class CallFormat(Protocol):
    """How a family of models writes calls and thinking."""

    @property
    def parser(self) -> str:
        """Its name: one of vLLM's parsers, `hermes` or `harmony`."""
        ...

    def read(self, turn: str) -> Reading:
        """Read one turn, its end-of-turn token left out. Never raises."""
        ...
