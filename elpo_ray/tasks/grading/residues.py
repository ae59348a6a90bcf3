"""Rational numbers too large to be worked out, compared by what division leaves of them."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import sympy

from elpo_ray.tasks.grading.evaluation import Evaluator, NoValue, TooLarge

PRIMES = (2**61 - 1, 2**89 - 1)


def residues(node: Any) -> tuple[int, ...] | None:
    """What a rational number of any size leaves when it is divided by each of `PRIMES`; None if
    the tree is not made of sums, products and whole powers."""
    try:
        return tuple(_residue(node, prime) for prime in PRIMES)
    except (NoValue, TooLarge, ValueError):
        return None


def _residue(node: Any, prime: int) -> int:
    if node.is_Rational:
        return int(node.p) * pow(int(node.q), -1, prime) % prime
    if isinstance(node, sympy.Add):
        return sum(_residue(arg, prime) for arg in node.args) % prime
    if isinstance(node, sympy.Mul):
        return math.prod(_residue(arg, prime) for arg in node.args) % prime
    if isinstance(node, sympy.Pow):
        exponent = Evaluator(0, 40).value(node.exp)
        if isinstance(exponent, Fraction) and exponent.denominator == 1:
            return pow(_residue(node.base, prime), exponent.numerator, prime)
    raise NoValue(str(type(node)))
