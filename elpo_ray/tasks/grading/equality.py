r"""Whether an answer is the gold answer in another form, and why.

Runs in a process of its own (`child`): what is left of symbolic work can take for ever, eat all
memory or overflow the stack, and nothing inside a process can stop all of that. Invariants: values
are compared exactly, or relative to their size; an answer that is too large to be worked out is
different from every gold answer that is not, so that no model hides behind its size.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import product

import sympy
from math_verify import verify

from elpo_ray.tasks.grading import formulas
from elpo_ray.tasks.grading.meanings import (
    Equation,
    Leaf,
    Numeral,
    Reading,
    Region,
    Several,
    Span,
    Table,
    Words,
)
from elpo_ray.tasks.grading.notation import tidy
from elpo_ray.tasks.grading.readings import fold, read

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that we keep the time

MAX_CHARS = 1000
"""A longer answer is compared as text only (or one of 20 times the gold answer's length)."""
MAX_DEPTH = 12
"""So is one with deeper brackets (or 8 deeper than those of the gold answer): reading LaTeX takes
time exponential in the depth."""
PLACES, SIGNIFICANT = 6, 4
"""A decimal number of so many places and digits stands for what it is the beginning of."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a comparison found."""

    equal: bool | None
    """None: nobody can know."""
    why: str
    """One clause for a reader."""


def nothing(stage: str) -> None:
    """A listener that does not listen."""


def equal(gold: str, answer: str) -> bool | None:
    """Whether `answer` is `gold` in another form; None if nobody can know."""
    return judge(gold, answer).equal


def judge(gold: str, answer: str, stage: Callable[[str], None] = nothing) -> Finding:
    """`equal`, with its reason. May not return: the caller keeps the time. `stage` is told when
    the work on one side ("gold", "answer") or on both ("both") begins, so that the caller knows
    whose size it was."""
    if gold == answer:
        return Finding(True, "the same text")
    if len(answer) > max(MAX_CHARS, 20 * len(gold)):
        return Finding(False, f"the answer has {len(answer)} characters")
    if _depth(answer) > max(MAX_DEPTH, _depth(gold) + 8):
        return Finding(False, f"the answer's brackets are {_depth(answer)} deep")
    wanted = fold(tidy(gold))
    stage("answer")
    if fold(tidy(answer)) == wanted != "":
        return Finding(True, "the same text but for how it is written")
    stage("gold")
    meant = _read(gold)
    stage("answer")
    given = read(answer)
    stage("both")
    return _any(meant, given)


@lru_cache(maxsize=64)
def _read(gold: str) -> tuple[Reading, ...]:
    return read(gold)


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _any(gold: Sequence[Reading], answer: Sequence[Reading]) -> Finding:
    """Equal if one meaning of the gold answer is one of the answer's."""
    findings = [_same(a, b) for a, b in product(gold, answer)]
    for wanted in (True, None):
        for finding in findings:
            if finding.equal is wanted:
                return finding
    return findings[0]


def _all(pairs: Sequence[tuple[Sequence[Reading], Sequence[Reading]]], why: str) -> Finding:
    """Equal if every pair is."""
    findings = [_any(a, b) for a, b in pairs]
    for wanted in (False, None):
        for finding in findings:
            if finding.equal is wanted:
                return finding
    return Finding(True, why)


def _same(gold: Reading, answer: Reading) -> Finding:
    match gold, answer:
        case Words(), Words():
            same = gold.text == answer.text != ""
            return Finding(
                same, "the same words" if same else f"{gold.text!r} is not {answer.text!r}"
            )
        case Numeral(), Numeral():
            same = gold == answer
            return Finding(same, "the same digits in the same base" if same else "another numeral")
        case Numeral(), Leaf():
            same = answer.plain and answer.formula.text == gold.digits
            return Finding(same, "the same digits" if same else "another numeral")
        case Leaf(), Leaf():
            return _same_leaf(gold, answer)
        case Region(), Region():
            return _same_region(gold, answer)
        case Span(), Span():
            if gold.closed != answer.closed:
                return Finding(False, "the ends of the intervals are not open and closed alike")
            return _all([(gold.low, answer.low), (gold.high, answer.high)], "the same interval")
        case Table(), Table():
            return _same_table(gold, answer)
        case Equation(), Equation():
            return _same_equation(gold, answer)
        case Equation(), _ if gold.assigns and not gold.curve and not isinstance(answer, Words):
            return _any(gold.value, [answer])
        case _, Equation() if answer.assigns and not isinstance(gold, Words | Region):
            return _any([gold], answer.value)
        case Words(), Equation() if answer.assigns:
            return _any(
                [gold], [each for each in answer.value if isinstance(each, Words)] or [answer]
            )
        case Several(), Several():
            return _same_list(gold, answer)
        case Several(kind="set", items=(item,)), Leaf() | Equation():
            return _any(item, [answer])
        case Leaf(), Several(kind="set", items=(item,)):
            return _any([gold], item)
        case Table(), Several():
            return _same_vector(gold, answer)
        case Several(), Table():
            return _same_vector(answer, gold)
    return Finding(False, f"{_kind(gold)} is not {_kind(answer)}")


def _kind(reading: Reading) -> str:
    if isinstance(reading, Leaf):
        return f"the value {shown(reading)}"
    if isinstance(reading, Several):
        return f"a list of {len(reading.items)}"
    names = {Words: "a text", Numeral: "a numeral", Span: "an interval", Region: "a set of numbers",
             Equation: "an equation", Table: "a matrix"}  # fmt: skip
    return names[type(reading)]


def shown(leaf: Leaf) -> str:
    """A value for a reader."""
    text = leaf.formula.text or str(leaf.formula.tree)[:60]
    return (text if len(text) <= 60 else text[:57] + "…") + (" %" if leaf.percent else "")


def _same_leaf(gold: Leaf, answer: Leaf) -> Finding:
    if gold.touching or (answer.touching and not gold.plain):
        return Finding(False, "a letter after the number may be an unknown")
    if gold.measure and answer.measure:
        factor = answer.measure.per(gold.measure)
        if factor is None:
            return Finding(False, "the units are not of one kind")
        if factor != 1:
            answer = Leaf(answer.formula.scaled(factor))
    verdicts = []
    for a, b in _percentages(gold, answer):
        verdict = formulas.same(a.formula, b.formula)
        if verdict is False and (_begins(a, b) or _begins(b, a)):
            return Finding(True, "a decimal number with the other one's digits")
        if verdict is None and not (a.formula.has_value and b.formula.has_value):
            verdict = _verified(a, b)
        if verdict:
            return Finding(True, f"the same value: {shown(gold)}")
        verdicts.append(verdict)
    if None in verdicts:
        return Finding(None, f"nobody can work out whether {shown(gold)} is {shown(answer)}")
    return Finding(False, f"the values differ: {shown(gold)} is not {shown(answer)}")


def _verified(a: Leaf, b: Leaf) -> bool | None:
    """By math-verify: formulas without a value, such as an integral with unknowns."""
    if a.formula.too_large or b.formula.too_large:
        return None
    if a.formula.has_value != b.formula.has_value:
        return False
    return bool(
        verify(
            a.formula.tree,
            b.formula.tree,
            float_rounding=12,
            numeric_precision=30,
            timeout_seconds=None,
        )
    )


def _percentages(gold: Leaf, answer: Leaf) -> list[tuple[Leaf, Leaf]]:
    """math-verify's rule: n % equals n and n/100."""
    pairs = [(gold, answer)]
    if gold.percent and not answer.percent:
        pairs.append((_hundredth(gold), answer))
    if answer.percent and not gold.percent:
        pairs.append((gold, _hundredth(answer)))
    return pairs


def _hundredth(leaf: Leaf) -> Leaf:
    places = None if leaf.places is None else leaf.places + 2
    return Leaf(leaf.formula.scaled(Fraction(1, 100)), places, leaf.significant, True)


def _begins(decimal: Leaf, other: Leaf) -> bool:
    """Whether a decimal number is another number rounded or cut off: `0.333333` is 1/3."""
    value, exact = decimal.formula.exact, other.formula.real
    if decimal.places is None or value is None or exact is None:
        return False
    if decimal.places < PLACES or decimal.significant < SIGNIFICANT:
        return False
    scaled = exact * Fraction(10) ** decimal.places
    if scaled.denominator == 1:
        return False  # it could have been written exactly
    wanted = value * Fraction(10) ** decimal.places
    cut = int(scaled)  # towards zero
    return wanted in (round(scaled), cut)


def _same_region(gold: Region, answer: Region) -> Finding:
    if gold.name and answer.name and gold.name.lower() != answer.name.lower():
        return Finding(False, f"the unknowns differ: {gold.name} is not {answer.name}")
    if gold.points == answer.points:
        return Finding(True, "the same set of numbers")
    try:
        apart = sympy.SymmetricDifference(gold.points, answer.points).doit()
    except (TypeError, ValueError, NotImplementedError):
        return Finding(False, "the sets of numbers differ")
    same = apart.is_empty is True
    return Finding(same, "the same set of numbers" if same else "the sets of numbers differ")


def _same_equation(gold: Equation, answer: Equation) -> Finding:
    if gold.relation == "=" and answer.relation == "=":
        names = _alike(gold, answer)
        if names and gold.assigns and answer.assigns:
            found = _any(gold.value, answer.value)
            if found.equal:
                return found
    if gold.difference is None or answer.difference is None:
        return Finding(False, "the equations differ")
    sign = formulas.ratio(answer.difference, gold.difference)
    turned = {"<": ">", ">": "<", r"\leq": r"\geq", r"\geq": r"\leq"}
    relation = answer.relation
    if sign is not None and sign < 0:
        relation = turned.get(relation, relation)
    same = bool(sign) and relation == gold.relation
    if sign == 0 and relation == gold.relation == "=" and len(gold.difference.samples) > 1:
        same = True
    return Finding(same, "the same equation" if same else "the equations differ")


def _alike(gold: Equation, answer: Equation) -> bool:
    """Whether two equations are about the same thing. Prose names anything; `y` is `f(x)`."""
    names = {gold.name.lower(), answer.name.lower()}
    graph = "y" in names and any(re.fullmatch(r"[a-z]\([a-z]\)", name) for name in names)
    return len(names) == 1 or graph or gold.words or answer.words


def _same_list(gold: Several, answer: Several) -> Finding:
    if len(gold.items) != len(answer.items):
        return Finding(False, f"{len(gold.items)} values are not {len(answer.items)}")
    kinds = {gold.kind, answer.kind}
    if kinds <= {"bare", "set"}:
        return _same_set(gold, answer)
    interval = len(gold.items) == 2 and "square" in kinds and gold.kind != "bare"
    if "set" in kinds or (interval and len(kinds) > 1):
        return Finding(False, "the brackets differ")
    pairs = list(zip(_ordered(gold), _ordered(answer), strict=True))
    return _all(pairs, "the same values in the same order")


def _ordered(several: Several) -> list[tuple[Reading, ...]]:
    """The items; those of `y=2, x=1` by their names."""

    def name(item: tuple[Reading, ...]) -> str:
        return item[0].name if isinstance(item[0], Equation) else ""

    return sorted(several.items, key=name) if several.kind == "bare" else list(several.items)


def _same_set(gold: Several, answer: Several) -> Finding:
    left = list(answer.items)
    unknown: Finding | None = None
    for item in gold.items:
        for place, other in enumerate(left):
            found = _any(item, other)
            if found.equal:
                del left[place]
                break
            if found.equal is None:
                unknown = found
        else:
            return unknown or Finding(False, "one of the values is in one of the lists only")
    return Finding(True, "the same values")


def _same_table(gold: Table, answer: Table) -> Finding:
    if [len(row) for row in gold.rows] != [len(row) for row in answer.rows]:
        return Finding(False, "the matrices have different shapes")
    pairs = [
        pair for a, b in zip(gold.rows, answer.rows, strict=True) for pair in zip(a, b, strict=True)
    ]
    return _all(pairs, "the same matrix")


def _same_vector(table: Table, several: Several) -> Finding:
    """A matrix of one row or column, and a tuple."""
    cells = [cell for row in table.rows for cell in row]
    if several.kind in ("set", "bare") or (len(table.rows) > 1 and len(cells) > len(table.rows)):
        return Finding(False, "a matrix is no list")
    if len(cells) != len(several.items):
        return Finding(False, "the vectors have different lengths")
    return _all(list(zip(cells, several.items, strict=True)), "the same vector")
