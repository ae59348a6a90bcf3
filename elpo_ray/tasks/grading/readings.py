r"""What a box can say: numbers and formulas, lists and tuples, intervals and sets, equations, words.

A text is read into all its plausible meanings (`1,234` is a number or a list of two, `(1,2)` a
point or an interval); `equality` compares meanings with meanings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import Literal

import sympy

from elpo_ray.tasks.grading import formulas
from elpo_ray.tasks.grading.formulas import Formula
from elpo_ray.tasks.grading.notation import tidy
from elpo_ray.tasks.grading.units import Bare, bare, without_prose

MAX_PARTS = 60
"""A list of more parts is compared as text."""
OPENING, CLOSING = "([{", ")]}"
BRACKET = re.compile(r"\\[{}]|\\(?:langle|rangle|begin|end)(?![A-Za-z])|[()\[\]{}]")
WORD = r"(?:(?<![A-Za-z\\{])(?:and|or)(?![A-Za-z])|\\text\s*\{[\s,]*(?:and|or)[\s,]*\}|\\lor)"
COMMA = rf"(?:[,;]|\\\\(?![A-Za-z]))(?:\s*{WORD})?|{WORD}"
EITHER = r"\\cup|\\lor|\\text\s*\{[\s,]*or[\s,]*\}|(?<![A-Za-z\\{])or(?![A-Za-z])"
BOTH = r"\\cap|\\land|\\text\s*\{[\s,]*and[\s,]*\}|(?<![A-Za-z\\{])and(?![A-Za-z])"
RELATION = r"\\leq|\\geq|\\neq|\\approx|\\in(?![a-z])|:=|[=<>]"
NUMBER = re.compile(r"([-+]?)\s*(\d+(?:\.\d*)?|\.\d+)")
SCIENTIFIC = re.compile(
    r"([-+]?)\s*(\d+(?:\.\d*)?|\.\d+)(?:\s*[eE]\s*([-+]?\d+)"
    r"|\s*(?:\\times|\\cdot)\s*10\s*\^\s*\{\s*([-+]?\s*\d+)\s*\})"
)
POWER_OF_TEN = re.compile(r"([-+]?)()()10\s*\^\s*\{\s*([-+]?\s*\d+)\s*\}")
RATIO = re.compile(r"([-+]?)\s*(?:(\d+)\s*/\s*(\d+)|\\frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(-?\d+)\s*\})")
BASED = re.compile(r"([0-9A-Fa-f]+)\s*_\s*\{?\s*(?:\\text\s*\{\s*)?([0-9]+|[a-z]+)\s*\}?\s*\}?")
BASES = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
         "eight": "8", "nine": "9", "ten": "10", "twelve": "12", "sixteen": "16"}  # fmt: skip
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
SPACED = re.compile(r"(?<![\d.,/])\d{1,3}(?: \d{3})+(?![\d,/])")
MATRIX = re.compile(
    r"\[?\(?\s*\\begin\s*\{([pbBvV]?matrix|smallmatrix|array)\}(?:\s*\{[lcr|\s]*\})?(.*)"
    r"\\end\s*\{\1\}\s*\)?\]?", re.DOTALL
)  # fmt: skip
WORDED = re.compile(r"\\(?:text|mbox|textbf|textit|textrm|mathrm)\s*\{")
LETTERS = re.compile(r"[A-Za-z][A-Za-z' .-]*")
NAMES = {
    "no solution": r"\emptyset", "no solutions": r"\emptyset", "empty set": r"\emptyset",
    "no real solution": r"\emptyset", "no real solutions": r"\emptyset",
    "the empty set": r"\emptyset", "all real numbers": r"\mathbb{R}", "all reals": r"\mathbb{R}",
    "real numbers": r"\mathbb{R}",
}  # fmt: skip
NUMBER_SETS = {"R": sympy.S.Reals, "Z": sympy.S.Integers, "N": sympy.S.Naturals, "Q": sympy.S.Rationals,
               "C": sympy.S.Complexes}  # fmt: skip


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


@dataclass(frozen=True)
class Table:
    """A matrix."""

    rows: tuple[tuple[tuple[Reading, ...], ...], ...]


Reading = Words | Numeral | Leaf | Several | Span | Region | Equation | Table


def read(raw: str) -> tuple[Reading, ...]:
    """All meanings of the content of a box; at least its words."""
    text = tidy(raw)
    worded = WORDED.match(raw.strip().lstrip("$ ")) is not None
    if worded and LETTERS.fullmatch(text) and len(text) > 1:
        return (*_named_set(text), Words(fold(text)))
    return _read(text)


def fold(text: str) -> str:
    """Words as they are compared."""
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", text)
    single = re.fullmatch(r"\(([A-Za-z]+)\)", text)
    text = single[1] if single else text
    return text.casefold() if LETTERS.fullmatch(text) and len(text) != 1 else text


def _read(text: str) -> tuple[Reading, ...]:
    found: list[Reading] = [*_named_set(text)]
    for variant in _separated(text):
        found += _read_variant(variant)
    words = [fold(text), fold(without_prose(text))]
    return (*found, *map(Words, dict.fromkeys(words)))


def _named_set(text: str) -> tuple[Reading, ...]:
    """A set that is named by words."""
    name = NAMES.get(re.sub(r"\s+", " ", text.strip().lower()))
    points = None if name is None else region(name)
    return () if points is None else (Region(points),)


def _separated(text: str) -> Iterator[str]:
    """The text with thousands written together; also as it is if commas were joined."""
    joined = SPACED.sub(lambda found: found[0].replace(" ", ""), text)
    outside = _outside(joined)
    spaced = ", " in joined
    pieces, last = [], 0
    for found in THOUSANDS.finditer(joined):
        if outside[found.start()] or spaced:
            pieces += [joined[last : found.start()], found[0].replace(",", "")]
            last = found.end()
    together = "".join([*pieces, joined[last:]])
    yield together
    if together != joined:
        yield joined


def _outside(text: str) -> list[bool]:
    """For each place, whether it is outside all brackets."""
    depth, outside = 0, []
    for character in text:
        depth += character in OPENING
        outside.append(depth == 0)
        depth -= character in CLOSING
    return outside


def _read_variant(text: str) -> list[Reading]:
    parts = [piece for part in split(text, COMMA) for piece in _signs(part)]
    if len(parts) > MAX_PARTS or not all(part.strip() for part in parts):
        parts = [text] if "\\pm" not in text else []
    found: list[Reading] = []
    points = region(text)
    if points is not None:
        found.append(Region(points, _unknown_of(text)))
    if len(parts) > 1:
        items = [[*_read_one(part.strip()), Words(fold(part))] for part in parts]
        found.append(Several("bare", tuple(map(tuple, _without_shared_name(items)))))
    elif parts:
        found += _read_one(parts[0].strip())
    return found


def _without_shared_name(items: list[list[Reading]]) -> list[list[Reading]]:
    """`n=3, 5, 7` as `3, 5, 7`; `x=5, x=100` as `5, 100`."""
    names = {
        reading.name if isinstance(reading, Equation) and reading.assigns else None
        for item in items
        for reading in item[:1]
    }
    first = items[0][0] if items[0] else None
    shared = len(names) == 1 and None not in names
    alone = len(names) == 2 and None in names and isinstance(first, Equation)
    if not shared and not (alone and all(not isinstance(item[0], Equation) for item in items[1:] if item)):
        return items
    return [list(i[0].value) if i and isinstance(i[0], Equation) else i for i in items]


def _signs(text: str) -> list[str]:
    r"""`1 \pm \sqrt{2}` as two texts; several `\pm` as all combinations."""
    count = len(re.findall(r"\\pm(?![a-z])", text))
    mixed = re.search(r"\\mp(?![a-z])", text) is not None
    if count == 0 or count > 3:
        return [text]
    signed = []
    for signs in product("+-", repeat=count):
        if mixed and len(set(signs)) > 1:
            continue
        chosen = iter(signs)
        one = re.sub(r"\\pm(?![a-z])", lambda found: next(chosen), text)
        one = re.sub(r"\\mp(?![a-z])", "-" if signs[0] == "+" else "+", one)
        signed.append(re.sub(r"(^|[=(,])\s*\+", r"\1 ", one))
    return signed


def split(text: str, separators: str) -> list[str]:
    """The parts of a text between separators that stand outside all brackets."""
    pattern = re.compile(rf"(?P<bracket>{BRACKET.pattern})|(?P<separator>{separators})")
    depth, last, parts = 0, 0, []
    for found in pattern.finditer(text):
        if found["bracket"] is not None:
            mark = found["bracket"].lstrip("\\") or found["bracket"]
            depth += (mark in OPENING or mark in ("langle", "begin")) and mark != ""
            depth -= mark in CLOSING or mark in ("rangle", "end")
        elif depth == 0:
            parts.append(text[last : found.start()])
            last = found.end()
    return [*parts, text[last:]]


def _read_one(text: str) -> list[Reading]:
    """The meanings of a text without separators outside brackets."""
    matrix = MATRIX.fullmatch(text.strip())
    if matrix and "vmatrix" not in matrix[1].lower() and r"\begin" not in matrix[2]:
        return [_table(matrix[2])]
    based = BASED.fullmatch(text.strip())
    if based and based[2] and (based[2].isdigit() or based[2] in BASES) and re.search(r"\d", based[1]):
        return [Numeral(based[1].upper(), BASES.get(based[2], based[2]))]
    found = _bracketed(text.strip())
    if found:
        return found
    relations = _relation(text)
    return relations or _leaf(text)


def _table(body: str) -> Table:
    rows = [row for row in re.split(r"\\\\", body) if row.strip()]
    return Table(tuple(tuple(_read(cell.strip()) for cell in row.split("&")) for row in rows))


def _bracketed(text: str) -> list[Reading]:
    """A tuple, set or interval; empty if the text is not in brackets as a whole."""
    found = re.fullmatch(r"(\\\{|\\langle|[(\[\]])(.*)(\\\}|\\rangle|[)\]\[])", text, re.DOTALL)
    if not found or not _whole(text, found[1]):
        return []
    opening, closing = found[1], found[3]
    items = split(found[2], r"[,;]" if r"\mid" not in found[2] else "(?!)")
    kind = {"\\{\\}": "set", "()": "round", "[]": "square", "\\langle\\rangle": "angle"}.get(opening + closing)
    if len(items) > MAX_PARTS or not all(item.strip() for item in items):
        return []
    if kind == "set":
        items = [part for item in items for part in split(item, COMMA)]
    if kind == "set" and len(items) == 1:
        items = [item for item in _signs(items[0]) if item.strip()]
    if kind == "set" and re.search(r"\\mid|:", found[2]):
        return []
    if len(items) == 1 and kind in ("round", "square", "angle"):
        return _read_one(items[0].strip()) if kind == "round" else []
    readings: list[Reading] = []
    choices = [[*_signs(item)] for item in items]
    if kind is not None and all(len(choice) == 1 for choice in choices):
        readings.append(Several(kind, tuple(tuple(_read(item.strip())) for item in items)))  # type: ignore[arg-type]
    elif kind is not None:
        whole = [tuple(tuple(_read(item.strip())) for item in chosen) for chosen in product(*choices)]
        flat = tuple((Several(kind, items),) for items in whole)  # type: ignore[arg-type]
        readings.append(Several("bare", flat))
    if len(items) == 2 and opening in "([]" and closing in ")][":
        ends = [tuple(_read(item.strip())) for item in items]
        readings.append(Span(ends[0], ends[1], (opening == "[", closing == "]")))
    return readings


def _whole(text: str, opening: str) -> bool:
    """Whether the first bracket is closed by the last one. `]1,2[` is taken as it looks."""
    if opening == "]":
        return text.endswith(("[", "]", ")"))
    depth = 0
    for found in BRACKET.finditer(text):
        mark = found[0].lstrip("\\")
        if text.endswith("[") and found.end() == len(text):
            return depth == 1
        depth += 1 if mark in ("(", "[", "{", "langle", "begin") else -1
        if depth == 0:
            return found.end() == len(text)
    return False


def _relation(text: str) -> list[Reading]:
    parts = [part.strip() for part in split(text, RELATION)]
    if len(parts) < 2 or not all(parts):
        return []
    signs = _relation_signs(text)
    if r"\approx" in signs:
        readings: list[Reading] = []
        for part in split(text, r"\\approx"):
            readings += _read_one(part.strip())
        return readings
    if set(signs) <= {"=", ":=", r"\in"}:
        return [_equation(parts, signs)]
    left, right = parts[0], parts[-1]
    if len(parts) != 2:
        return []
    sign = signs[0]
    return [Equation(sign, left, _read(right), _difference(left, right), assigns=False)]


def _relation_signs(text: str) -> list[str]:
    """The signs outside brackets, in order."""
    signs: list[str] = []
    pattern = re.compile(rf"(?P<bracket>{BRACKET.pattern})|(?P<sign>{RELATION})")
    depth = 0
    for found in pattern.finditer(text):
        if found["bracket"] is not None:
            mark = found["bracket"].lstrip("\\")
            depth += 1 if mark in ("(", "[", "{", "langle", "begin") else -1
        elif depth == 0:
            signs.append(found["sign"])
    return signs


def _equation(parts: list[str], signs: list[str]) -> Equation:
    left, right = parts[0], parts[-1]
    if _is_name(right) and not _is_name(left) and len(parts) == 2 and signs == ["="]:
        left, right = right, left
    difference = _difference(parts[-2], parts[-1]) if signs[-1] == "=" else None
    words = bool(re.search(r"\\text|[A-Za-z]{3,}", re.sub(r"\\(?!text)[A-Za-z]+", "", left)))
    letters = set(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+|_\{?\w+\}?", "", left)))
    assigns = _is_name(left) or words or r"\in" in signs or len(letters) != 1
    return Equation("=", fold(left), _read(right), difference, assigns, words)


def _is_name(text: str) -> bool:
    """Whether a text only names something: `x`, `x_1`, `f(x)`, `\\angle ABC`, `|AB|`."""
    text = text.strip()
    return (
        re.fullmatch(
            r"\|?(?:\\(?:angle|triangle|overline|widehat|hat|vec|bar|operatorname|text)\s*)?\{?"
            r"(?:\\[A-Za-z]+|[A-Za-z]{1,4})'?\}?(?:_\s*(?:\{[^{}]*\}|\w))?\|?(?:\s*\([^()]*\))?",
            text,
        )
        is not None
        or re.fullmatch(r"\([A-Za-z](?:\s*,\s*[A-Za-z])*\)", text) is not None
    )


def _difference(left: str, right: str) -> Formula | None:
    a, b = formulas.parse(left), formulas.parse(right)
    if not isinstance(a, sympy.Expr) or not isinstance(b, sympy.Expr):
        return None
    tree = sympy.Add(a, sympy.Mul(sympy.Integer(-1), b, evaluate=False), evaluate=False)
    return formulas.evaluated(f"{left}-({right})", tree)


# --- one value ------------------------------------------------------------------------------------


def _leaf(text: str) -> list[Reading]:
    text = without_prose(text)
    found = bare(text)
    readings: list[Reading] = []
    if found.letters:
        whole = formulas.formula(text)
        readings += [Leaf(whole)] if whole else []
    if found.text != text and _bracketed(found.text):
        return _bracketed(found.text)
    readings += _value(found)
    letters = LETTERS.fullmatch(text)
    if letters and len(text) > 3 and not _is_name(text):
        return []
    return readings


def _value(found: Bare) -> list[Reading]:
    leaf = _number(found.text)
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
        made.append(
            Leaf(formula, places, each.significant, found.percent, found.touching, each.plain)
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


def _number(text: str) -> Leaf | None:
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


# --- sets of real numbers -------------------------------------------------------------------------


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
        conditions = re.sub(r"(?:,|\\text\{\s*and\s*\})?\s*[A-Za-z]\s*\\in\s*\\mathbb\{R\}\s*,?", "", found[2])
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
    signs, parts = _relation_signs(text), [part.strip() for part in split(text, RELATION)]
    if not signs or not set(signs) <= {"<", ">", r"\leq", r"\geq", r"\neq"} or len(parts) > 3:
        return None
    unknown = _unknown_of(text)
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
    leaf = _number(text)
    made = leaf.formula if leaf else formulas.formula(text)
    return None if made is None else _as_end(made.real)


def _as_end(value: Fraction | None) -> sympy.Expr | None:
    if value is None:
        return None
    if value.denominator.bit_length() > 150:
        value = Fraction(round(value * 10**50), 10**50)
    return sympy.Rational(value.numerator, value.denominator)


def _unknown_of(text: str) -> str | None:
    """The one unknown of inequalities; None if there are none or several."""
    names = set(re.findall(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])", re.sub(r"\\text\s*\{[^{}]*\}|\\mathbb\{\w\}|\b(?:or|and)\b", " ", text)))
    return names.pop() if len(names) == 1 else None
