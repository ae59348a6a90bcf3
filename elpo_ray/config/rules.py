"""What a value may be, and the one check of a configuration.

A bound stands in the type of its field, as in `lr: PositiveFloat = 1e-6`; `Section.conflicts`
yields which values do not go together. `check` walks a section and all sections in it, so that an
error names the key under which the value stands, whichever class it belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from enum import Enum
from functools import cache
from operator import attrgetter
from typing import Annotated, Any, ClassVar, get_args, get_origin, get_type_hints


def require(ok: bool, key: str, value: Any, remedy: str) -> None:
    """Raise the one form of a user's configuration error unless `ok`."""
    if not ok:
        raise _error(key, value, remedy)


@dataclass(frozen=True, slots=True)
class Bound:
    """The finite numbers between two ends; a square bracket in `ends` includes its end."""

    low: float
    high: float
    ends: str
    remedy: str

    def holds(self, value: Any) -> bool:
        """Whether a number, or each number of a list, lies within; null always does."""
        if isinstance(value, list | tuple):
            return all(self.holds(each) for each in value)
        if value is None:
            return True
        above = value > self.low or (value == self.low and "[" in self.ends)
        below = value < self.high or (value == self.high and "]" in self.ends)
        return bool(above and below)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'≥' if '[' in self.ends else '>'} {self.low}"
        return f"in {self.ends[0]}{self.low}, {self.high}{self.ends[1]}"


def at_least(low: float, remedy: str = "") -> Bound:
    """Numbers from `low` on."""
    return Bound(low, math.inf, "[)", remedy or f"use {low} or more")


def above(low: float, remedy: str = "") -> Bound:
    """Numbers above `low`."""
    return Bound(low, math.inf, "()", remedy or f"use a value above {low}")


def between(low: float, high: float, remedy: str = "", ends: str = "[]") -> Bound:
    """Numbers from `low` to `high`; a round bracket in `ends` excludes its end."""
    return Bound(low, high, ends, remedy or f"use a value in {ends[0]}{low}, {high}{ends[1]}")


PositiveInt = Annotated[int, at_least(1)]
NonNegativeInt = Annotated[int, at_least(0)]
PositiveFloat = Annotated[float, above(0)]
NonNegativeFloat = Annotated[float, at_least(0)]
Fraction = Annotated[float, between(0, 1)]
PositiveFraction = Annotated[float, between(0, 1, ends="(]")]


class Section:
    """Base of every part of a configuration.

    A class that stands at only one place names it as its `key` ("" for a whole configuration), and
    an object of it is checked when it is made, with all sections in it. A class that stands at
    several places has no key: the sections that hold it check it.
    """

    key: ClassVar[str | None] = None

    def __init_subclass__(cls, key: str | None = None) -> None:
        if key is not None:
            cls.key = key

    def __post_init__(self) -> None:
        if self.key is not None:
            check(self, self.key)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """(key below this section, remedy) of values that do not go together. Asked only where all
        bounds hold."""
        yield from ()


def check(section: Section, key: str) -> None:
    """Check every value of a section that stands under `key`, and of the sections in it. Raises
    ValueError, `key=value: remedy`, for the first that is out of bounds or in conflict."""
    prefix = f"{key}." if key else ""
    schema: Any = type(section)
    for name, bound in bounds(schema).items():
        value = getattr(section, name)
        if isinstance(value, Section):
            check(value, prefix + name)
        elif bound is not None:
            require(bound.holds(value), prefix + name, value, bound.remedy)
    for name, remedy in section.conflicts():
        raise _error(prefix + name, attrgetter(name)(section), remedy)


@cache
def bounds(schema: Any) -> dict[str, Bound | None]:
    """The bound of each field of a section's class."""
    hints = get_type_hints(schema, include_extras=True)
    return {field.name: _bound(hints[field.name]) for field in fields(schema)}


def _bound(hint: Any) -> Bound | None:
    """The bound in a type: of a number, of each number of a list, of what may be null too."""
    if get_origin(hint) is Annotated:
        return next(each for each in hint.__metadata__ if isinstance(each, Bound))
    bound = next(filter(None, map(_bound, get_args(hint))), None)
    if bound and type(None) in get_args(hint) and "null" not in bound.remedy:
        return replace(bound, remedy=f"{bound.remedy}, or null")
    return bound


def _error(key: str, value: Any, remedy: str) -> ValueError:
    return ValueError(f"{key}={_plain(value)!r}: {remedy}")


def _plain(value: Any) -> Any:
    """A value as a user writes it: the names of choices, lists instead of tuples."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value.value if isinstance(value, Enum) else value
