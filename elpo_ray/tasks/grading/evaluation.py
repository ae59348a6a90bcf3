r"""The value of a formula, exact where it is rational, without ever working out what is too large.

SymPy would compute every digit of `10^{10^{10}}`. Here a rational number is kept exactly up to
`EXACT_BITS`, anything else as a floating-point number of any exponent to `digits` digits; what is
larger still raises `TooLarge`. The tree is walked as it was parsed: nothing is simplified.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, TypeAlias

import mpmath
import sympy
from mpmath import mpc, mpf

EXACT_BITS = 1 << 18
"""A larger rational number is rounded."""
EXPONENT_BITS = 1 << 12
"""A number is too large if its binary exponent has more bits."""
TURNS_BITS = 1 << 12
"""Sines and rounding of numbers with more bits before the point are not worked out."""
TERMS = 2000
"""So many terms of a sum or product are added one by one."""

Value: TypeAlias = Any
"""A Fraction, or mpmath's `mpc`, which has no types."""
Point = Mapping[str, Fraction]
"""Values of the unknowns; one that is missing gets its own by `unknown`."""


class TooLarge(ArithmeticError):
    """The value has too many digits to be worked out."""


class NoValue(ArithmeticError):
    """There is no way to a number: infinite, undefined, or a function nobody knows."""


def unknown(name: str, salt: int) -> Fraction:
    """A positive value for an unknown that depends on nothing but its name and `salt`."""
    drawn = zlib.crc32(f"{salt}/{name}".encode())
    return Fraction(drawn % 1009 + 700, 811 + salt)


class Evaluator:
    """Values at one point, to a number of digits."""

    def __init__(
        self, salt: int, digits: int, *, negative: bool = False, fold: bool = True
    ) -> None:
        """`negative`: about half of the unknowns are. `fold`: `N` and `n` are the same unknown."""
        self.salt, self.digits, self.negative, self.fold = salt, digits, negative, fold
        self.rounded = False
        """A number that was known exactly had to be rounded for its size."""
        self.bound: dict[str, Fraction] = {}

    def value(self, node: Any) -> Value:
        """TooLarge, NoValue, or another ArithmeticError at a pole."""
        with mpmath.workdps(self.digits + 10):
            found = self._value(node)
            return found if isinstance(found, Fraction) else +found

    def _value(self, node: Any) -> Value:
        if node.is_Rational:
            return Fraction(int(node.p), int(node.q))
        if node.is_Float:
            return Fraction(str(node))
        if node.is_Symbol:
            return self._symbol(node.name)
        if node in CONSTANTS:
            return CONSTANTS[node]()
        name = type(node).__name__
        if name in FUNCTIONS:
            return self._checked(FUNCTIONS[name](self, *node.args))
        if name in ONE_ARGUMENT:
            return self._checked(self.function(name, *node.args))
        if name in ("Sum", "Product"):
            return self._checked(self._terms(node, name))
        if isinstance(node, sympy.core.function.AppliedUndef):
            values = [self._value(arg) for arg in node.args]
            return unknown(f"{name}{[mpmath.nstr(_mp(value), 12) for value in values]}", self.salt)
        return self._worked_out(node)

    def _worked_out(self, node: Any) -> Value:
        """By SymPy, which may take for ever: a limit, an integral, a derivative."""
        if not hasattr(node, "doit"):
            raise NoValue(str(type(node)))
        done = node.doit()
        if type(done) is not type(node):
            return self._value(done)
        number = done.evalf(self.digits + 5)
        if number.is_number and type(number) is not type(node) and number.is_finite:
            return self._value(number)
        raise NoValue(str(type(node)))

    def _symbol(self, name: str) -> Value:
        if name in self.bound:
            return self.bound[name]
        if name == "i":
            return mpc(0, 1)
        name = name.lower() if self.fold else name
        drawn = unknown(name, self.salt)
        return -drawn if self.negative and zlib.crc32(name.encode()) % 2 == self.salt % 2 else drawn

    def _checked(self, value: Value) -> Value:
        if isinstance(value, Fraction):
            return value if _bits(value) <= EXACT_BITS else self._round(value)
        for part in (value.real, value.imag):
            if not mpmath.isfinite(part):
                raise NoValue("infinite")
            if part and int(mpmath.mag(part)).bit_length() > EXPONENT_BITS:
                raise TooLarge
        return value

    def _round(self, value: Fraction) -> mpc:
        self.rounded = True
        return mpc(mpf(value.numerator) / mpf(value.denominator))

    # --- arithmetic ---------------------------------------------------------------------------

    def add(self, *args: Any) -> Value:
        total: Value = Fraction(0)
        for arg in args:
            total = _plus(total, self._value(arg))
        return total

    def mul(self, *args: Any) -> Value:
        product: Value = Fraction(1)
        for arg in args:
            product = self._checked(_times(product, self._value(arg)))
        return product

    def power(self, base: Any, exponent: Any) -> Value:
        x, y = self._value(base), self._value(exponent)
        if isinstance(y, Fraction) and isinstance(x, Fraction):
            exact = self._exact_power(x, y)
            if exact is not None:
                return exact
        a, b = _mp(x), _mp(y)
        if not a:
            if b.real > 0:
                return Fraction(0)
            raise NoValue("0 to the power 0" if not b else "1/0")
        if a == 1:
            return mpc(1)
        size = mpmath.mag(b) + mpmath.mag(abs(mpmath.log(abs(a))) + abs(mpmath.arg(a)) + 1)
        if size > EXPONENT_BITS:
            raise TooLarge
        if (
            isinstance(x, Fraction) and isinstance(y, Fraction)
            and x < 0 and y.denominator % 2 and y.denominator > 1
        ):  # fmt: skip
            sign = -1 if y.numerator % 2 else 1  # the real root of a negative number
            return sign * mpmath.exp(b * mpmath.log(-a))
        with mpmath.workdps(self.digits + 20 + max(0, int(size * 0.302))):
            return mpc(mpmath.exp(b * mpmath.log(_mp(x))))

    def _exact_power(self, x: Fraction, y: Fraction) -> Fraction | None:
        """None if the power is irrational; that of a number too large to be kept is rounded."""
        if x in (0, 1, -1):
            if x == 0 and y <= 0:
                raise NoValue("0 to the power 0" if y == 0 else "1/0")
            if y.denominator == 1:
                return x if x != -1 or y.numerator % 2 else Fraction(1)
            return x if x != -1 else None
        if y.denominator == 1:
            if _bits(x) * abs(y.numerator) > EXACT_BITS:
                self.rounded = True
                return None
            return x**y.numerator
        if y.denominator > 64 or x < 0 or _bits(x) * abs(y.numerator) > EXACT_BITS:
            return None
        root = Fraction(_root(x.numerator, y.denominator), _root(x.denominator, y.denominator))
        return root**y.numerator if root**y.denominator == x else None

    def factorial(self, arg: Any) -> Value:
        n = self._value(arg)
        if isinstance(n, Fraction) and n.denominator == 1:
            if n < 0:
                raise NoValue("factorial of a negative number")
            if n.numerator * math.log2(n.numerator + 1) <= EXACT_BITS:
                return Fraction(math.factorial(n.numerator))
            self.rounded = True
        return self._gamma(_mp(n) + 1)

    def _gamma(self, z: mpc) -> Value:
        if mpmath.mag(z) > EXPONENT_BITS:
            raise TooLarge
        with mpmath.workdps(self.digits + 20 + max(0, int(mpmath.mag(z) * 0.35))):
            if abs(z) < 10**4:
                return mpc(mpmath.gamma(z))
            return mpc(mpmath.exp(mpmath.loggamma(z)))

    def double_factorial(self, arg: Any) -> Value:
        n = self._value(arg)
        if not isinstance(n, Fraction) or n.denominator != 1 or not 0 <= n <= 10**4:
            raise NoValue("double factorial")
        return Fraction(math.prod(range(n.numerator, 0, -2)))

    def binomial(self, above: Any, below: Any) -> Value:
        n, k = self._value(above), self._value(below)
        if (
            isinstance(n, Fraction)
            and isinstance(k, Fraction)
            and n.denominator == k.denominator == 1
        ):
            if n >= 0 and (k < 0 or k > n):
                return Fraction(0)
            if n >= 0 and min(k, n - k) * math.log2(n.numerator + 2) <= EXACT_BITS:
                return Fraction(math.comb(n.numerator, k.numerator))
        if isinstance(k, Fraction) and k.denominator == 1 and 0 <= k <= 50:
            product: Value = Fraction(1)
            for j in range(k.numerator):
                factor = _plus(n, Fraction(-j))
                product = self._checked(_times(_times(product, factor), Fraction(1, j + 1)))
            return product
        self.rounded = True
        a, b = _mp(n), _mp(k)
        if max(mpmath.mag(a), mpmath.mag(b)) > EXPONENT_BITS:
            raise TooLarge
        with mpmath.workdps(self.digits + 20 + max(0, int(mpmath.mag(a) * 0.35))):
            log = mpmath.loggamma(a + 1) - mpmath.loggamma(b + 1) - mpmath.loggamma(a - b + 1)
            return mpc(mpmath.exp(log))

    def logarithm(self, arg: Any, base: Any = sympy.E) -> Value:
        x, b = self._value(arg), self._value(base)
        if not _mp(x) or not _mp(b):
            raise NoValue("logarithm of 0")
        if isinstance(x, Fraction) and isinstance(b, Fraction) and x > 0 and b > 0 and b != 1:
            power = round(_log2(x) / _log2(b)) if b != 1 else 0
            if abs(power) * _bits(b) <= EXACT_BITS and b**power == x:
                return Fraction(power)
        return mpc(mpmath.log(_mp(x)) / mpmath.log(_mp(b)))

    def function(self, name: str, arg: Any) -> Value:
        """A function of mpmath of one argument."""
        x = _mp(self._value(arg))
        if mpmath.mag(x) > TURNS_BITS:
            raise TooLarge
        with mpmath.workdps(self.digits + 15 + max(0, int(mpmath.mag(x) * 0.302))):
            x = _mp(self._value(arg))
            return mpc(getattr(mpmath, name)(x))

    def exponential(self, arg: Any) -> Value:
        x = _mp(self._value(arg))
        if x and mpmath.mag(x) > EXPONENT_BITS:
            raise TooLarge
        with mpmath.workdps(self.digits + 15 + max(0, int(mpmath.mag(x) * 0.302)) if x else None):
            return mpc(mpmath.exp(_mp(self._value(arg))))

    def absolute(self, arg: Any) -> Value:
        x = self._value(arg)
        return abs(x) if isinstance(x, Fraction) else mpc(abs(x))

    def floor(self, arg: Any) -> Value:
        x = self._value(arg)
        if isinstance(x, Fraction):
            return Fraction(math.floor(x))
        return Fraction(math.floor(self._real(x)))

    def ceiling(self, arg: Any) -> Value:
        x = self._value(arg)
        return Fraction(math.ceil(x if isinstance(x, Fraction) else self._real(x)))

    def sign(self, arg: Any) -> Value:
        x = self._value(arg)
        real = x if isinstance(x, Fraction) else self._real(x)
        return Fraction((real > 0) - (real < 0))

    def extreme(self, pick: Any, args: tuple[Any, ...]) -> Value:
        values = [self._value(arg) for arg in args]
        return pick(values, key=lambda v: v if isinstance(v, Fraction) else self._real(v))

    def modulo(self, a: Any, b: Any) -> Value:
        x, y = self._value(a), self._value(b)
        if not isinstance(x, Fraction) or not isinstance(y, Fraction) or not y:
            raise NoValue("modulo")
        return x % y

    def part(self, name: str, arg: Any) -> Value:
        """Real or imaginary part, conjugate, argument."""
        return mpc(getattr(mpmath, name)(_mp(self._value(arg))))

    def _real(self, x: mpc) -> mpf:
        if abs(x.imag) > abs(x.real) * mpf(10) ** (-self.digits // 2):
            raise NoValue("not real")
        if x.real and mpmath.mag(x.real) > TURNS_BITS:
            raise TooLarge
        return x.real

    def _terms(self, node: Any, name: str) -> Value:
        """A sum or product: term by term if it has few, else by SymPy's closed form."""
        if len(node.limits) == 1 and len(node.limits[0]) == 3:
            index, low, high = node.limits[0]
            if low.is_finite is not False and high.is_finite is not False:
                first, last = self._value(low), self._value(high)
                if not isinstance(first, Fraction) or not isinstance(last, Fraction):
                    raise NoValue("bounds of a sum")
                if first.denominator == last.denominator == 1 and last - first < TERMS:
                    return self._each(node.function, index.name, first, last, name)
                if last.denominator == 1 and last - first > 10**4 and not _closed(node):
                    raise TooLarge
        return self._worked_out(node)

    def _each(self, term: Any, index: str, first: Fraction, last: Fraction, name: str) -> Value:
        total: Value = Fraction(int(name == "Product"))
        outer = self.bound.get(index)
        for k in range(int(first), int(last) + 1):
            self.bound[index] = Fraction(k)
            each = self._value(term)
            total = self._checked(_plus(total, each) if name == "Sum" else _times(total, each))
        if outer is None:
            self.bound.pop(index, None)
        else:
            self.bound[index] = outer
        return total


def _closed(node: Any) -> bool:
    """Whether a long sum is of a kind with a closed form: powers of its index, or with it above."""
    index = node.limits[0][0]
    return type(node).__name__ == "Sum" and all(
        not power.base.has(index) or (power.exp.is_Integer and power.exp > 0)
        for power in node.function.atoms(sympy.Pow)
    )


def _mp(value: Value) -> mpc:
    if isinstance(value, Fraction):
        return mpc(mpf(value.numerator) / mpf(value.denominator))
    return value


def _plus(a: Value, b: Value) -> Value:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a + b
    return _mp(a) + _mp(b)


def _times(a: Value, b: Value) -> Value:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a * b
    return _mp(a) * _mp(b)


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _log2(value: Fraction) -> float:
    return math.log2(value.numerator) - math.log2(value.denominator)


def _root(number: int, degree: int) -> int:
    """The whole part of a root."""
    return int(sympy.integer_nthroot(number, degree)[0])


CONSTANTS = {
    sympy.pi: lambda: mpc(mpmath.pi),
    sympy.E: lambda: mpc(mpmath.e),
    sympy.I: lambda: mpc(0, 1),
    sympy.GoldenRatio: lambda: mpc(mpmath.phi),
    sympy.EulerGamma: lambda: mpc(mpmath.euler),
}
ONE_ARGUMENT = frozenset(
    """
    sin cos tan cot sec csc asin acos atan acot asec acsc sinh cosh tanh coth asinh acosh atanh zeta
    gamma erf
    """.split()  # noqa: SIM905
)
"""Functions that mpmath knows by sympy's name."""
FUNCTIONS: dict[str, Any] = {
    "Add": Evaluator.add,
    "Mul": Evaluator.mul,
    "Pow": Evaluator.power,
    "exp": Evaluator.exponential,
    "log": Evaluator.logarithm,
    "factorial": Evaluator.factorial,
    "factorial2": Evaluator.double_factorial,
    "binomial": Evaluator.binomial,
    "Abs": Evaluator.absolute,
    "floor": Evaluator.floor,
    "ceiling": Evaluator.ceiling,
    "sign": Evaluator.sign,
    "Mod": Evaluator.modulo,
    "UnevaluatedExpr": lambda self, arg: self._value(arg),
    "Max": lambda self, *args: self.extreme(max, args),
    "Min": lambda self, *args: self.extreme(min, args),
    "re": lambda self, arg: self.part("re", arg),
    "im": lambda self, arg: self.part("im", arg),
    "conjugate": lambda self, arg: self.part("conj", arg),
    "arg": lambda self, arg: self.part("arg", arg),
}
