"""The arithmetic of Countdown: what one step does and what can still be reached.

`merge` and `describe` are also what the tool session runs (`session_code` ships their source), so
that the session, the host's simulation and the demonstrations cannot disagree. Hence both use
builtins only.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

Left = tuple[int, ...]
"""The numbers left, sorted."""
Move = tuple[int, str, int]
"""A step: first operand, operator, second operand."""


def merge(left: list[int], a: int, op: str, b: int, operators: str, max_value: int) -> list[int]:
    """`left` with `a` and `b` replaced by `a op b`, sorted.

    ValueError, in a few words for the policy, if the step is not allowed.
    """
    rest = list(left)
    for operand in (a, b):
        if type(operand) is not int or operand not in rest:
            raise ValueError("not left")
        rest.remove(operand)
    if op not in list(operators):
        raise ValueError("bad operator")
    value = a + b if op == "+" else a - b if op == "-" else a * b
    if not 0 <= value <= max_value:
        raise ValueError("out of range")
    return sorted([*rest, value])


def describe(left: list[int]) -> str:
    """What the session prints after a step."""
    return "left: " + " ".join(str(number) for number in left)


def session_code(numbers: Left, rules: Rules) -> str:
    """Code that gives a fresh session the numbers and `combine(a, op, b)`."""
    return "\n".join(
        (
            inspect.getsource(merge),
            inspect.getsource(describe),
            f"_left = {list(numbers)!r}",
            "def combine(a, op, b):",
            f"    _left[:] = merge(_left, a, op, b, {rules.operators!r}, {rules.max_value})",
            "    print(describe(_left))",
        )
    )


@dataclass(frozen=True, slots=True)
class Rules:
    """What a step may do; hashable, so that answers can be remembered."""

    operators: str
    max_value: int

    def step(self, left: Left, a: int, op: str, b: int) -> Left:
        """The numbers left after a step; ValueError if it is not allowed."""
        return tuple(merge(list(left), a, op, b, self.operators, self.max_value))

    def values(self, a: int, b: int) -> dict[str, int]:
        """Allowed result of each operator on `a` and `b`, the larger operand first."""
        high, low = max(a, b), min(a, b)
        made = {"+": high + low, "-": high - low, "*": high * low}
        return {op: made[op] for op in self.operators if made[op] <= self.max_value}

    def moves(self, left: Left) -> list[Move]:
        """Every allowed step once, the larger operand first, largest operands first."""
        pairs = sorted({(b, a) for a, b in combinations(left, 2)}, reverse=True)
        return [(a, op, b) for a, b in pairs for op in self.values(a, b)]


@lru_cache(maxsize=1 << 18)
def reachable(left: Left, rules: Rules) -> frozenset[int]:
    """Every number that some order of steps makes of all of `left`.

    The last step joins what was made of some part of the numbers with what was made of the rest,
    so the search runs over partitions, not over orders of steps.
    """
    if len(left) == 1:
        return frozenset(left)
    found: set[int] = set()
    # The first number always goes to the first part: every partition once.
    for mask in range(0, (1 << (len(left) - 1)) - 1):
        first = [left[0]] + [x for i, x in enumerate(left[1:]) if mask >> i & 1]
        second = [x for i, x in enumerate(left[1:]) if not mask >> i & 1]
        for a in reachable(tuple(first), rules):
            for b in reachable(tuple(second), rules):
                found.update(rules.values(a, b).values())
    return frozenset(found)
