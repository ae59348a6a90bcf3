"""What a box can say, as data: `readings` makes it of a text, `equality` compares it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import sympy

from elpo_ray.tasks.grading.formulas import Formula
from elpo_ray.tasks.grading.measures import Measure


@dataclass(frozen=True)
class Words:
    """A text that is no mathematics."""

    text: str


@dataclass(frozen=True)
class Numeral:
    """Digits in a base: `52_8`. The base may be left out."""

    digits: str
    base: str | None


@dataclass(frozen=True)
class Leaf:
    """One value."""

    formula: Formula
    places: int | None = None
    """Digits after the point of a decimal number; None of anything else."""
    significant: int = 0
    percent: bool = False
    touching: bool = False
    """See `units.Bare`."""
    plain: bool = False
    """A number as such, without any letter."""
    measure: Measure | None = None
    """The unit it was written with, where that is known for sure."""


@dataclass(frozen=True)
class Several:
    """Some values, each with its readings."""

    kind: Literal["bare", "set", "round", "square", "angle"]
    items: tuple[tuple[Reading, ...], ...]


@dataclass(frozen=True)
class Span:
    """An interval, whose ends may be formulas."""

    low: tuple[Reading, ...]
    high: tuple[Reading, ...]
    closed: tuple[bool, bool]


@dataclass(frozen=True)
class Region:
    """A set of real numbers; `name` is the unknown of an inequality. Ends that are irrational are
    rounded to 50 digits, all in the same way."""

    points: sympy.Set
    name: str | None = None


@dataclass(frozen=True)
class Equation:
    """An equation or inequality."""

    relation: str
    name: str
    value: tuple[Reading, ...]
    difference: Formula | None
    """The left side minus the right side."""
    assigns: bool
    """The right side is what the left side's name stands for."""
    words: bool = False
    """The name is prose."""
    curve: bool = False
    """It relates unknowns such as x and y: the value of its right side is no answer."""


@dataclass(frozen=True)
class Table:
    """A matrix."""

    rows: tuple[tuple[tuple[Reading, ...], ...], ...]


Reading = Words | Numeral | Leaf | Several | Span | Region | Equation | Table
