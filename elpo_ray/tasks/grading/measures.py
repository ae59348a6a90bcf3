r"""Units as quantities, so that `5 cm` is not `5 m` but is `50 mm`.

Only units that mean one thing are known here; all currencies are one. A text with any other word in
it (`apples`, `units`, `C`, which is a charge or a temperature) is no measure, and is not compared.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

_PREFIXES = {
    "": 0, "k": 3, "M": 6, "G": 9, "c": -2, "m": -3, "\\mu ": -6, "n": -9, "p": -12, "h": 2
}  # fmt: skip
_LONG_PREFIXES = {"kilo": 3, "centi": -2, "milli": -3, "micro": -6, "nano": -9, "mega": 6}
_MECHANICAL = {"N": "kg m s-2", "J": "kg m2 s-2", "W": "kg m2 s-3", "Pa": "kg m-1 s-2"}
_SI = {"m": "m", "g": "g", "s": "s", "A": "A", "K": "K", "mol": "mol", "Hz": "s-1", "V": "V",
       "eV": "eV", "L": "L", "l": "L"} | dict.fromkeys(_MECHANICAL, "")  # fmt: skip
_LONG_SI = {"meter": "m", "metre": "m", "gram": "g", "second": "s", "newton": "N", "joule": "J",
            "watt": "W", "pascal": "Pa", "volt": "V", "ampere": "A", "liter": "L", "litre": "L",
            "mole": "mol", "hertz": "Hz"}  # fmt: skip
_OTHERS = {
    "min": ("s", "60"), "minute": ("s", "60"), "h": ("s", "3600"), "hr": ("s", "3600"),
    "hour": ("s", "3600"), "sec": ("s", "1"), "day": ("s", "86400"), "week": ("s", "604800"),
    "month": ("month", "1"), "year": ("month", "12"), "yr": ("month", "12"),
    "in": ("m", "0.0254"), "inch": ("m", "0.0254"), "inches": ("m", "0.0254"),
    "ft": ("m", "0.3048"), "foot": ("m", "0.3048"), "feet": ("m", "0.3048"),
    "yd": ("m", "0.9144"), "yard": ("m", "0.9144"), "mi": ("m", "1609.344"),
    "mile": ("m", "1609.344"), "lb": ("lb", "1"),
    "oz": ("lb", "0.0625"), "ounce": ("lb", "0.0625"),
    "deg": ("degree", "1"), "degree": ("degree", "1"),
    "rad": ("radian", "1"), "radian": ("radian", "1"),
    "celsius": ("celsius", "1"), "fahrenheit": ("fahrenheit", "1"), "kelvin": ("K", "1"),
    "Celsius": ("celsius", "1"), "Fahrenheit": ("fahrenheit", "1"), "Kelvin": ("K", "1"),
    "cent": ("money", "0.01"),
} | dict.fromkeys(("dollar", "USD", "euro", "EUR", "GBP"), ("money", "1"))  # fmt: skip
_SPELLED = (
    (re.compile(r"\\text\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}"), r" \1 /( \2 )"),
    (re.compile(r"\^\s*\{\s*\\circ\s*\}\s*([CFK])(?![A-Za-z])"), r" degree\1 "),
    (re.compile(r"\b(?:deg|degree)s?\s+(?=Celsius|Fahrenheit|Kelvin)", re.IGNORECASE), " "),
    (re.compile(r"\bdegreeC"), "celsius"),
    (re.compile(r"\bdegreeF"), "fahrenheit"),
    (re.compile(r"\bdegreeK"), "kelvin"),
    (re.compile(r"\^\s*\{\s*\\circ\s*\}"), " degree "),
    (re.compile(r"\^\s*\{\s*(-?\d+)\s*\}"), r"^\1"),
    (re.compile(r"\bper\b"), "/"),
    (re.compile(r"\bmph\b"), "mi/h"),
    (re.compile(r"\b(?:kph|kmph|kmh)\b"), "km/h"),
    (re.compile(r"\b(?:square|sq)\b\.?\s*([A-Za-z]+)"), r"\1^2"),
    (re.compile(r"\b(?:cubic|cu)\b\.?\s*([A-Za-z]+)"), r"\1^3"),
    (re.compile(r"([A-Za-z])\s+squared\b"), r"\1^2"),
    (re.compile(r"([A-Za-z])\s+cubed\b"), r"\1^3"),
    (re.compile(r"\\cdot(?![A-Za-z])|·"), "*"),
    (re.compile(r"\\\$"), " dollar "),
    (re.compile("€"), " euro "),
    (re.compile("£"), " GBP "),
)
"""Spellings of units in one: names, `*`, `/`, brackets and `^` with a whole number."""
_TOKEN = re.compile(r"\s*(?:(\\mu\s*)?([A-Za-z]+)\.?(?:\s*\^\s*(-?\d{1,2}))?|([/*()]))")


@dataclass(frozen=True)
class Measure:
    """A product of powers of units: so many of the base units."""

    factor: Fraction
    powers: frozenset[tuple[str, int]]

    def per(self, other: Measure) -> Fraction | None:
        """How many of `other` this is; None if it is of another kind."""
        angle = ({("degree", 1)}, {("celsius", 1)}), ({("degree", 1)}, {("fahrenheit", 1)})
        if self.powers == other.powers:
            return self.factor / other.factor
        if any(set(self.powers) in pair and set(other.powers) in pair for pair in angle):
            return Fraction(1)
        return None


def measure(text: str) -> Measure | None:
    """What a tidy text of units stands for; None if any part of it is not known for sure."""
    for pattern, replacement in _SPELLED:
        text = pattern.sub(replacement, text)
    factor, powers = Fraction(1), Counter[str]()
    sign, place, depth, under = 1, 0, 0, 0
    text = text.strip()
    while place < len(text):
        found = _TOKEN.match(text, place)
        if found is None:
            return None
        place = found.end()
        mark = found[4]
        if mark == "/":
            sign, under = -1, 0
        elif mark in ("(", ")"):
            depth += 1 if mark == "(" else -1
            sign = sign if mark == "(" else 1
        elif mark is None:
            known = _known((r"\mu " if found[1] else "") + found[2])
            under += sign < 0
            if known is None or (under > 1 and depth == 0):
                return None  # `J/kg K` may be read in two ways
            power = sign * int(found[3] or 1)
            factor *= known.factor**power
            for name, each in known.powers:
                powers[name] += power * each
    if set(powers) > {"radian"}:
        del powers["radian"]
    left = frozenset((name, power) for name, power in powers.items() if power)
    return Measure(factor, left) if left else None


def _known(name: str) -> Measure | None:
    singular = name.removesuffix("s") if len(name) > 3 else name
    for each in (name, singular):
        if each in _OTHERS:
            base, factor = _OTHERS[each]
            return Measure(Fraction(factor), frozenset({(base, 1)}))
    for prefix, exponent in _LONG_PREFIXES.items():
        base = singular.removeprefix(prefix)
        if base != singular and base in _LONG_SI:
            return _scaled(_LONG_SI[base], exponent)
    if singular in _LONG_SI:
        return _scaled(_LONG_SI[singular], 0)
    for prefix, exponent in _PREFIXES.items():
        if name.startswith(prefix) and name[len(prefix) :] in _SI:
            return _scaled(name[len(prefix) :], exponent)
    return None


def _scaled(symbol: str, exponent: int) -> Measure:
    factor, powers = Fraction(10) ** exponent, {_SI[symbol]: 1}
    if symbol in _MECHANICAL:
        powers = {}
        for part in _MECHANICAL[symbol].split():
            base, power = re.fullmatch(r"([a-z]+)(-?\d?)", part).groups()  # type: ignore[union-attr]
            factor *= 1000 if base == "kg" else 1
            powers["g" if base == "kg" else base] = int(power or 1)
    elif symbol == "Hz":
        powers = {"s": -1}
    elif _SI[symbol] == "L":
        factor, powers = factor / 1000, {"m": 3}
    return Measure(factor, frozenset(powers.items()))
