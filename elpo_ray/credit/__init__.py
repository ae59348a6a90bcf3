"""How finished trees become one advantage, one clip bound and one share of weight per node.

One interface for every rule: `assign` takes the trees of a whole training batch, because some rules
compare across inputs. A rule only says how good leaves and nodes are (`parts.Parts`); how that is
spread over nodes that several leaves share is the same for all. Rules are pure functions of
shapes, rewards and localizations (two of them also read token counts or tool responses), in float64
and without torch. `python -m elpo_ray.credit` applies them to dumped trees.

A rule of the user's is named by its dotted path and checked as it is used: what it returns must fit
the trees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elpo_ray.config.algorithm import AlgorithmConfig, CreditConfig, CreditRule
from elpo_ray.config.dotted import check_call, is_path, load_object
from elpo_ray.credit import (
    contrast,
    group,
    group_each,
    hierarchical,
    step_group,
    tree_group,
    whitened,
)
from elpo_ray.credit.clip import clip_low
from elpo_ray.credit.parts import Parts, leaf_mean, rewards, shares, signed, trained
from elpo_ray.tree import RolloutTree

Array = NDArray[np.float64]

KEY = "algorithm.credit.rule"

RULES: dict[str, Callable[[Sequence[RolloutTree], CreditConfig], list[Parts]]] = {
    CreditRule.hierarchical: hierarchical.parts,
    CreditRule.group: group.parts,
    CreditRule.whitened: whitened.parts,
    CreditRule.tree_group: tree_group.parts,
    CreditRule.step_group: step_group.parts,
    CreditRule.group_each: group_each.parts,
    CreditRule.contrast: contrast.parts,
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

    trained: NDArray[np.bool_]
    """Whether a leaf trains a node. Shape: [num_leaves, num_nodes]."""

    @property
    def loosest_clip_low(self) -> Array:
        """The lowest bound that any leaf has on a node."""
        return self.clip_low if self.clip_low.ndim == 1 else self.clip_low.min(axis=0)


def assign(trees: Sequence[RolloutTree], config: AlgorithmConfig) -> list[Credit]:
    """Credit of every tree of a training batch by `config.credit` and `config.clip`.

    Raises ValueError on a bare dump that lacks what the rule reads of a node, and if a rule of the
    user's cannot be loaded, fails, or returns what does not fit the trees.
    """
    rule = _own_parts if is_path(config.credit.rule) else RULES[config.credit.rule]
    all_parts = rule(trees, config.credit)
    return [_credit(tree, parts, config) for tree, parts in zip(trees, all_parts, strict=True)]


def check(config: CreditConfig) -> None:
    """ValueError if the rule is the user's and cannot be used as configured."""
    if is_path(config.rule):
        where = f"{KEY}={config.rule!r}"
        check_call(where, load_object(KEY, config.rule), ("trees", "config"), config.options)


def _own_parts(trees: Sequence[RolloutTree], config: CreditConfig) -> list[Parts]:
    check(config)
    where, rule = f"{KEY}={config.rule!r}", load_object(KEY, config.rule)
    try:
        found = rule(trees, config, **config.options)
    except Exception as fault:  # the user's code is a boundary
        raise ValueError(f"{where}: raised {type(fault).__name__}: {fault}; mend it") from fault
    if not isinstance(found, list) or not all(isinstance(each, Parts) for each in found):
        raise ValueError(f"{where}: it must return a list of elpo_ray.credit.parts.Parts")
    if len(found) != len(trees):
        raise ValueError(f"{where}: it returned {len(found)} Parts for {len(trees)} trees")
    for tree, parts in zip(trees, found, strict=True):
        wrong = _unfit(tree, parts)
        if wrong:
            raise ValueError(f"{where}: tree {tree.task_id}: {wrong}")
    return found


def _unfit(tree: RolloutTree, parts: Parts) -> str:
    """What of a rule's answer does not fit the tree; empty if all does."""
    unknown = sorted(set(parts.leaf) - set(rewards(tree)))
    if unknown:
        return f"Parts.leaf has node {unknown[0]}, which is no graded leaf; leave it out"
    if len(parts.node) != len(tree.nodes):
        return f"Parts.node has {len(parts.node)} values for {len(tree.nodes)} nodes"
    values: list[Any] = [parts.leaf_factor, parts.node_factor]
    if not all(map(math.isfinite, chain(values, parts.leaf.values(), parts.node))):
        return "Parts holds a number that is not finite"
    return ""


def _credit(tree: RolloutTree, parts: Parts, config: AlgorithmConfig) -> Credit:
    gain, negative_advantage = signed(tree, parts, config.credit)
    gain_or_loss = [max(pair) for pair in zip(gain, negative_advantage, strict=True)]
    return Credit(
        r=np.array(hierarchical.step_rewards(tree)),
        a_branch=np.array(parts.node),
        a_traj=np.array(leaf_mean(tree, parts.leaf)),
        advantage=np.array(gain) - np.array(negative_advantage),
        negative_advantage=np.array(negative_advantage),
        share=np.array(shares(tree, config.credit.weighting)),
        clip_low=np.array(clip_low(tree, config.clip)),
        trained=np.array(trained(tree, gain_or_loss, config.credit), dtype=bool),
    )
