"""What a rule's tallies say, with intervals, and a line of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.searches.replay import Tally

RESAMPLES = 4000
BINS = (0.0, 0.8, 0.85, 0.9, 0.95, 0.99, 1.0)
"""Ends of the bins of a named step's posterior."""
Interval = tuple[float, float]


@dataclass(frozen=True)
class Row:
    """One rule on one bank with one budget."""

    bank: str
    n_total: int
    rule: str
    precision: float
    """Right ones among named steps."""
    precision_interval: Interval
    gain_interval: Interval
    """The interval of the difference to the first rule's precision."""
    named: float
    """Named ones among searches."""
    located: float
    """Inputs with a rightly named step."""
    located_interval: Interval
    located_gain_interval: Interval
    contradicted: float
    """Named steps that a success of the same tree shows to be recoverable."""
    wrong: float
    """Wrongly named steps an input."""
    searches: float
    """Searches an input."""
    probes: float
    """Probes a search."""
    turns: float
    """Turns one after the other, an input."""
    calibration: list[tuple[float, float, int]]
    """(mean posterior, share right, number of named steps) by bins of the posterior."""


HEAD = (
    f"{'bank':8} {'N':>3} {'rule':33} {'precision':>9} {'95 %':>13} {'gain 95 %':>15} {'named':>6}"
    f" {'located':>8} {'gain 95 %':>15} {'wrong':>6} {'turns':>6}"
)


def line(row: Row) -> str:
    """The row for a terminal."""

    def between(ends: Interval, sign: str = "") -> str:
        return f"{ends[0]:{sign}.3f}–{ends[1]:{sign}.3f}"

    return (
        f"{row.bank:8} {row.n_total:3} {row.rule:33} {row.precision:9.3f} "
        f"{between(row.precision_interval):>13} {between(row.gain_interval, '+'):>15} "
        f"{row.named:6.3f} {row.located:8.3f} {between(row.located_gain_interval, '+'):>15} "
        f"{row.wrong:6.3f} {row.turns:6.1f}"
    )


def summarize(
    key: tuple[str, int, str], tallies: Sequence[Tally], baseline: Sequence[Tally]
) -> Row:
    """The numbers of a rule, beside those of another one on the same trees."""
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(tallies), (RESAMPLES, len(tallies)))

    def sums(of: Sequence[Tally], name: str) -> NDArray[np.float64]:
        return np.array([getattr(tally, name) for tally in of], dtype=np.float64)

    def ratio(of: Sequence[Tally], part: str, whole: str) -> Callable[[Any], NDArray[np.float64]]:
        parts, wholes = sums(of, part), sums(of, whole)
        return lambda chosen: parts[chosen].sum(-1) / np.maximum(wholes[chosen].sum(-1), 1)

    def interval(values: NDArray[np.float64]) -> Interval:
        low, high = np.quantile(values, [0.025, 0.975])
        return float(low), float(high)

    everything = np.arange(len(tallies))
    precision, before = ratio(tallies, "right", "named"), ratio(baseline, "right", "named")
    located, located_before = (ratio(of, "located", "trees") for of in (tallies, baseline))
    trees = sums(tallies, "trees").sum()
    searches = max(sums(tallies, "searches").sum(), 1)
    wrong = sums(tallies, "named").sum() - sums(tallies, "right").sum()
    return Row(
        *key,
        precision=float(precision(everything)),
        precision_interval=interval(precision(draws)),
        gain_interval=interval(precision(draws) - before(draws)),
        named=float(sums(tallies, "named").sum() / searches),
        located=float(located(everything)),
        located_interval=interval(located(draws)),
        located_gain_interval=interval(located(draws) - located_before(draws)),
        contradicted=float(ratio(tallies, "contradicted", "named")(everything)),
        wrong=float(wrong / trees),
        searches=float(searches / trees),
        probes=float(sums(tallies, "probes").sum() / searches),
        turns=float(sums(tallies, "turns").sum() / trees),
        calibration=calibration([pair for tally in tallies for pair in tally.beliefs]),
    )


def calibration(beliefs: Sequence[tuple[float, bool]]) -> list[tuple[float, float, int]]:
    """(mean posterior, share right, count) of named steps by their posterior."""
    rows = []
    for low, high in pairwise(BINS):
        inside = [pair for pair in beliefs if low <= pair[0] < high or pair[0] == high == 1.0]
        if inside:
            posterior, right = np.mean(np.array(inside, dtype=np.float64), axis=0)
            rows.append((float(posterior), float(right), len(inside)))
    return rows
