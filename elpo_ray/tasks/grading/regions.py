"""Sets of real numbers: intervals, inequalities and what set signs make of them."""

from __future__ import annotations

import re
from fractions import Fraction

import sympy

from elpo_ray.tasks.grading import formulas
from elpo_ray.tasks.grading.leaves import number
from elpo_ray.tasks.grading.splitting import RELATION, relation_signs, split

EITHER = r"\\cup|\\lor|\\text\s*\{[\s,]*or[\s,]*\}|(?<![A-Za-z\\{])or(?![A-Za-z])"
BOTH = r"\\cap|\\land|\\text\s*\{[\s,]*and[\s,]*\}|(?<![A-Za-z\\{])and(?![A-Za-z])"
UNKNOWN = re.compile(
    r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])"
    r"|\\(?:alpha|beta|gamma|delta|theta|lambda|mu|rho|sigma|tau|phi|omega)(?![a-z])"
)
NUMBER_SETS = {"R": sympy.S.Reals, "Z": sympy.S.Integers, "N": sympy.S.Naturals,
               "Q": sympy.S.Rationals, "C": sympy.S.Complexes}  # fmt: skip


def region(text: str) -> sympy.Set | None:
    """The set of real numbers that a text describes by intervals, inequalities and set signs; None
    if it describes none."""
    if not re.search(
        r"\\(?:cup|cap|setminus|emptyset|infty|leq|geq|neq|lor|land|mathbb|mid)|[<>]|^\s*[(\[\]].*[)\]\[]\s*$",
        text,
    ):
        return None
    try:
        return _region(text.strip(), 0)
    except (TypeError, ValueError, NotImplementedError, AttributeError):
        return None


def _region(text: str, depth: int) -> sympy.Set | None:
    if depth > 6 or not text:
        return None
    text = re.sub(r"^(?:[A-Za-z]\s*\\in|[A-Za-z]\s*=)\s*(?=[\\(\[\]])", "", text)
    for separators in (EITHER, "[,;]", BOTH):
        parts = [part.strip() for part in split(text, separators)]
        if len(parts) > 1:
            sets = [_region(part, depth + 1) for part in parts]
            if any(each is None for each in sets):
                return None
            conditions = all(re.match(r"[(\[\]\\]", part) is None for part in parts)
            if separators == BOTH or (separators != EITHER and conditions):
                both = sympy.Intersection(*sets)
                if separators == BOTH or both is not sympy.S.EmptySet:
                    return both
            return sympy.Union(*sets)
    parts = split(text, r"\\setminus|(?<=\})\s*-\s*(?=\\\{)|(?<=\))\s*-\s*(?=\\\{)")
    if len(parts) > 1:
        sets = [_region(part.strip(), depth + 1) for part in parts]
        return None if None in sets else sympy.Complement(sets[0], sympy.Union(*sets[1:]))
    return _simple_region(text, depth)


def _simple_region(text: str, depth: int) -> sympy.Set | None:
    if text == r"\emptyset":
        return sympy.S.EmptySet
    if found := re.fullmatch(r"\\mathbb\{([RZNQC])\}(?:\^\{?([+-]|\*)\}?|_\{?([+-])\}?)?", text):
        points = NUMBER_SETS[found[1]]
        sign = found[2] or found[3]
        sides = {"+": sympy.Interval.open(0, sympy.oo), "-": sympy.Interval.open(-sympy.oo, 0)}
        if sign == "*":
            return sympy.Complement(points, sympy.FiniteSet(0))
        return sympy.Intersection(points, sides[sign]) if sign else points
    if found := re.fullmatch(
        r"\\\{\s*([A-Za-z])\s*(?:\\in\s*\\mathbb\{R\}\s*)?(?:\\mid|:|\|)\s*(.*)\\\}", text
    ):
        conditions = re.sub(
            r"(?:,|\\text\{\s*and\s*\})?\s*[A-Za-z]\s*\\in\s*\\mathbb\{R\}\s*,?", "", found[2]
        )
        return _region(conditions.strip(), depth + 1)
    if found := re.fullmatch(r"\\\{(.*)\\\}", text):
        ends = [_end(part) for part in split(found[1], ",")]
        return None if None in ends else sympy.FiniteSet(*ends)
    if found := re.fullmatch(r"([(\[\]])(.*)([)\]\[])", text):
        parts = split(found[2], "[,;]")
        if len(parts) == 2:
            low, high = map(_end, parts)
            if low is None or high is None or not low < high:
                return None
            return sympy.Interval(low, high, found[1] != "[", found[3] != "]")
    return _inequality(text)


def _inequality(text: str) -> sympy.Set | None:
    signs, parts = relation_signs(text), [part.strip() for part in split(text, RELATION)]
    if not signs or not set(signs) <= {"=", "<", ">", r"\leq", r"\geq", r"\neq"} or len(parts) > 3:
        return None
    unknown = unknown_of(text)
    if unknown is None:
        return None
    sets = [_one_inequality(parts[i], signs[i], parts[i + 1]) for i in range(len(signs))]
    return None if any(each is None for each in sets) else sympy.Intersection(*sets)


def _one_inequality(left: str, sign: str, right: str) -> sympy.Set | None:
    if _end(left) is not None and _end(right) is None:
        turned = {"<": ">", ">": "<", r"\leq": r"\geq", r"\geq": r"\leq"}.get(sign, sign)
        return _one_inequality(right, turned, left)
    bound = _end(right)
    if bound is None:
        return None
    if re.fullmatch(r"[A-Za-z]|\\[a-z]+", left):
        return {
            "=": lambda: sympy.FiniteSet(bound),
            "<": lambda: sympy.Interval.open(-sympy.oo, bound),
            ">": lambda: sympy.Interval.open(bound, sympy.oo),
            r"\leq": lambda: sympy.Interval(-sympy.oo, bound),
            r"\geq": lambda: sympy.Interval(bound, sympy.oo),
            r"\neq": lambda: sympy.Complement(sympy.S.Reals, sympy.FiniteSet(bound)),
        }[sign]()
    tree = formulas.parse(left)
    if not isinstance(tree, sympy.Expr) or len(tree.free_symbols) != 1 or not bound.is_finite:
        return None
    kinds = {"<": sympy.Lt, ">": sympy.Gt, r"\leq": sympy.Le, r"\geq": sympy.Ge, r"\neq": sympy.Ne}
    solved = sympy.solveset(kinds[sign](tree, bound), next(iter(tree.free_symbols)), sympy.S.Reals)
    return _rounded(solved)


def _rounded(points: sympy.Set) -> sympy.Set | None:
    """The set with its irrational ends rounded as `_end` rounds them."""
    if isinstance(points, sympy.Union):
        parts = [_rounded(part) for part in points.args]
        return None if None in parts else sympy.Union(*parts)
    if isinstance(points, sympy.Interval):
        low, high = (_round_end(end) for end in (points.start, points.end))
        return sympy.Interval(low, high, points.left_open, points.right_open)
    if isinstance(points, sympy.FiniteSet):
        return sympy.FiniteSet(*map(_round_end, points.args))
    return points if points in (sympy.S.EmptySet, sympy.S.Reals) else None


def _round_end(end: sympy.Expr) -> sympy.Expr:
    made = formulas.evaluated("", end) if end.is_finite else None
    return end if made is None else _as_end(made.real)


def _end(text: str) -> sympy.Expr | None:
    """The end of an interval: a real number, or an infinite one; None of anything else."""
    text = text.strip()
    if found := re.fullmatch(r"([-+]?)\s*\\infty", text):
        return -sympy.oo if found[1] == "-" else sympy.oo
    leaf = number(text)
    made = leaf.formula if leaf else formulas.formula(text)
    return None if made is None else _as_end(made.real)


def _as_end(value: Fraction | None) -> sympy.Expr | None:
    if value is None:
        return None
    if value.denominator.bit_length() > 150:
        value = Fraction(round(value * 10**50), 10**50)
    return sympy.Rational(value.numerator, value.denominator)


def unknown_of(text: str) -> str | None:
    """The one unknown of inequalities; None if there are none or several."""
    text = re.sub(r"\\text\s*\{[^{}]*\}|\\mathbb\{\w\}|\b(?:or|and)\b", " ", text)
    names = set(UNKNOWN.findall(text)) - {"e", "i", r"\pi"}
    return names.pop() if len(names) == 1 else None
