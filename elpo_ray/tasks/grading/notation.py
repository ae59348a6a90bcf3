r"""One spelling for what can be spelt in many ways: LaTeX, Markdown, Unicode and plain text.

`tidy` turns the content of a box into the LaTeX that the other modules read. It changes how
something is written, never what it says, and takes time linear in the text for each of a bounded
number of passes.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from elpo_ray.tasks.grading.vocabulary import SILENT, SUBSCRIPTS, SUPERSCRIPTS, SYNONYMS, UNICODE

PASSES = 12
"""So many wrappers around an answer are opened."""
COMMAND = re.compile(r"\\([A-Za-z]+\*?)")
SPACING = re.compile(
    r"(?<!\\)\\[,;:>! ]|~|\\hspace\*?\{[^{}]*\}|\\phantom\{[^{}]*\}|\\label\{[^{}]*\}"
)
WRAPPERS = re.compile(
    r"\\(?:boxed|fbox|framebox|mathbf|mathbin|boldsymbol|bm|pmb|textbf|underline|ensuremath|mathnormal"
    r"|mathord|emph|text|operatorname|textcolor\{\w+\}|color\{\w+\}|mathop|displaylines)\s*"
    r"\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*)\}"
)
"""A command that holds all of an answer and only says how it looks."""
BOLD = re.compile(
    r"\\(?:mathbf|boldsymbol|bm|pmb|textbf|underline|ensuremath|mathnormal)\s*"
    r"\{((?:[^{}]|\{[^{}]*\})*)\}"
)
"""The same somewhere in an answer."""
COLOR = re.compile(r"\\(?:textcolor|color)\s*\{\w+\}\s*")
AROUND = (
    re.compile(r"\${1,2}([^$]*)\${1,2}", re.DOTALL),
    re.compile(r"\\\((.*)\\\)", re.DOTALL),
    re.compile(r"\\\[(.*)\\\]", re.DOTALL),
    re.compile(r"\*{1,3}([^*]+)\*{1,3}", re.DOTALL),
    re.compile(r"_{2}([^_]+)_{2}", re.DOTALL),
    re.compile(r"`+([^`]*)`+", re.DOTALL),
    re.compile(r"[\"']([^\"']*)[\"']", re.DOTALL),
    re.compile(r"<(b|strong|em|i|u)>([^<>]*)</\1>", re.DOTALL),
)
PLAIN_WORDS = (
    (re.compile(r"\\frac\s*([A-Za-z\d])\s*([A-Za-z\d])"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*([A-Za-z\d])\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"\\frac\s*(\{[^{}]*\})\s*([A-Za-z\d])"), r"\\frac\1{\2}"),
    (re.compile(r"(?<![A-Za-z\\{])(pi|infinity|theta|alpha|beta|gamma|phi)(?![A-Za-z])"), r"\\\1"),
    (re.compile(r"(?<![A-Za-z\\])(sin|cos|tan|cot|sec|csc|log|ln|exp|arcsin|arccos|arctan)(?=\s*[\d(^_\\])"),
     r"\\\1"),
    (re.compile(r"(?<![A-Za-z\\])sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"√\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"√\s*(\d+(?:\.\d+)?|[A-Za-z]|\\[a-z]+|\{[^{}]*\})"), r"\\sqrt{\1}"),
    (re.compile(r"\\sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"<=|=<"), r"\\leq "),
    (re.compile(r">="), r"\\geq "),
    (re.compile(r"!=|\\not\s*="), r"\\neq "),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\^\s*\(([^()]*)\)"), r"^{\1}"),
    (re.compile(r"\^\s*([-+]?\d+(?:\.\d+)?)"), r"^{\1}"),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?"), r"^{\\circ}"),
    (re.compile(r"\\(?:mathbb|Bbb|mathbf|boldsymbol)\s*\{?\s*([RZNQC])(?![A-Za-z])\s*\}?"),
     r"\\mathbb{\1}"),
    (re.compile(r"\\text\s*\{\s*([eid])\s*\}"), r"\1"),
    (re.compile(r"\\text\s*\{\s*(sin|cos|tan|log|ln)\s*\}"), r"\\\1"),
    (re.compile(r"\\operatorname\s*\{\s*(sin|cos|tan|cot|sec|csc|log|ln|exp|arcsin|arccos|arctan"
                r"|sinh|cosh|tanh|gcd|max|min)\s*\}"), r"\\\1"),
    (re.compile(r"\\\{\s*\\\}"), r"\\emptyset "),
    (re.compile(r"(?<=\d)\s*\*\s*|\s+\*\s+|(?<=[A-Za-z)])\*(?=[A-Za-z\d(\\])"), r" \\cdot "),
    (re.compile(r"(?<=\d)\s+[xX]\s+(?=10\s*\^)|(?<=\d)[xX](?=10\s*\^)"), r" \\times "),
    (re.compile(r"\.\.\."), r"\\ldots "),
)  # fmt: skip
"""Plain text for LaTeX, in this order."""
VULGAR = re.compile("[¼-¾⅐-⅞]")
REPEATING = re.compile(
    r"(?<![\d.])(\d*)\.(\d*?)(?:\\(?:overline|bar|overbar|dot)\s*(?:\{(\d+)\}|(\d))((?:\d*\\dot\s*\{?\d\}?)?)"
    r"|\((\d+)\)(?!\^))(?![\d.])"
)
GOES_ON = re.compile(r"(?<![\d.])(\d*)\.(\d+)\s*\\ldots")


def tidy(text: str) -> str:
    """`text` without wrappers, spacing and punctuation around it, in one spelling."""
    text = _characters(text)
    text = re.sub(r"\\(?:left|right)\s*\.", " ", text)
    text = COMMAND.sub(_command, re.sub(r"\\operatorname\*", r"\\operatorname", text))
    text = _groups(text)
    text = re.sub(r"\s+", " ", SPACING.sub(_space, text))
    text = _unwrap(text)
    text = re.sub(r"(?<!\S)\*\*([^*]+)\*\*(?!\S)", r"\1", text)
    text = BOLD.sub(r"{\1}", COLOR.sub("", text))
    for pattern, replacement in PLAIN_WORDS:
        text = pattern.sub(replacement, text)
    text = REPEATING.sub(_repeating, text)
    text = GOES_ON.sub(_goes_on, text)
    return re.sub(r"\s+", " ", text).strip()


def _characters(text: str) -> str:
    text = re.sub(
        "([⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ]+)", lambda found: f"^{{{found[0].translate(SUPERSCRIPTS)}}}", text
    )
    text = re.sub("([₀₁₂₃₄₅₆₇₈₉₊₋]+)", lambda found: f"_{{{found[0].translate(SUBSCRIPTS)}}}", text)
    text = VULGAR.sub(lambda found: f" {unicodedata.normalize('NFKC', found[0])} ", text)
    return unicodedata.normalize("NFKC", text.translate(UNICODE)).translate(UNICODE)


def _command(found: re.Match[str]) -> str:
    name = found[1]
    if name in SILENT:
        return " "
    return SYNONYMS.get(name, found[0]) + (" " if name in SYNONYMS else "")


def _groups(text: str) -> str:
    """Thousands written with a comma that takes no space (`1{,}234`, `1,\\!234`): no separator."""
    text = re.sub(r"\{\s*,\s*\}|,\s*\\!\s*|\\!\s*,", "{,}", text)
    text = re.sub(r"(?<=\d)\{,\}\s*(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<=\d)\{,\}(?=\d)", ".", text)  # the decimal comma
    return text.replace("{,}", ",")


def _space(found: re.Match[str]) -> str:
    return "" if found[0] == r"\!" else " "


def _unwrap(text: str) -> str:
    for _ in range(PASSES):
        before = text
        text = text.strip()
        if not text.endswith((r"\ldots", "...")):
            text = re.sub(r"(?:(?<!\\)[,;]|\.|\\\\)$", "", text).strip()
        text = re.sub(r"^(?:[:=,;]|\\approx|\\therefore|\\Rightarrow|\\implies)\s*", "", text)
        found = WRAPPERS.fullmatch(text)
        if found:
            text = found[1]
        for pattern in AROUND:
            around = pattern.fullmatch(text)
            if around:
                text = around[around.lastindex or 1]
        if text.startswith("{") and _closes(text) == len(text) - 1:
            text = text[1:-1]
        if text == before:
            break
    return text


def _closes(text: str) -> int:
    """Where the brace that `text` begins with is closed; -1 nowhere."""
    depth = 0
    for brace in re.finditer(r"(?<!\\)[{}]", text):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    return -1


def _repeating(found: re.Match[str]) -> str:
    """`0.1\\overline{6}` as a fraction."""
    whole, fixed = found[1], found[2]
    block = found[3] or found[4] or found[6] or ""
    if found[5]:  # \dot{1}4285\dot{7}
        block += re.sub(r"\D", "", found[5])
    return _as_fraction(whole, fixed, block)


def _goes_on(found: re.Match[str]) -> str:
    """`0.1666\\ldots` as the fraction that its repeated end shows, or as it stands."""
    digits = found[2]
    for length in range(1, len(digits) // 2 + 1):
        times = 3 if length == 1 else 2
        block = digits[-length:]
        if len(digits) >= times * length and digits.endswith(block * times):
            fixed = digits
            while fixed.endswith(block):
                fixed = fixed[:-length]
            return _as_fraction(found[1], fixed, block)
    return found[0]


def _as_fraction(whole: str, fixed: str, block: str) -> str:
    places, period = 10 ** len(fixed), 10 ** len(block) - 1
    value = int(whole or 0) + Fraction(int(fixed or 0) * period + int(block), places * period)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
