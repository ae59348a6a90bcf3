"""What a credit rule says of one tree, and how that becomes advantages of nodes.

Invariants: a leaf without a verdict takes part in nothing and has no advantage; the root, whose
tokens are the prompt's, has none either; gain and negative_advantage are >= 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from elpo_ray.config.algorithm import (
    AfterIrrecoverable,
    Attribution,
    BranchParent,
    CreditConfig,
    Train,
    Weighting,
)
from elpo_ray.tree import RolloutTree
from elpo_ray.types import Score

ZERO = 1e-8
"""A smaller advantage counts as 0 under `skip_zero`."""


@dataclass(frozen=True, slots=True)
class Parts:
    """The advantage of leaf l at node n is leaf_factor * leaf[l] + node_factor * node[n]."""

    leaf: Mapping[int, float]
    """Values by node id, of graded leaves only."""
    node: Sequence[float]
    """Shape: [num_nodes]."""
    leaf_factor: float = 1.0
    """Weight of the leaves' values."""
    node_factor: float = 0.0
    """Weight of the nodes' values."""


def rewards(tree: RolloutTree) -> dict[int, float]:
    """Terminal rewards by leaf id, of the leaves that have a verdict, but for those that their
    branch did not keep."""
    dropped = {leaf for branch in tree.branches for leaf in set(branch.leaves) - set(branch.kept)}
    return {
        leaf.id: leaf.score.reward
        for leaf in tree.leaves()
        if leaf.score is not None and leaf.score.graded and leaf.id not in dropped
    }


def judged(tree: RolloutTree, config: CreditConfig) -> dict[int, float]:
    """`rewards` of the leaves that take part: without those that a branch continued, if they are
    dropped (`config.parent`)."""
    parents = {branch.parent for branch in tree.branches}
    if config.parent is BranchParent.keep:
        parents.clear()
    return {leaf: value for leaf, value in rewards(tree).items() if leaf not in parents}


def leaf_mean(tree: RolloutTree, leaf: Mapping[int, float]) -> list[float]:
    """The mean of `leaf` over the leaves at or below each node; 0 without any and at the
    root. Shape: [num_nodes]."""
    total = [leaf.get(node.id, 0.0) for node in tree.nodes]
    count = [int(node.id in leaf) for node in tree.nodes]
    for parent, child in reversed(tree.edges()):
        total[parent] += total[child]
        count[parent] += count[child]
    return [0.0] + [t / c if c else 0.0 for t, c in zip(total[1:], count[1:], strict=True)]


def signed(
    tree: RolloutTree, parts: Parts, config: CreditConfig
) -> tuple[list[float], list[float]]:
    """Positive and negative part of every node's advantage; the advantage is their difference.

    With `attribution=each` they are means of the parts of the leaves that have a verdict: the
    clipped objective is linear in them, hence that of the leaves as flat sequences.
    """
    if config.train is Train.own:
        values = [parts.leaf.get(owner, 0.0) for owner in tree.owners()]
    else:
        values = leaf_mean(tree, parts.leaf)
    if config.attribution is Attribution.mean:
        advantage = [
            parts.node_factor * n + parts.leaf_factor * t
            for n, t in zip(parts.node, values, strict=True)
        ]
        gain = [max(a, 0.0) for a in advantage]
        negative_advantage = [max(-a, 0.0) for a in advantage]
    else:
        gain, negative_advantage = _each(tree, parts)
    gain[0] = negative_advantage[0] = 0.0
    if config.after_irrecoverable is AfterIrrecoverable.neutral:
        alive = recoverable(tree)
        for parent, child in tree.edges():
            if not alive[parent]:
                gain[child] = negative_advantage[child] = 0.0
    return gain, negative_advantage


def _each(tree: RolloutTree, parts: Parts) -> tuple[list[float], list[float]]:
    gain, negative_advantage = [0.0] * len(tree.nodes), [0.0] * len(tree.nodes)
    for node, below in enumerate(_graded_below(tree)):
        local = parts.node_factor * parts.node[node]
        own = [parts.leaf_factor * parts.leaf[i] + local for i in below]
        if own:
            gain[node] = sum(max(a, 0.0) for a in own) / len(own)
            negative_advantage[node] = sum(max(-a, 0.0) for a in own) / len(own)
    return gain, negative_advantage


def shares(tree: RolloutTree, weighting: Weighting) -> list[float]:
    """What multiplies the weight that every leaf gives to a node: 1, or under `node` one over the
    leaves with a verdict below, so that they together count once. Shape: [num_nodes]."""
    if weighting is Weighting.leaf:
        return [1.0] * len(tree.nodes)
    return [1.0] + [1 / max(len(below), 1) for below in _graded_below(tree)[1:]]


def trained(
    tree: RolloutTree, advantage: Sequence[float], config: CreditConfig
) -> list[list[bool]]:
    """Whether a leaf trains a node: one on its path, with `train=own` one that it sampled itself.
    Leaves that take no part train nothing; with `skip_zero` nor do those whose every such node has
    advantage 0. Shape: (num_leaves, num_nodes), leaves in the order of `tree.leaves`."""
    known, owners = judged(tree, config), tree.owners()
    rows = []
    for leaf in tree.leaves():
        row = [False] * len(tree.nodes)
        for node in tree.path(leaf.id) if leaf.id in known else ():
            row[node] = config.train is Train.path or owners[node] == leaf.id
        own = [abs(a) for a, here in zip(advantage, row, strict=True) if here]
        if config.skip_zero and max(own, default=0.0) < ZERO:
            row = [False] * len(tree.nodes)
        rows.append(row)
    return rows


def _graded_below(tree: RolloutTree) -> list[list[int]]:
    """The leaves with a verdict at or below every node. Shape: [num_nodes][...]."""
    known = rewards(tree)
    return [[leaf for leaf in below if leaf in known] for below in tree.leaves_below()]


def recoverable(tree: RolloutTree) -> list[bool]:
    """Whether a successful leaf lies at or below a node. Shape: [num_nodes]."""
    return any_leaf(tree, lambda score: score.success)


def any_leaf(tree: RolloutTree, holds: Callable[[Score], bool]) -> list[bool]:
    """Whether `holds` is true of a leaf at or below a node. Shape: [num_nodes]."""
    found = [node.score is not None and holds(node.score) for node in tree.nodes]
    for parent, child in reversed(tree.edges()):
        found[parent] |= found[child]
    return found
