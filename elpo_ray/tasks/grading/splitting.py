"""Where a text can be split: between signs that stand outside all brackets."""

from __future__ import annotations

import re

OPENING, CLOSING = "([{", ")]}"
BRACKET = re.compile(r"\\[{}]|\\(?:langle|rangle|begin|end)(?![A-Za-z])|[()\[\]{}]")
RELATION = r"\\leq|\\geq|\\neq|\\approx|\\in(?![a-z])|:=|[=<>]"


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


def relation_signs(text: str) -> list[str]:
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


def outside(text: str) -> list[bool]:
    """For each place, whether it is outside all brackets."""
    depth, places = 0, []
    for character in text:
        depth += character in OPENING
        places.append(depth == 0)
        depth -= character in CLOSING
    return places


def enclosed(text: str, opening: str) -> bool:
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
