"""Groups that are never pooled: DEEP-GRPO (arXiv 2602.14169), SRPO and RRPO (2605.25507).

The trajectories from the prompt are one group of an input; the completions of each prefix that was
branched at are another.
"""

from __future__ import annotations

from collections.abc import Sequence

from elpo_ray.config.algorithm import CreditConfig
from elpo_ray.credit.group import among
from elpo_ray.credit.parts import Parts, judged
from elpo_ray.tree import RolloutTree


def parts(trees: Sequence[RolloutTree], config: CreditConfig) -> list[Parts]:
    """The z-score of a leaf's reward among the leaves of its group."""
    return [Parts(_leaf_level(tree, config), [0.0] * len(tree.nodes)) for tree in trees]


def _leaf_level(tree: RolloutTree, config: CreditConfig) -> dict[int, float]:
    left = judged(tree, config)
    advantage: dict[int, float] = {}
    for branch in tree.branches:
        own = {leaf: left.pop(leaf) for leaf in branch.kept if leaf in left}
        advantage |= among(own, config)
    return advantage | among(left, config)
