"""Trajectory-level group advantages: GRPO's z-score over the leaves of one input, and the
trajectory level of ELPO (Eq. 8, 9), which is the same thing seen from the nodes of a tree.

Invariant: independent of the order of leaves and siblings (exactly rounded sums). Linear time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from elpo_ray.config.algorithm import CreditConfig
from elpo_ray.credit.parts import Parts, rewards
from elpo_ray.tree import RolloutTree

SIGMA_MIN = 1e-12
"""Relative spread below which values count as equal: what is left is rounding."""


def parts(trees: Sequence[RolloutTree], config: CreditConfig) -> list[Parts]:
    """A_t of every leaf: its z-score over all leaves of its input (Eq. 8)."""
    return [Parts(among(rewards(tree), config), [0.0] * len(tree.nodes)) for tree in trees]


def among(values: Mapping[int, float], config: CreditConfig) -> dict[int, float]:
    """`standardize` of a mapping's values, by its keys."""
    return dict(zip(values, standardize(list(values.values()), config), strict=True))


def standardize(values: Sequence[float], config: CreditConfig) -> list[float]:
    """z-scores (x - μ) / (σ + ε) with `config.ddof`, or x - μ without `config.divide_by_std`; all 0
    for equal values and for one alone."""
    count = len(values)
    if count < 2:
        return [0.0] * count
    mean = math.fsum(values) / count
    sigma = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (count - config.ddof))
    if sigma < SIGMA_MIN * max(1.0, abs(mean)):
        return [0.0] * count
    return [(x - mean) / (sigma + config.eps if config.divide_by_std else 1.0) for x in values]
