"""Trajectory-level group advantages: GRPO's z-score over the leaves of one input, and the
trajectory level of ELPO (Eq. 8, 9), which is the same thing seen from the nodes of a tree.

Invariant: independent of the order of leaves and siblings (exactly rounded sums). Linear time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from elpo_ray.config import CreditConfig
from elpo_ray.tree import RolloutTree

SIGMA_MIN = 1e-12
"""Relative spread below which values count as equal: what is left is rounding."""


def standardize(values: Sequence[float], config: CreditConfig) -> list[float]:
    """z-scores (x - μ) / (σ + ε) with `config.ddof`; all 0 for equal values and for one alone."""
    count = len(values)
    if count < 2:
        return [0.0] * count
    mean = math.fsum(values) / count
    sigma = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (count - config.ddof))
    if sigma < SIGMA_MIN * max(1.0, abs(mean)):
        return [0.0] * count
    return [(x - mean) / (sigma + config.eps) for x in values]


def trajectory_level(tree: RolloutTree, config: CreditConfig) -> list[float]:
    """A_t per node: the mean over the leaves below it of their z-score over all leaves (Eq. 8, 9).
    The root has none. Shape: [num_nodes]."""
    leaves = tree.leaves()
    rewards = [leaf.score.reward for leaf in leaves if leaf.score is not None]
    total = [0.0] * len(tree.nodes)
    count = [0] * len(tree.nodes)
    for leaf, advantage in zip(leaves, standardize(rewards, config), strict=True):
        total[leaf.id], count[leaf.id] = advantage, 1
    for parent, child in reversed(tree.edges()):
        total[parent] += total[child]
        count[parent] += count[child]
    return [0.0] + [total[i] / count[i] for i in range(1, len(tree.nodes))]
