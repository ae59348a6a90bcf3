r"""Formulas: LaTeX read by math-verify's parser, and whether two formulas have the same value.

Two formulas are equal if they have the same value wherever their unknowns have positive values
(also negative ones, if an absolute value shows that signs matter). Values that are rational are
compared exactly; others to 40 and to 80 digits: a true zero shrinks between the two.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import mpmath
import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy
from mpmath import mpf

from elpo_ray.tasks.grading.evaluation import Evaluator, NoValue, TooLarge, Value
from elpo_ray.tasks.grading.residues import residues

SALTS = (0, 1, 2)
DIGITS = (40, 80)
NORMAL = NormalizationConfig(
    basic_latex=False, units=False, malformed_operators=True, nits=False, boxed="none"
)
PLAIN = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
DECIMAL = re.compile(r"(?<![\d.])(\d*)\.(\d+)(?![\d.])|(?<![\d.])(\d+)\.(?![\d.])")
MIXED = re.compile(
    r"(?<![\d.}^_])(?<![\d.}]\s)(\d+)\s*\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}(?!\s*[\^\d])"
    r"|(?<![\d.}^_/])(?<![\d.}/]\s)(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d^])"
)
UNREADABLE = re.compile(
    r"(?:^|[^_\d.])\d+(?:\.\d+)?\s+\d|\d\.\d+\.\d|'|\\(?:ldots|angle|triangle|mathbb|approx|sim|parallel|perp|mid|bmod|pmod"
    r"|equiv|overline\{\d|bar\{\d)|[:@#&?!]\s*[A-Za-z\d]|\\text"
)
"""What the parser would pass over or read as something else."""
FACTOR = re.compile(r"(?<![\w{^.])(\d+)\s*(?=\()")
"""A number before a bracket, which the parser would add."""
TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")

logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Sample:
    """A value at one point, to 40 and to 80 digits; None without one."""

    values: tuple[Value, Value] | None
    rounded: bool = False
    too_large: bool = False


@dataclass(frozen=True)
class Formula:
    """A parsed expression with its values at some points."""

    text: str
    tree: Any
    samples: tuple[Sample, ...]
    signed: tuple[Sample, ...] = ()
    """At points with negative unknowns."""

    def scaled(self, factor: Fraction) -> Formula:
        """The formula times a number."""

        def times(sample: Sample) -> Sample:
            if sample.values is None:
                return sample
            low, high = (_product(value, factor) for value in sample.values)
            return Sample((low, high), sample.rounded)

        return Formula(
            self.text,
            sympy.Mul(
                self.tree, sympy.Rational(factor.numerator, factor.denominator), evaluate=False
            ),
            tuple(map(times, self.samples)),
            tuple(map(times, self.signed)),
        )

    @property
    def exact(self) -> Fraction | None:
        """The value of a constant that is rational."""
        values = self.samples[0].values if self.constant else None
        return values[1] if values and isinstance(values[1], Fraction) else None

    @property
    def constant(self) -> bool:
        return len(self.samples) == 1

    @property
    def real(self) -> Fraction | None:
        """The value of a real constant, exactly or to about 70 digits; None without one."""
        values = self.samples[0].values if self.constant else None
        if values is None or isinstance(values[1], Fraction):
            return values[1] if values else None
        number = values[1]
        with mpmath.workdps(DIGITS[-1] + 30):
            if (
                abs(number.imag) > abs(number.real) * mpf(10) ** -50
                or abs(mpmath.mag(number)) > 10**4
            ):
                return None
            digits = 70 - int(mpmath.mag(number.real) * 0.302)
            return (
                Fraction(int(mpmath.nint(number.real * mpf(10) ** digits))) / Fraction(10) ** digits
            )

    @property
    def too_large(self) -> bool:
        return any(sample.too_large for sample in self.samples)

    @property
    def has_value(self) -> bool:
        return all(sample.values is not None for sample in self.samples)


@lru_cache(maxsize=256)
def parse(text: str) -> Any:
    """A sympy object (expression, relation, set, matrix) as it is written, nothing worked out;
    None if the text cannot be read."""
    if UNREADABLE.search(MIXED.sub("1", text)) or not text.strip():
        return None
    text = FACTOR.sub(r"\1 \\cdot ", MIXED.sub(_mixed, text))
    if TRIGONOMETRIC.search(text):
        text = re.sub(r"(\d+(?:\.\d+)?)\s*\^\{\\circ\}", r"{(\\frac{\1\\pi}{180})}", text)
    text = re.sub(r"\^\{\\circ\}", "", text)
    text = DECIMAL.sub(_decimal, text).replace(r"\lg", r"\log_{10}")
    text = re.sub(r"\\log\s*_\s*\{?\s*e\s*\}?", r"\\ln ", text)
    try:
        return latex2sympy(text, is_real=True, normalization_config=NORMAL, conversion_config=PLAIN)
    except (MemoryError, RecursionError):
        raise
    except Exception:  # the parser raises plain Exceptions, and sympy nearly anything
        return None


def number(value: Fraction) -> Formula:
    """A rational number as a formula."""
    tree = sympy.Rational(value.numerator, value.denominator)
    return Formula(
        str(value) if value.denominator < 10**40 else "", tree, (Sample((value, value)),)
    )


def formula(text: str) -> Formula | None:
    """A formula with its values; None if the text is none."""
    tree = parse(text)
    return None if tree is None else evaluated(text, tree)


def evaluated(text: str, tree: Any) -> Formula | None:
    """The values of an expression; None for a tree of another kind."""
    if not isinstance(tree, sympy.Expr) or not hasattr(tree, "free_symbols"):
        return None
    names = {symbol.name for symbol in tree.free_symbols} - {"i"}
    fold = len({name.lower() for name in names}) == len(names)
    calls = tree.has(sympy.core.function.AppliedUndef)
    salts = SALTS if names or calls else SALTS[:1]
    samples = tuple(_sample(tree, salt, False, fold) for salt in salts)
    signed = tuple(_sample(tree, salt, True, fold) for salt in salts) if names else ()
    return Formula(text, tree, samples, signed)


def same(a: Formula, b: Formula) -> bool | None:
    """Whether two formulas are equal; None if nobody can know."""
    if a.too_large and b.too_large:
        return _same_giants(a.tree, b.tree)
    if a.too_large or b.too_large:
        other = b if a.too_large else a
        return False if other.has_value else None
    pairs = _paired(a, b)
    verdicts = [_agree(x, y) for x, y in pairs]
    if False in verdicts:
        return False
    if None not in verdicts:
        return True
    return _same_residues(a, b) if a.has_value and b.has_value else None


def ratio(a: Formula, b: Formula) -> int | None:
    """The sign of the constant that `a` is of `b` everywhere; None if there is none."""
    signs: set[int] = set()
    first: tuple[Value, Value] | None = None
    pairs = [*zip(_many(a), _many(b), strict=True), *zip(a.signed, b.signed, strict=False)]
    for x, y in pairs:
        if x.values is None or y.values is None:
            return None
        try:
            quotient = (
                _quotient(x.values[0], y.values[0]), _quotient(x.values[1], y.values[1])
            )  # fmt: skip
        except ArithmeticError:
            return None
        if first is not None and not _equal_values(first, quotient):
            return None
        first = first or quotient
        real = mpmath.mpc(_number(quotient[1])).real
        signs.add((real > 0) - (real < 0))
    return signs.pop() if len(signs) == 1 else None


def _paired(a: Formula, b: Formula) -> list[tuple[Sample, Sample]]:
    pairs = list(zip(_many(a), _many(b), strict=True))
    if a.tree.has(sympy.Abs, sympy.sign) or b.tree.has(sympy.Abs, sympy.sign):
        negative = list(zip(a.signed or a.samples * 3, b.signed or b.samples * 3, strict=False))
        pairs += [pair for pair in negative if pair[0].values and pair[1].values]
    return pairs


def _many(a: Formula) -> tuple[Sample, ...]:
    return a.samples if len(a.samples) == len(SALTS) else a.samples * len(SALTS)


def _sample(tree: Any, salt: int, negative: bool, fold: bool) -> Sample:
    rounded = False
    values: list[Value] = []
    try:
        for digits in DIGITS:
            evaluator = Evaluator(salt, digits, negative=negative, fold=fold)
            value = evaluator.value(tree)
            rounded = rounded or evaluator.rounded
            values.append(value)
            if not rounded and not isinstance(value, mpmath.mpc):
                return Sample((value, value))
    except TooLarge:
        return Sample(None, too_large=True)
    except (NoValue, ArithmeticError, ValueError, TypeError, AttributeError, NotImplementedError):
        return Sample(None)
    return Sample((values[0], values[1]), rounded)


def _agree(a: Sample, b: Sample) -> bool | None:
    if a.values is None or b.values is None:
        return None
    if not _equal_values(a.values, b.values):
        return False
    return None if a.rounded or b.rounded else True


def _equal_values(a: tuple[Value, Value], b: tuple[Value, Value]) -> bool:
    """Whether two values, each to 40 and to 80 digits, are equal: the difference of equal ones
    shrinks with the error."""
    if not any(isinstance(value, mpmath.mpc) for value in (*a, *b)):
        return bool(a[0] == b[0])
    with mpmath.workdps(DIGITS[-1] + 30):
        coarse, fine = (abs(_number(x) - _number(y)) for x, y in zip(a, b, strict=True))
    if not fine or fine < coarse * mpf(10) ** -20:
        return True
    scale = max(abs(_number(a[1])), abs(_number(b[1])))
    return bool(fine < scale * mpf(10) ** -70)


def _product(a: Value, b: Fraction) -> Value:
    with mpmath.workdps(DIGITS[-1] + 30):
        return _number(a) * _number(b) if isinstance(a, mpmath.mpc) else a * b


def _quotient(a: Value, b: Value) -> Value:
    if isinstance(a, mpmath.mpc) or isinstance(b, mpmath.mpc):
        with mpmath.workdps(DIGITS[-1] + 30):
            return _number(a) / _number(b)
    return a / b


def _number(value: Value) -> Any:
    if isinstance(value, mpmath.mpc):
        return value
    with mpmath.workdps(DIGITS[-1] + 30):
        return mpmath.mpc(mpf(value.numerator) / mpf(value.denominator))


def _same_residues(a: Formula, b: Formula) -> bool | None:
    """Numbers that agree in all digits that were worked out, and have more."""
    left, right = residues(a.tree), residues(b.tree)
    return _same_giants(a.tree, b.tree) if left is None or right is None else left == right


def _same_giants(a: Any, b: Any) -> bool | None:
    """Numbers too large to be worked out: equal if they are built alike; different if they are
    the same power or factorial but for one part."""
    if a == b:
        return True
    if type(a) is not type(b) or len(a.args) != len(b.args) or not a.args:
        return None
    if not isinstance(a, sympy.Pow | sympy.factorial | sympy.exp):
        return None
    verdicts = []
    for x, y in zip(a.args, b.args, strict=True):
        left, right = evaluated("", x), evaluated("", y)
        verdicts.append(same(left, right) if left and right else None)
    if None in verdicts or verdicts.count(False) > 1:
        return None
    return False not in verdicts


def _mixed(found: re.Match[str]) -> str:
    whole, top, bottom = found.groups()[:3] if found[1] else found.groups()[3:]
    return rf"({whole}+\frac{{{top}}}{{{bottom}}})"


def _decimal(found: re.Match[str]) -> str:
    whole, places = (found[1], found[2]) if found[2] else (found[3], "")
    return rf"{{(\frac{{{int((whole or '') + places or '0')}}}{{{10 ** len(places)}}})}}"
