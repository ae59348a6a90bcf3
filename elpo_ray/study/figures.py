"""What several runs show together: means and 95 % intervals over seeds, paired differences, areas.

Intervals are t intervals over seeds: they say how far another draw of seeds may lead. A difference
is paired: two arms with one seed began with the same cold start and met the same problems.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev

from elpo_ray.evaluation.estimators import CONFIDENCE
from elpo_ray.study.record import Record

Curve = Sequence[tuple[float, float]]
"""(spent, pass@1), ascending."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    half: float | None
    """Half of the 95 % interval; None from a single seed."""
    count: int


def estimate(values: Sequence[float]) -> Estimate | None:
    """The mean of one value a seed; None of nothing."""
    if not values:
        return None
    count = len(values)
    if count == 1:
        return Estimate(values[0], None, 1)
    from scipy import stats  # half a second to import

    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
    return Estimate(fmean(values), quantile * stdev(values) / math.sqrt(count), count)


def difference(one: Mapping[int, float], other: Mapping[int, float]) -> Estimate | None:
    """`one` less `other`, over the seeds that both have."""
    return estimate([one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())])


def curve(record: Record, axis: str) -> Curve:
    """Held-out pass@1 against what was spent on an axis of `record.AXES`."""
    return [(float(getattr(point, axis)), point.pass_at_1) for point in record.held_out]


def value_at(points: Curve, spent: float) -> float | None:
    """pass@1 once so much was spent, on a straight line between evaluations; None beyond the
    last one."""
    if not points or spent > points[-1][0]:
        return None
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= spent <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (spent - x0) / (x1 - x0)
    return points[0][1]


def area(points: Curve, until: float) -> float | None:
    """Mean pass@1 from the start until so much was spent: the area under the curve over its
    width; None beyond the last evaluation."""
    end = value_at(points, until)
    if end is None or until <= points[0][0]:
        return None
    inside = [point for point in points if point[0] < until] + [(until, end)]
    pieces = pairwise(inside)
    total = math.fsum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in pieces)
    return total / (until - points[0][0])


def common_budget(curves: Sequence[Curve]) -> float | None:
    """The most that all runs have spent."""
    return min((points[-1][0] for points in curves if points), default=None)
