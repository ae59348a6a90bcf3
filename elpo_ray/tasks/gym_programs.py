"""Programs that solve problems of reasoning_gym, line by line: demonstrations for a model that
cannot write any.

A line is one call of the code interpreter and what the session answers. A program takes as many
lines as its problem has parts, and each line needs the value of the line before, so that a wrong
one cannot be made good later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Line = tuple[str, str]
"""Code, and the value that the session shows."""


def chain_sum(metadata: dict[str, Any]) -> list[Line]:
    """`34 + 7 - 12` is `34 + 7` and `41 - 12`."""
    first, *rest = metadata["expression"].split()
    terms = [f"{sign} {term}" for sign, term in zip(rest[::2], rest[1::2], strict=True)]
    return _folded(int(first), terms, [int(term.replace(" ", "")) for term in terms])


def leg_counting(metadata: dict[str, Any]) -> list[Line]:
    """3 crabs and 2 cows are `0 + 3 * 10` and `30 + 2 * 4`."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS  # seconds to import

    kinds = metadata["animals"].items()
    terms = [f"+ {count} * {ANIMALS[name]}" for name, count in kinds]
    return _folded(0, terms, [count * ANIMALS[name] for name, count in kinds])


PROGRAMS: dict[str, Callable[[dict[str, Any]], list[Line]]] = {
    "chain_sum": chain_sum,
    "leg_counting": leg_counting,
}
"""By the name of the kind; a program reads the metadata of a problem."""


def _folded(value: int, terms: Sequence[str], changes: Sequence[int]) -> list[Line]:
    """One line a term, which changes the value of the line before."""
    lines: list[Line] = []
    for term, change in zip(terms, changes, strict=True):
        lines.append((f"{value} {term}", str(value + change)))
        value += change
    return lines
