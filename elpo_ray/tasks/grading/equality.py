r"""Mathematical equality of two short LaTeX answers, by math-verify.

Runs in a process of its own (`child`): symbolic work can take for ever, eat all memory or overflow
the stack, and nothing inside a process can stop all of that. Invariant: an answer that is far
larger than any answer is different, not undecidable, so that no model hides behind its size.
"""

from __future__ import annotations

import logging
import re

from math_verify import parse, verify
from sympy import Expr, UnevaluatedExpr

MAX_CHARS = 1000
"""A longer answer is compared as text only (or one of 20 times the gold answer's length)."""
MAX_DEPTH = 12
"""So is one with deeper brackets (or 8 deeper than those of the gold answer): reading LaTeX takes
time exponential in the depth."""
FAR = 1e-4
"""Relative distance of values beyond any rounding that counts as equal."""
UNICODE = str.maketrans({"−": "-", "–": "-", "°": r"^\circ ", "π": r"\pi ", "∞": r"\infty ",
                         "×": r"\times ", "·": r"\cdot ", "\xa0": " "})  # fmt: skip
INVISIBLE = re.compile(r"(?<!\\)\\(?:[,;:!> ]|(?:q?quad|displaystyle|left|right)(?![a-zA-Z]))|~")
THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?:(?:\{,\}|,? | ?, ?(?=\d{3}))\d{3})+(?![\d,])")
WRAPPED = re.compile(r"\$+([^$]*)\$+|\\\((.*)\\\)|\\\[(.*)\\\]", re.DOTALL)
WORDS = re.compile(r"\\(?:text|mbox|textbf|textit|mathrm|textrm)\{([^{}]*)\}")
UNITS = re.compile(
    r"(?<=[\d}])\s*(?!.*\b(?:dozen|hundred|thousand|[mbtr]illion|percent|or|and|to)s?\b)"
    r"(?:[A-Za-z]{2,}\.?\s*)+"
)
NUMERAL = re.compile(r"([0-9A-F]+)_\{?([0-9]+|[a-z]+)\}?")
BASES = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
         "eight": "8", "nine": "9", "ten": "10", "twelve": "12", "sixteen": "16"}  # fmt: skip

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that we keep the time
logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)


def equal(gold: str, answer: str) -> bool:
    """Whether `answer` is `gold` in another form. May not return: the caller keeps the time."""
    too_large = _too_large(answer, gold)
    if too_large or gold == answer:
        return gold == answer
    gold, answer = shown(gold), shown(answer)
    if compact(gold) == compact(answer):
        return True
    numeral = NUMERAL.fullmatch(compact(gold))
    if numeral:
        return _same_numeral(numeral, compact(answer))
    if not re.search("[A-Za-z]", gold):  # a bare number: its unit is in the question
        answer = _without_units(answer)
        if compact(gold) == compact(answer):
            return True
    left, right = (parse(rf"\boxed{{{text}}}", parsing_timeout=None) for text in (gold, answer))
    if left and right and _far_apart(left[0], right[0]):
        return False
    return bool(verify(left, right, timeout_seconds=None))


def _far_apart(a: object, b: object) -> bool:
    """Whether two expressions in the same unknowns clearly differ in value at some point. Spares
    most wrong answers a symbolic simplification."""
    if not isinstance(a, Expr) or not isinstance(b, Expr):
        return False
    if a.has(UnevaluatedExpr) or b.has(UnevaluatedExpr):  # percentages: 9 % may stand for 9
        return False
    unknowns = [{str(symbol) for symbol in side.free_symbols} for side in (a, b)]
    if unknowns[0] and unknowns[0] != unknowns[1]:  # the same unknowns may be spelt differently
        return False
    value = {name: 0.5 + 0.618034 * i % 1 for i, name in enumerate(sorted(unknowns[1]))}
    try:
        x, y = (
            complex(side.subs({s: value[str(s)] for s in side.free_symbols}).evalf())
            for side in (a, b)
        )
    except (TypeError, ValueError, ArithmeticError, AttributeError):
        return False  # not a number there
    return abs(x - y) > FAR * max(abs(x), abs(y), FAR)


def shown(text: str) -> str:
    """`text` without what LaTeX does not show, and with thousands written together."""
    text = text.translate(UNICODE).strip().rstrip(".").strip()
    wrapped = WRAPPED.fullmatch(text)
    if wrapped:
        text = next(group for group in wrapped.groups() if group is not None)
    text = re.sub(r"\s+", " ", INVISIBLE.sub(" ", text)).strip()
    text = text.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")
    return THOUSANDS.sub(lambda found: re.sub(r"\D", "", found.group()), text)


def compact(text: str) -> str:
    """The text to compare: without wrappers, with spaces only between two words or numbers."""
    return re.sub(r"(?<!\w) | (?!\w)", "", WORDS.sub(r" \1 ", text)).strip()


def _too_large(answer: str, gold: str) -> bool:
    if len(answer) > max(MAX_CHARS, 20 * len(gold)):
        return True
    return _depth(answer) > max(MAX_DEPTH, _depth(gold) + 8)


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _same_numeral(gold: re.Match[str], answer: str) -> bool:
    """The same digits in the same base; the base may be left out."""
    found = NUMERAL.fullmatch(answer)
    if found is None:
        return answer == gold[1]
    bases = [BASES.get(base, base) for base in (gold[2], found[2])]
    return found[1] == gold[1] and bases[0] == bases[1]


def _without_units(answer: str) -> str:
    """`5 apples` as 5; but `5 thousand` and `5 or 6` as they are."""
    found = UNITS.search(answer)
    return answer[: found.start()] if found and found.end() == len(answer) else answer
