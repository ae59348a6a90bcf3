"""Whether a program's output, or its function's result, is the expected one.

Two decimals (1.0, 2.5e-3) are equal within 1e-6, relative to the expected one or absolutely, which
is the rule of programming contests. All other numbers are equal if their values are. `exact` asks
the same of decimals too, as LiveCodeBench does.
"""

from __future__ import annotations

import json
import math
import re
from decimal import Decimal, DecimalException
from typing import Any

TOLERANCE = Decimal("1e-6")
_DECIMAL = re.compile(r"(?<![\w.])[+-]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][+-]?\d+)?(?!\w|\.\d)")
"""A decimal within a word, as in "(0.5,1.5)"."""
MAX_INT_DIGITS = 4000
"""Python reads no longer integers from text; as decimals they compare the same."""


def same_lines(output: str, expected: str, *, exact: bool = False) -> bool:
    """Whether all lines are equal, spaces at their ends aside."""
    ours, theirs = ([line.strip() for line in text.strip().split("\n")]
                    for text in (output, expected))  # fmt: skip
    return len(ours) == len(theirs) and all(
        a == b or _same_line(a, b, exact) for a, b in zip(ours, theirs, strict=True)
    )


def _same_line(ours: str, theirs: str, exact: bool) -> bool:
    """Word by word. The space between words counts where one of them is no number."""
    words = list(zip(ours.split(), theirs.split(), strict=False))
    if len(words) != len(ours.split()) or len(words) != len(theirs.split()):
        return False
    if not all(a == b or _same_word(a, b, exact) for a, b in words):
        return False
    spaces = re.findall(r"\s+", ours), re.findall(r"\s+", theirs)
    return spaces[0] == spaces[1] or all(_number(word) is not None for word, _ in words)


def _same_word(ours: str, theirs: str, exact: bool) -> bool:
    a, b = _number(ours), _number(theirs)
    if a is not None and b is not None:
        close = not exact and _is_decimal(ours) and _is_decimal(theirs)
        return _close(a, b) if close else a == b
    if exact or _DECIMAL.sub("#", ours) != _DECIMAL.sub("#", theirs):
        return False
    pairs = zip(_DECIMAL.findall(ours), _DECIMAL.findall(theirs), strict=True)
    return all(_close(Decimal(a), Decimal(b)) for a, b in pairs)


def _number(word: str) -> Decimal | None:
    try:
        value = Decimal(word)
    except DecimalException:
        return None
    return None if value.is_nan() else value


def _is_decimal(word: str) -> bool:
    return any(sign in word for sign in ".eE")


def _close(ours: Decimal, expected: Decimal) -> bool:
    try:
        return abs(ours - expected) <= TOLERANCE * max(abs(expected), Decimal(1))
    except DecimalException:  # beyond all exponents
        return ours == expected


def read_json(text: str) -> Any:
    """JSON data; integers may have any length. ValueError, RecursionError."""
    return json.loads(text, parse_int=_integer)


def _integer(digits: str) -> int | Decimal:
    return int(digits) if len(digits) < MAX_INT_DIGITS else Decimal(digits)


def same_value(ours: Any, expected: Any, *, exact: bool = False) -> bool:
    """Whether two JSON values are equal. Raises RecursionError for what is nested too deep."""
    if isinstance(expected, list):
        return (
            isinstance(ours, list)
            and len(ours) == len(expected)
            and all(same_value(a, b, exact=exact) for a, b in zip(ours, expected, strict=True))
        )
    if isinstance(expected, dict):
        return (
            isinstance(ours, dict)
            and ours.keys() == expected.keys()
            and all(same_value(ours[key], expected[key], exact=exact) for key in expected)
        )
    if isinstance(ours, float) and isinstance(expected, float) and not exact:
        if math.isfinite(ours) and math.isfinite(expected):
            return _close(Decimal(repr(ours)), Decimal(repr(expected)))
        return ours == expected or (math.isnan(ours) and math.isnan(expected))
    return bool(ours == expected)
