"""How finished trees become one advantage, one clip bound and one share of weight per node.

One interface for every rule: `assign` takes the trees of a whole training batch, because some rules
compare across inputs. A rule only says how good leaves and nodes are (`parts.Parts`); how that is
spread over nodes that several leaves share is the same for all. Rules are pure functions of
shapes, rewards and localizations (two of them also read token counts or tool responses), in float64
and without torch. `python -m elpo_ray.credit` applies them to dumped trees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elpo_ray.config.algorithm import AlgorithmConfig, CreditConfig, CreditRule
from elpo_ray.credit import group, hierarchical, step_group, tree_group, whitened
from elpo_ray.credit.clip import clip_low
from elpo_ray.credit.parts import Parts, leaf_mean, shares, signed
from elpo_ray.tree import RolloutTree

Array = NDArray[np.float64]

RULES: dict[CreditRule, Callable[[Sequence[RolloutTree], CreditConfig], list[Parts]]] = {
    CreditRule.hierarchical: hierarchical.parts,
    CreditRule.group: group.parts,
    CreditRule.whitened: whitened.parts,
    CreditRule.tree_group: tree_group.parts,
    CreditRule.step_group: step_group.parts,
}


@dataclass(frozen=True, slots=True)
class Credit:
    """Values per node, indexed by node id. Shape of each, unless it says otherwise: [num_nodes]."""

    r: Array
    """Step reward (Eq. 6)."""
    a_branch: Array
    """Advantage of the node among nodes: Eq. 7, or the step level of `step_group`; else 0."""
    a_traj: Array
    """Advantage of its leaves among leaves, their mean: Eq. 8, 9."""
    advantage: Array
    """What the loss uses; 0 at the root."""
    negative_advantage: Array
    """Its negative part, >= 0; the positive part is advantage + negative_advantage."""
    share: Array
    """Multiplies the weight of the node's tokens in the loss."""
    clip_low: Array
    """Lower bound of the probability ratio, 1 - ε_low^t (Eq. 11). Shape: [num_nodes], or
    [num_leaves, num_nodes] where it depends on the leaf, in the order of `RolloutTree.leaves`."""

    @property
    def loosest_clip_low(self) -> Array:
        """The lowest bound that any leaf has on a node."""
        return self.clip_low if self.clip_low.ndim == 1 else self.clip_low.min(axis=0)


def assign(trees: Sequence[RolloutTree], config: AlgorithmConfig) -> list[Credit]:
    """Credit of every tree of a training batch by `config.credit` and `config.clip`.

    Raises ValueError on a bare dump that lacks what the rule reads of a node.
    """
    all_parts = RULES[config.credit.rule](trees, config.credit)
    return [_credit(tree, parts, config) for tree, parts in zip(trees, all_parts, strict=True)]


def _credit(tree: RolloutTree, parts: Parts, config: AlgorithmConfig) -> Credit:
    gain, negative_advantage = signed(tree, parts, config.credit)
    return Credit(
        r=np.array(hierarchical.step_rewards(tree)),
        a_branch=np.array(parts.node),
        a_traj=np.array(leaf_mean(tree, parts.leaf)),
        advantage=np.array(gain) - np.array(negative_advantage),
        negative_advantage=np.array(negative_advantage),
        share=np.array(shares(tree, config.credit.weighting)),
        clip_low=np.array(clip_low(tree, config.clip)),
    )
