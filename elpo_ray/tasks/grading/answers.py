r"""Reading the answer out of an answer turn: the last box, the option's letter, the last program.

Everything here is linear in the text, which may be hostile.
"""

from __future__ import annotations

import re

BOX = r"\boxed{"
STRICT_TAIL_CHARS = 100
"""The recipe's strict box must lie within the last so many characters."""
PROGRAM = re.compile(r"```(?:python3?|py)[ \t]*\r?\n", re.IGNORECASE)
CHOICE = re.compile(
    r"\W*(?:\\(?:text|textbf|mathrm|mathbf)\{)?\W*(?:option|answer|choice)?\W*([A-Z])(?![A-Za-z])",
    re.IGNORECASE,
)


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{…}` in `text`, braces balanced; None if there is none."""
    start = text.rfind(BOX)
    if start < 0:
        return None
    first = start + len(BOX)
    depth = 1
    for brace in re.compile(r"[{}]").finditer(text, first):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[first : brace.start()].strip()
    return None


def strict_box(text: str) -> str | None:
    """The last box if all of it lies in the last `STRICT_TAIL_CHARS` characters."""
    return last_boxed(text[-STRICT_TAIL_CHARS:])


def last_program(text: str) -> str | None:
    """The last closed Python code block; None if there is none."""
    for opening in reversed(list(PROGRAM.finditer(text))):
        closing = text.find("```", opening.end())
        if closing >= 0:
            return text[opening.end() : closing]
    return None


def choice_letter(text: str) -> str | None:
    r"""The letter of a multiple-choice answer such as `B`, `(B)`, `\text{B}` or `B. Helium`."""
    found = CHOICE.match(text[:200])
    return found[1].upper() if found else None
