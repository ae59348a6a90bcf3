r"""What stands around a value: percent signs, degrees, units, currencies, words of prose.

A value is what is left without them: the question has named the unit, so an answer may leave it
out; where both sides write one, `measures` compares them. What changes the value (`18 thousand`,
`5 or 6`, `not 5`) is no unit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from elpo_ray.tasks.grading.vocabulary import (
    MULTIPLIERS,
    NO_UNIT,
    UNIT_LETTERS,
    UNITS,
    UNSURE_UNITS,
)

CURRENCY = re.compile(
    r"^([-+]?)\s*(?:US|A|C|HK)?\s*(?:\\\$|[$€£¥₹₩]|(?:USD|EUR|GBP|Rs\.?|INR)\s)\s*(?=[-\d.(\\])"
)
CURRENCY_AFTER = re.compile(r"(?<=[\d)}])\s*(?:\\\$|[$€£¥₹₩¢])$")
PERCENT = re.compile(
    r"(?<=[\d)}A-Za-z])\s*(?:\\%|%|\\text\s*\{\s*(?:\\?%|per\s?cent|percentage|pct)\.?\s*\}"
    r"|(?<![A-Za-z])(?:per\s?cent|pct))(?:\s+(?:points?|chance))?$"
)
DEGREES = re.compile(
    r"(?<=[\d)}])\s*(?:\^\{\\circ\}\s*(?:\\text\s*\{\s*[CFK]\s*\}|[CFK](?![A-Za-z]))?"
    r"|\\circ|(?:deg|degs|degrees?)(?:\s+(?:Celsius|Fahrenheit|Kelvin|C|F))?)$",
    re.IGNORECASE,
)
MULTIPLIED = re.compile(
    r"(?<=[\d)}])\s*(?:\\text\s*\{\s*)?(dozen|hundred|thousand|million|billion|trillion)s?"
    r"(?:\s+(?!and\b|or\b|to\b|dozen|hundred|thousand|million|billion|trillion)[A-Za-z]+){0,3}\s*\}?$",
    re.IGNORECASE,
)
POWER = r"(?:\s*\^\s*(?:\{\s*-?\s*\d+\s*\}|-?\d+))?"
TOKEN = re.compile(
    r"(?P<gap>\s*)(?P<join>/|\\cdot|\\times)?\s*"
    r"(?:(?:\\mu\s*)?\\text\s*\{(?P<text>[^{}]*(?:\{[^{}]*\}[^{}]*)*)\}|(?P<word>(?:\\mu\s*)?(?:[kM]?\\Omega|\\AA|(?<![A-Za-z\\])[A-Za-z]++))\.?)"
    rf"(?P<power>{POWER})$"
)
GROUPED = re.compile(r"/\s*\(([^()]*)\)$")
_BRACED = r"\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}"
FRACTION = re.compile(rf"(?<=[\d)}}])\s*\\frac\s*{_BRACED}\s*{_BRACED}$")
WORDS = re.compile(r"(?<=[\d)}])\s+([A-Za-z]{2,}\.?(?:[\s-]+[A-Za-z]+\.?)*)$")
BEFORE = re.compile(
    r"^(?:\\text\s*\{(?P<text>[^{}]*)\}\s*:?"
    r"|(?P<words>[A-Za-z]{2,}[A-Za-z' ]*?[ :])(?=\s*[-+\d.(\\$|\[A-Z]))\s*"
)
INTRODUCES = re.compile(
    r"(?:\b(?:is|are|be|equals?|equal to|answer|approximately|about|exactly|roughly|total|get|just|"
    r"result|solution|solutions|value|values|sum|area|probability|of)\s*:?|:)\s*$",
    re.IGNORECASE,
)
TURNS = re.compile(
    r"\b(?:not|no|never|non|negative|minus|least|most|less|more|greater|fewer|than|between|over|under|"
    r"above|below|except|half|twice|thrice|double|triple|square|cube|root|base|mod|log|all|any|"
    r"only if|unless|either|isn't|cannot|can't)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Bare:
    """A value without what stood around it."""

    text: str
    percent: bool = False
    multiplier: int = 1
    touching: bool = False
    """The unit could be an unknown as well (`5m`): only a bare number is equal to this one."""
    letters: bool = False
    """The unit was written in bare letters, which may be unknowns."""
    unit: str = ""
    """What stood around the value: the currency before it, all after it."""


def bare(text: str) -> Bare:
    """`text` without prose before it, and without percent sign, units and currency around it."""
    whole = text = without_prose(text)
    percent, multiplier, touching, letters = False, 1, False, False
    for _ in range(12):
        before = text
        text = CURRENCY_AFTER.sub("", CURRENCY.sub(r"\1", text)).strip()
        shorter = PERCENT.sub("", text).strip()
        if shorter != text and not percent:
            text, percent = shorter, True
            continue
        text = DEGREES.sub("", text).strip() if not re.match(r"\\(?:sin|cos|tan)", text) else text
        found = MULTIPLIED.search(text)
        if found and multiplier == 1 and _numeric(text[: found.start()]):
            multiplier, text = MULTIPLIERS[found[1].lower()], text[: found.start()].strip()
            continue
        shorter, unsure = _without_unit(text)
        letters = letters or (shorter != text and r"\text" not in text)
        text, touching = shorter.strip(), touching or unsure
        if text == before:
            break
    return Bare(text, percent, multiplier, touching, letters, _around(whole, text))


def _around(whole: str, value: str) -> str:
    """What of a whole text is not its value."""
    before = ""
    if found := CURRENCY.match(whole):
        before, whole = found[0].removeprefix(found[1]), found[1] + whole[found.end() :]
    return before + whole.removeprefix(value)


def without_prose(text: str) -> str:
    """`The answer is 5` as `5`; `not 5` and `at least 5` stay as they are."""
    found = BEFORE.match(text)
    while found:
        said = (found["text"] or found["words"] or "").strip()
        rest = text[found.end() :].strip()
        if (
            not rest
            or TURNS.search(said)
            or not INTRODUCES.search(found[0].replace("}", "").strip())
        ):
            break
        text = rest
        found = BEFORE.match(text)
    return text


def _without_unit(text: str) -> tuple[str, bool]:
    """Without the unit at the end, and whether it may have been an unknown; unchanged if there is
    none."""
    found = FRACTION.search(text)
    if found and _numeric(text[: found.start()]) and all(map(_only_units, found.groups())):
        return text[: found.start()], False
    found = WORDS.search(text)
    if found and _numeric(text[: found.start()]) and _prose(found[1]):
        return text[: found.start()], False
    grouped = GROUPED.search(text)
    rest = text
    if grouped and _only_units(grouped[1]):
        rest = f"{text[: grouped.start()]}/s"
    first, unsure, count, compound = None, False, 0, grouped is not None
    while token := TOKEN.search(rest):
        if not _is_unit(token, rest[: token.start()]):
            break
        head = rest[: token.start()].rstrip()
        compound = compound or bool(token["join"]) or "-" in token["power"]
        first, rest, count = token, head, count + 1
    if first is None or first["join"] or not rest:
        return text, False
    if first["word"] is None:  # \text{…} says that it is no unknown
        return (rest, False) if _numeric(rest) or count == 1 else (text, False)
    if not re.search(r"(?:[\d)}]|\\pi)$", rest):
        return text, False
    word, close = first["word"], not first["gap"]
    plain = re.fullmatch(r"[-+]?[\d., ]*\d(?:[eE][-+]?\d+)?", rest) is not None or re.search(
        r"10\s*\^\s*\{-?\d+\}$", rest
    )
    if len(word) == 1 and not compound:
        if count > 1 or not _numeric(rest):
            return text, False
        unsure = close or not plain
    elif close and not compound:
        unsure = word in UNSURE_UNITS
    if not _numeric(rest):
        return text, False
    return rest, unsure


def _is_unit(token: re.Match[str], head: str) -> bool:
    if token["text"] is not None:
        return _prose(token["text"])
    word = re.sub(r"\s+", " ", token["word"])
    return (
        word in UNITS or word in UNIT_LETTERS or (word.removesuffix("s") in UNITS and len(word) > 3)
    )


def _prose(words: str) -> bool:
    """Whether words (the content of `\\text{…}`) can name a unit or the thing counted."""
    plain = re.sub(r"\\mu(?![a-z])|\^\{?-?\d+\}?|(?<=[a-z]) (?:squared|cubed)(?![a-z])", "", words)
    if re.search(r"\d|[=<>+]|\\", plain) or not plain.strip():
        return not plain.strip()
    found = re.findall(r"[A-Za-z]+", plain)
    if any(word.lower() in NO_UNIT for word in found):
        return False
    if not found or {found[0].lower(), found[-1].lower()} & {"and", "or", "to"}:
        return False
    symbols = re.fullmatch(r"[\w\s./*·()'-]*", plain) is not None
    long = bool(found) and (len(found[0]) > 2 or found[0] in UNITS or found[0] in UNIT_LETTERS)
    return symbols and (long or len(found) > 1)


def _only_units(text: str) -> bool:
    """Whether a text is a product of units and nothing else."""
    rest = "1 " + text.strip()
    while token := TOKEN.search(rest):
        if not _is_unit(token, ""):
            return False
        rest = rest[: token.start()].rstrip()
    return rest.rstrip() in ("1", r"1 \cdot")


def _numeric(text: str) -> bool:
    """Whether a text is made of digits and operators alone: no unknown in it."""
    return re.search(r"\d", text) is not None and not re.search(
        r"[A-Za-z=<>]",
        re.sub(
            r"(?<=\d)[eE](?=[-+]?\d)|\\(?:frac|sqrt|pi|cdot|times|div|left|right|log|ln|sin|cos|tan)(?![a-z])",
            "",
            text,
        ),
    )
