"""Tree-GRPO (arXiv 2509.21240): advantages within an input's leaves and within one of its trees.

Several trees of one input hang on one prompt here. `Node.group` of a leaf names its tree; leaves
without a group form one tree together.
"""

from __future__ import annotations

from collections.abc import Sequence

from elpo_ray.config.algorithm import CreditConfig
from elpo_ray.credit.group import among
from elpo_ray.credit.parts import Parts, rewards
from elpo_ray.tree import RolloutTree


def parts(trees: Sequence[RolloutTree], config: CreditConfig) -> list[Parts]:
    """z over the input's leaves + z over the leaves of the same tree; a tree of one leaf adds 0,
    where the original adds its raw reward."""
    return [Parts(_leaf_level(tree, config), [0.0] * len(tree.nodes)) for tree in trees]


def _leaf_level(tree: RolloutTree, config: CreditConfig) -> dict[int, float]:
    values = rewards(tree)
    advantage = among(values, config)
    for group in {tree.nodes[leaf].group for leaf in values}:
        own = {leaf: value for leaf, value in values.items() if tree.nodes[leaf].group == group}
        for leaf, within in among(own, config).items():
            advantage[leaf] += within
    return advantage
