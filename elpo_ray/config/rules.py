"""What a value may be, and the one check of a configuration.

A bound stands in the type of its field, as in `lr: PositiveFloat = 1e-6`; `Section.conflicts`
yields which values do not go together. `check` walks a section and all sections in it, so that an
error names the key under which the value stands, whichever class it belongs to.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from enum import Enum, StrEnum
from functools import cache
from operator import attrgetter
from typing import Annotated, Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

from elpo_ray.config.dotted import is_path

T = TypeVar("T")


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


@dataclass(frozen=True, slots=True)
class Names:
    """The built-in names of a part and, unless `dotted` is false, the dotted path of the user's."""

    builtin: type[StrEnum]
    dotted: bool = True

    def holds(self, value: Any) -> bool:
        """Whether a name, or each name of a list, is known or has the form of a path."""
        if isinstance(value, list):
            return all(map(self.holds, value))
        if value is None:
            return True
        return value in list(self.builtin) or (self.dotted and is_path(value))

    def member(self, value: Any) -> Any:
        """The value with every built-in name as the member of its enumeration."""
        if isinstance(value, list):
            return [self.member(each) for each in value]
        return self.builtin(value) if value in list(self.builtin) else value

    def remedy(self, value: Any) -> str:
        wrong = next((v for v in value if not self.holds(v)), "") if type(value) is list else value
        near = difflib.get_close_matches(wrong, list(self.builtin), n=3)
        meant = f"did you mean {' or '.join(near)}? Else " if near else ""
        own = ", or name your own as module:attribute" if self.dotted else ""
        return f"{meant}use one of {self}{own}"

    def __str__(self) -> str:
        return ", ".join(self.builtin)


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
            require(bound.holds(value), prefix + name, value, _remedy(bound, value))
        length = lengths(schema)[name]
        if length is not None and value is not None and len(value) != length:
            raise _error(prefix + name, value, f"give {length} values")
    for name, known in names(schema).items():
        value = getattr(section, name)
        if not known.holds(value):
            raise _error(prefix + name, value, known.remedy(value))
        setattr(section, name, known.member(value))
    for name, remedy in section.conflicts():
        raise _error(prefix + name, attrgetter(name)(section), remedy)


@cache
def bounds(schema: Any) -> dict[str, Bound | None]:
    """The bound of each field of a section's class."""
    hints = get_type_hints(schema, include_extras=True)
    return {field.name: _bound(hints[field.name]) for field in fields(schema)}


@cache
def lengths(schema: Any) -> dict[str, int | None]:
    """How many values each field of a section's class holds, where its type says so."""
    hints = get_type_hints(schema)
    return {field.name: _length(hints[field.name]) for field in fields(schema)}


@cache
def names(schema: Any) -> dict[str, Names]:
    """The names among which a field of a section's class chooses, of those that do."""
    hints = get_type_hints(schema, include_extras=True)
    found = {field.name: _marked(hints[field.name], Names) for field in fields(schema)}
    return {name: known for name, known in found.items() if known is not None}


def _remedy(bound: Bound, value: Any) -> str:
    """What to write instead of a value, or a list with one, that is out of bounds."""
    several = value if isinstance(value, list | tuple) else [value]
    finite = all(math.isfinite(each) for each in several if isinstance(each, int | float))
    return bound.remedy if finite or bound.high < math.inf else f"{bound.remedy}; it must be finite"


def _bound(hint: Any) -> Bound | None:
    """The bound in a type: of a number, of each number of a list, of what may be null too."""
    bound = _marked(hint, Bound)
    optional = get_origin(hint) is not Annotated and type(None) in get_args(hint)
    if bound and optional and "null" not in bound.remedy:
        return replace(bound, remedy=f"{bound.remedy}, or null")
    return bound


def _length(hint: Any) -> int | None:
    """The length of a tuple type, or of a tuple that may be null too."""
    parts = get_args(hint)
    if get_origin(hint) is tuple:
        return None if Ellipsis in parts else len(parts)
    return next((len(get_args(part)) for part in parts if get_origin(part) is tuple), None)


def _marked(hint: Any, kind: type[T]) -> T | None:
    """What of `kind` a type is annotated with, or one of the types in it."""
    if get_origin(hint) is Annotated:
        return next((each for each in hint.__metadata__ if isinstance(each, kind)), None)
    return next(filter(None, (_marked(each, kind) for each in get_args(hint))), None)


def _error(key: str, value: Any, remedy: str) -> ValueError:
    return ValueError(f"{key}={_plain(value)!r}: {remedy}")


def _plain(value: Any) -> Any:
    """A value as a user writes it: the names of choices, lists instead of tuples."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value.value if isinstance(value, Enum) else value
