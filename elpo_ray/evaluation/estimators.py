"""avg@n, Pass@K and Major@K of one set of samples, and how sure one may be of them.

Every estimator takes the n samples of a problem as they are: Pass@K and Major@K are means over all
C(n, K) subsets, computed by counting, hence unbiased for K fresh samples and free of resampling
noise. A task's number is the unweighted mean over its problems.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import fmean, variance

CONFIDENCE = 0.95
"""Confidence of every interval."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A two-sided confidence interval of a share, within [0, 1]."""

    low: float
    """Lower end."""
    high: float
    """Upper end."""
    method: str
    """How it was computed, for the reader of a report."""


@dataclass(frozen=True, slots=True)
class Average:
    """avg@n of a task: the mean over problems of each problem's share of successes."""

    mean: float
    """The mean itself."""
    over_problems: Interval
    """The interval for other problems of the same kind: these are taken as a random sample."""
    over_samples: Interval
    """The interval for these very problems: only the sampling of the answers is random."""


def average(successes: Sequence[Sequence[bool]]) -> Average:
    """`successes[i]` are the outcomes of problem i's samples, at least one each."""
    assert successes and all(successes), "a mean needs a sample of every problem"
    shares = [fmean(outcomes) for outcomes in successes]
    mean, count = fmean(shares), len(shares)
    between = math.sqrt(variance(shares) / count) if count > 1 else 0.0
    within = math.sqrt(sum(map(_variance_of_mean, successes))) / count
    samples = sum(map(len, successes))
    return Average(
        mean,
        _interval(mean, between, count, f"t over {count} problem means", degrees=count - 1),
        _interval(mean, within, samples, f"normal over {samples} samples, problems fixed"),
    )


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Probability that K of the n samples, drawn without replacement, hold a correct one."""
    assert 0 <= correct <= n and 1 <= k <= n, (n, correct, k)
    return float(1 - Fraction(math.comb(n - correct, k), math.comb(n, k)))


def major_at_k(votes: Sequence[tuple[Hashable | None, bool]], k: int) -> float:
    """Probability that the majority answer of K of the samples, drawn without replacement, is
    correct.

    A vote is (answer, correct). Answers that tie for most votes win with equal chance; a sample
    without an answer (None) casts no vote, and no vote is no success. Should samples with
    one answer differ in `correct`, the winner's is that of one of its voters at random.
    """
    assert 1 <= k <= len(votes), (len(votes), k)
    outcomes: defaultdict[Hashable, list[bool]] = defaultdict(list)
    for answer, correct in votes:
        outcomes[answer].append(correct)
    silent = len(outcomes.pop(None, []))
    counts = [len(group) for group in outcomes.values()]
    won = Fraction(0)
    for place, group in enumerate(outcomes.values()):
        right = Fraction(sum(group), len(group))
        if right:
            others = counts[:place] + counts[place + 1 :]
            won += right * _subsets_won(len(group), others, silent, k)
    return float(won / math.comb(len(votes), k))


def _subsets_won(own: int, others: Sequence[int], silent: int, k: int) -> Fraction:
    """How many subsets of size k an answer with `own` voters wins; one that it wins together with
    r others counts 1/(r+1)."""
    won = Fraction(0)
    for top in range(1, min(own, k) + 1):
        # ways[size, ties]: choices among the other answers of `size` votes in all, none with more
        # than `top`, `ties` of them with exactly `top`.
        ways: dict[tuple[int, int], int] = {(0, 0): 1}
        for count in others:
            following: defaultdict[tuple[int, int], int] = defaultdict(int)
            for (size, ties), number in ways.items():
                for votes in range(min(count, top, k - top - size) + 1):
                    key = (size + votes, ties + (votes == top))
                    following[key] += number * math.comb(count, votes)
            ways = following
        for (size, ties), number in ways.items():
            rest = k - top - size
            won += Fraction(math.comb(own, top) * number * math.comb(silent, rest), ties + 1)
    return won


def _variance_of_mean(outcomes: Sequence[bool]) -> float:
    """Unbiased estimate of the variance of the mean of Bernoulli draws; 0 from a single one, whose
    spread cannot be seen."""
    count = len(outcomes)
    return variance(map(float, outcomes)) / count if count > 1 else 0.0


def _interval(
    mean: float, error: float, count: int, method: str, degrees: int | None = None
) -> Interval:
    """mean ± quantile x error. A spread of zero would claim certainty: then Wilson's interval, as
    if there were `count` independent draws."""
    from scipy import stats  # half a second to import

    tail = (1 + CONFIDENCE) / 2
    if error == 0.0:
        z = float(stats.norm.ppf(tail))
        centre = (mean + z * z / (2 * count)) / (1 + z * z / count)
        half = (
            z
            / (1 + z * z / count)
            * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
        )
        # At 0 and 1 one end is the mean itself, but for rounding.
        low, high = min(mean, centre - half), max(mean, centre + half)
        return _within(low, high, f"Wilson, {count} draws without spread")
    quantile = float(stats.norm.ppf(tail) if degrees is None else stats.t.ppf(tail, degrees))
    return _within(mean - quantile * error, mean + quantile * error, method)


def _within(low: float, high: float, method: str) -> Interval:
    return Interval(max(0.0, low), min(1.0, high), f"{CONFIDENCE:.0%} {method}")
