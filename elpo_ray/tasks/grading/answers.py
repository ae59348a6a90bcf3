r"""Reading the answer out of an answer turn: its last boxes, its last line `Answer: …`, the letter
of an option, the last program.

Everything here is linear in the text, which may be hostile.
"""

from __future__ import annotations

import re

STRICT_TAIL_CHARS = 100
"""The recipe's strict box must lie within the last so many characters."""
BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*")
BARE = re.compile(
    r"(?:[^\s$\\{}]|\\[A-Za-z]+|\{(?:[^{}]|\{[^{}]*\})*\}|[ \t](?![A-Za-z]{2})|\\[,;! %&#_])+"
)
"""What `\boxed` without braces holds: all up to a dollar sign, the end of the line or a word."""
JOINED = re.compile(
    r"[\s$]*(?:\\[)\]]\s*)?"
    r"(?:(?:,|;|&)[\s$]*(?:and|or|\\text\s*\{\s*(?:and|or)\s*\})?|and|or"
    r"|\\text\s*\{[\s,]*(?:and|or)\s*\})"
    r"(?:\\q?quad|\\[,;! (\[]|[\s$])*(?:[A-Za-z](?:_\{?\w\}?)?[\s$]*(?:=|is|equals)\s*)?[\s$]*"
)
"""What stands between two boxes that are parts of one answer."""
JOINED_CHARS = 60
ANSWER_LINE = re.compile(
    r"^[ \t]*[>*_#`$]{0,8}[ \t]*(?:the[ \t]+)?(?:final[ \t]+)?answer[ \t*_`]{0,8}:[*_`]{0,8}(.*)$",
    re.IGNORECASE | re.MULTILINE,
)
ASKED_LINE = re.compile(
    r"(?:last|final|own|separate|new)\s+line[^\n]{0,120}?\banswer\s*:"
    r"|\banswer\s*:[^\n]{0,80}?\b(?:last|final|own|separate|new)\s+line"
    r"|\b(?:form|format|end|ends|finish|conclude)\b[^\n]{0,60}?\banswer\s*:",
    re.IGNORECASE,
)
"""How a prompt asks for a line `Answer: …`."""
PROGRAM = re.compile(r"```(?:python3?|py)[ \t]*\r?\n", re.IGNORECASE)
WRAPPING = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|boldsymbol|bm)\b"
    r"|[${}*`\s]|_{2}|\\[ ,;!]"
)
CHOICE = re.compile(
    r"(?:the|final|correct|option|answer|choice|letter|is|:)*[(\[]?([A-Z])[)\]]?"
    r"(?:$|[.:,(]|(?<=[)\]])|is(?:the)?(?:correct|right))",
    re.IGNORECASE,
)
TWO_CHOICES = re.compile(
    r"(?:\b(?:or|and)\b|[,;/&|+]|\bto\b)[\s(*${}]*(?:\\\w+\{)?\(?[A-Z]\b(?![_^'])"
)


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{…}`, `\boxed 7` or `\fbox{…}` in `text`; None if there is none
    or its braces do not close."""
    found = _boxes(text, 1)
    return found[0][2] if found else None


def boxed_answer(text: str) -> str | None:
    r"""The last box, together with those that it continues in one enumeration: `x=\boxed{3} and
    y=\boxed{4}` is `3, 4`."""
    found = _boxes(text, 50)
    if not found:
        return None
    parts = [found[0]]
    for box in found[1:]:
        between = text[box[1] : parts[-1][0]]
        if len(between) > JOINED_CHARS or not JOINED.fullmatch(between):
            break
        parts.append(box)
    contents: list[str] = []
    for box in reversed(parts):
        if box[2] not in contents:
            contents.append(box[2])
    return ", ".join(contents)


def _boxes(text: str, count: int) -> list[tuple[int, int, str]]:
    """(start, end, content) of the last `count` boxes, the last one first; none if the last one
    does not close."""
    found: list[tuple[int, int, str]] = []
    starts = list(BOX.finditer(text))
    for start in reversed(starts[-count:]):
        until = found[-1][0] if found else len(text)
        box = _content(text, start, until)
        if box is None:
            break
        found.append(box)
    return found


def _content(text: str, start: re.Match[str], until: int) -> tuple[int, int, str] | None:
    first = start.end()
    if text[first : first + 1] != "{":
        bare = BARE.match(text, first, until)
        content = bare[0].strip().rstrip(".,;:!?") if bare else ""
        return (start.start(), first + len(bare[0]), content) if bare and content else None
    depth = 0
    for brace in re.compile(r"(?<!\\)[{}]").finditer(text, first, until):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return start.start(), brace.end(), text[first + 1 : brace.start()].strip()
    return None


def strict_box(text: str) -> str | None:
    """The last box if all of it lies in the last `STRICT_TAIL_CHARS` characters."""
    return last_boxed(text[-STRICT_TAIL_CHARS:])


def asks_for_line(prompt: str) -> bool:
    """Whether a prompt wants the answer in a last line `Answer: …`."""
    return ASKED_LINE.search(prompt) is not None


def answer_line(text: str) -> str | None:
    """What the last line `Answer: …` says, a box in it opened; None without such a line."""
    lines = ANSWER_LINE.findall(text)
    if not lines:
        return None
    said = lines[-1].strip(" \t*`")
    if not said:
        return None
    return boxed_answer(said) or said


def last_program(text: str) -> str | None:
    """The last closed Python code block; None if there is none."""
    for opening in reversed(list(PROGRAM.finditer(text))):
        closing = text.find("```", opening.end())
        if closing >= 0:
            return text[opening.end() : closing]
    return None


def choice_letter(text: str) -> str | None:
    r"""The letter of a multiple-choice answer such as `B`, `(B)`, `\text{B}` or `B. Helium`; None
    for two letters (`A or B`) and for what only begins with one (`C_6H_{12}`)."""
    text = text[:200].strip()
    if TWO_CHOICES.search(text):
        return None
    found = CHOICE.match(WRAPPING.sub("", text))
    return found[1].upper() if found else None
