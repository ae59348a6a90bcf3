r"""Reading what a box says: values, lists and tuples, intervals and sets, equations, words.

A text is read into all its plausible meanings (`1,234` is a number or a list of two, `(1,2)` a
point or an interval); `equality` compares meanings with meanings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product

import sympy

from elpo_ray.tasks.grading import formulas
from elpo_ray.tasks.grading.formulas import Formula
from elpo_ray.tasks.grading.leaves import LETTERS, leaves
from elpo_ray.tasks.grading.meanings import (
    Equation,
    Numeral,
    Reading,
    Region,
    Several,
    Span,
    Table,
    Words,
)
from elpo_ray.tasks.grading.notation import tidy
from elpo_ray.tasks.grading.regions import region, unknown_of
from elpo_ray.tasks.grading.splitting import (
    RELATION,
    enclosed,
    outside,
    relation_signs,
    split,
)
from elpo_ray.tasks.grading.units import bare, without_prose
from elpo_ray.tasks.grading.vocabulary import BASES, NAMED_SETS

MAX_PARTS = 60
"""A list of more parts is compared as text."""
WORD = r"(?:(?<![A-Za-z\\{])(?:and|or)(?![A-Za-z])|\\text\s*\{[\s,]*(?:and|or|,)[\s,]*\}|\\lor)"
COMMA = rf"(?:[,;]|\\\\(?![A-Za-z]))(?:\s*{WORD})?|{WORD}"
BASED = re.compile(r"([0-9A-Fa-f]+)\s*_\s*\{?\s*(?:\\text\s*\{\s*)?([0-9]+|[a-z]+)\s*\}?\s*\}?")
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
SPACED = re.compile(r"(?<![\d.,/])\d{1,3}(?: \d{3})+(?![\d,/])")
MATRIX = re.compile(
    r"\[?\(?\s*\\begin\s*\{([pbBvV]?matrix|smallmatrix|array)\}(?:\s*\{[lcr|\s]*\})?(.*)"
    r"\\end\s*\{\1\}\s*\)?\]?", re.DOTALL
)  # fmt: skip
WORD_OF_LETTERS = re.compile(r"([A-Za-z])(?!(?i:\1)(?![A-Za-z]))[A-Za-z]")
"""Letters that may be a word; `R-r` and `Vv` are formulas, whose letters have their case."""
WORDED = re.compile(r"\\(?:text|mbox|textbf|textit|textrm|mathrm)\s*\{")


def read(raw: str) -> tuple[Reading, ...]:
    """All meanings of the content of a box; at least its words."""
    text = tidy(raw)
    worded = WORDED.match(raw.strip().lstrip("$ ")) is not None
    if worded and LETTERS.fullmatch(text) and len(text) > 1:
        return (*_named_set(text), *_words(text))
    return _read(text)


def fold(text: str) -> str:
    """Words as they are compared."""
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", text)
    single = re.fullmatch(r"\(([A-Za-z]+)\)", text)
    text = single[1] if single else text
    return text.casefold() if LETTERS.fullmatch(text) and WORD_OF_LETTERS.search(text) else text


def _read(text: str) -> tuple[Reading, ...]:
    found: list[Reading] = [*_named_set(text)]
    for variant in _separated(text):
        found += _read_variant(variant)
    return (*found, *_words(text))


def _words(text: str) -> list[Words]:
    """A text as it stands, and without what introduces it."""
    return [Words(said) for said in dict.fromkeys((fold(text), fold(without_prose(text))))]


def _named_set(text: str) -> tuple[Reading, ...]:
    """A set that is named by words."""
    said = re.sub(r"\s+", " ", text.strip().lower())
    points = [region(name) for name, words in NAMED_SETS.items() if said in words]
    return tuple(Region(each) for each in points if each is not None)


def _separated(text: str) -> Iterator[str]:
    """The text with thousands written together; also as it is if commas were joined."""
    joined = SPACED.sub(lambda found: found[0].replace(" ", ""), text)
    free = outside(joined)
    spaced = ", " in joined
    pieces, last = [], 0
    for found in THOUSANDS.finditer(joined):
        if free[found.start()] or spaced:
            pieces += [joined[last : found.start()], found[0].replace(",", "")]
            last = found.end()
    together = "".join([*pieces, joined[last:]])
    yield together
    if together != joined and not re.search(r",0\d\d", joined):
        yield joined


def _read_variant(text: str) -> list[Reading]:
    parts = [piece for part in split(text, COMMA) for piece in _signs(part)]
    if len(parts) > MAX_PARTS or not all(part.strip() for part in parts):
        parts = [text] if "\\pm" not in text else []
    found: list[Reading] = []
    points = region(text)
    if points is not None:
        found.append(Region(points, unknown_of(text)))
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
    if not shared and not (
        alone and all(not isinstance(item[0], Equation) for item in items[1:] if item)
    ):
        return items
    return [list(i[0].value) if i and isinstance(i[0], Equation) else i for i in items]


def _signs(text: str) -> list[str]:
    r"""`1 \pm \sqrt{2}` as two texts; several `\pm` as all combinations."""
    count = len(re.findall(r"\\pm(?![a-z])", text))
    mixed = re.search(r"\\mp(?![a-z])", text) is not None
    if mixed and count == 0:
        return _signs(re.sub(r"\\mp(?![a-z])", r"\\pm", text))
    if count == 0 or count > 3:
        return [text]
    signed = []
    for signs in product("+-", repeat=count):
        if mixed and len(set(signs)) > 1:
            continue
        pieces = re.split(r"\\pm(?![a-z])", text)
        one = pieces[0] + "".join(map("".join, zip(signs, pieces[1:], strict=True)))
        one = re.sub(r"\\mp(?![a-z])", "-" if signs[0] == "+" else "+", one)
        signed.append(re.sub(r"(^|[=(,])\s*\+", r"\1 ", one))
    return signed


def _read_one(text: str) -> list[Reading]:
    """The meanings of a text without separators outside brackets."""
    matrix = MATRIX.fullmatch(text.strip())
    if matrix and "vmatrix" not in matrix[1].lower() and r"\begin" not in matrix[2]:
        return [_table(matrix[2])]
    based = BASED.fullmatch(text.strip())
    if (
        based
        and based[2]
        and (based[2].isdigit() or based[2] in BASES)
        and re.search(r"\d", based[1])
    ):
        return [Numeral(based[1].upper(), BASES.get(based[2], based[2]))]
    found = _bracketed(text.strip())
    if found:
        return found
    relations = _relation(text)
    if relations:
        return relations
    shorter = bare(text).text
    within = _bracketed(shorter) if shorter != text else []
    if within:
        return within
    if LETTERS.fullmatch(text) and len(text) > (2 if text.isupper() else 3):
        return []
    return leaves(text)


def _table(body: str) -> Table:
    rows = [row for row in re.split(r"\\\\", body) if row.strip()]
    return Table(tuple(tuple(_read(cell.strip()) for cell in row.split("&")) for row in rows))


def _bracketed(text: str) -> list[Reading]:
    """A tuple, set or interval; empty if the text is not in brackets as a whole."""
    found = re.fullmatch(r"(\\\{|\\langle|[(\[\]])(.*)(\\\}|\\rangle|[)\]\[])", text, re.DOTALL)
    if not found or not enclosed(text, found[1]):
        return []
    opening, closing = found[1], found[3]
    items = split(found[2], r"[,;]" if r"\mid" not in found[2] else "(?!)")
    kind = {"\\{\\}": "set", "()": "round", "[]": "square", "\\langle\\rangle": "angle"}.get(
        opening + closing
    )
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
        whole = [
            tuple(tuple(_read(item.strip())) for item in chosen) for chosen in product(*choices)
        ]
        flat = tuple((Several(kind, items),) for items in whole)  # type: ignore[arg-type]
        readings.append(Several("bare", flat))
    if len(items) == 2 and opening in "([]" and closing in ")][":
        ends = [tuple(_read(item.strip())) for item in items]
        readings.append(Span(ends[0], ends[1], (opening == "[", closing == "]")))
    return readings


def _relation(text: str) -> list[Reading]:
    parts = [part.strip() for part in split(text, RELATION)]
    if len(parts) < 2 or not all(parts):
        return []
    signs = relation_signs(text)
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


def _equation(parts: list[str], signs: list[str]) -> Equation:
    left, right = parts[0], parts[-1]
    if _is_name(right) and not _is_name(left) and len(parts) == 2 and signs == ["="]:
        left, right = right, left
    difference = _difference(parts[-2], parts[-1]) if signs[-1] == "=" else None
    words = bool(re.search(r"\\text|[A-Za-z]{3,}", re.sub(r"\\(?!text)[A-Za-z]+", "", left)))
    letters = set(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+|_\{?\w+\}?", "", left)))
    assigns = _is_name(left) or words or r"\in" in signs or len(letters) != 1
    sum_or_product = re.fullmatch(r"[xyz](?:[\s+]*[xyz])*", left)
    curve = len(letters & set("xyz")) > 1 and not (
        words or _is_name(left) or sum_or_product or re.search(r"d[xyz]|\w'", left)
    )
    return Equation("=", fold(left), _read(right), difference, assigns, words, curve)


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
