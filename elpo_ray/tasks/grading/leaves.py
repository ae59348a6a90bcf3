"""The meanings of a text that is one value: a number, a formula, with or without a unit."""

from __future__ import annotations

import re
from fractions import Fraction

import sympy

from elpo_ray.tasks.grading import formulas
from elpo_ray.tasks.grading.meanings import Leaf, Reading, Table
from elpo_ray.tasks.grading.measures import measure
from elpo_ray.tasks.grading.units import Bare, bare, without_prose

NUMBER = re.compile(r"([-+]?)\s*(\d+(?:\.\d*)?|\.\d+)")
SCIENTIFIC = re.compile(
    r"([-+]?)\s*(\d+(?:\.\d*)?|\.\d+)(?:\s*[eE]\s*([-+]?\d+)"
    r"|\s*(?:\\times|\\cdot)\s*10\s*\^\s*\{\s*([-+]?\s*\d+)\s*\})"
)
POWER_OF_TEN = re.compile(r"([-+]?)()()10\s*\^\s*\{\s*([-+]?\s*\d+)\s*\}")
RATIO = re.compile(
    r"([-+]?)\s*(?:(\d+)\s*/\s*(\d+)|\\frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(-?\d+)\s*\})"
)
LETTERS = re.compile(r"[A-Za-z][A-Za-z' .-]*")


def leaves(text: str) -> list[Reading]:
    """All readings of a text that has no further parts."""
    text = without_prose(text)
    found = bare(text)
    readings: list[Reading] = []
    if found.letters:
        whole = formulas.formula(text)
        readings += [Leaf(whole)] if whole else []
    return readings + _value(found)


def _value(found: Bare) -> list[Reading]:
    leaf = number(found.text)
    readings = [leaf] if leaf else []
    if leaf is None or re.search(r"\de-", found.text):
        whole = formulas.formula(found.text)
        if whole is not None:
            readings.append(Leaf(whole))
        else:
            table = _worked_table(found.text)
            if table:
                return [table]
    made: list[Reading] = []
    for each in readings:
        formula = each.formula
        places = each.places
        if found.multiplier != 1:
            formula = formula.scaled(Fraction(found.multiplier))
        unit = measure(found.unit)
        made.append(
            Leaf(formula, places, each.significant, found.percent, found.touching, each.plain, unit)
        )
    return made


def _worked_table(text: str) -> Table | None:
    """A matrix that has to be worked out, such as a multiple of one."""
    if "matrix" not in text:
        return None
    tree = formulas.parse(text)
    tree = tree.doit() if hasattr(tree, "doit") else tree
    if not isinstance(tree, sympy.MatrixBase):
        return None
    cells = [[formulas.evaluated("", cell) for cell in tree.row(i)] for i in range(tree.rows)]
    if any(cell is None for row in cells for cell in row):
        return None
    return Table(tuple(tuple((Leaf(cell),) for cell in row if cell) for row in cells))


def number(text: str) -> Leaf | None:
    """A number as such: an integer, a decimal number, a fraction, a power of ten."""
    text = text.strip()
    exponent = 0
    if found := NUMBER.fullmatch(text):
        sign, digits = found.groups()
    elif found := SCIENTIFIC.fullmatch(text):
        sign, digits = found[1], found[2]
        exponent = int((found[3] or found[4]).replace(" ", "")[:7])
    elif found := POWER_OF_TEN.fullmatch(text):
        sign, digits, exponent = found[1], "1", int(found[4].replace(" ", "")[:7])
    elif found := RATIO.fullmatch(text):
        top, bottom = (found[2], found[3]) if found[2] else (found[4], found[5])
        if int(bottom) == 0:
            return None
        value = Fraction(int(top), int(bottom)) * (-1 if found[1] == "-" else 1)
        return Leaf(formulas.number(value), plain=True)
    else:
        return None
    whole, point, places = digits.partition(".")
    if abs(exponent) > 10**4:
        return None
    value = Fraction(int(whole + places or "0")) * Fraction(10) ** (exponent - len(places))
    value = -value if sign == "-" else value
    significant = len((whole + places).lstrip("0"))
    return Leaf(
        formulas.number(value),
        places=len(places) - exponent if point else None,
        significant=significant,
        plain=True,
    )
