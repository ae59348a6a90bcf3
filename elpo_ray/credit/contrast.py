"""BranPO (arXiv 2602.03719): beginnings of trajectories compared with each other, and ends.

A trajectory from the prompt, a base, is split where its last completion began, kept or not; without
any two steps before its end. What comes before is judged by the base and its kept completion
together, what comes after by its own reward. A kept completion is an end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from elpo_ray.config.algorithm import CreditConfig, Norm
from elpo_ray.credit.group import among
from elpo_ray.credit.parts import Parts, rewards
from elpo_ray.tree import RolloutTree

UNTRIED_DEPTH = 2
"""Steps before its end where a base without completions is split."""


@dataclass(slots=True)
class Base:
    """A base with a verdict."""

    leaf: int
    anchor: int
    """Steps before the split."""
    kept: int | None = None
    """Its kept completion, if that has a verdict."""


def parts(trees: Sequence[RolloutTree], config: CreditConfig) -> list[Parts]:
    """z of the mean reward of a base and its kept completion on the base's beginning; z of the
    reward on ends, but 0 for the longer of two successes."""
    return [
        Parts({}, _node_level(tree, config), leaf_factor=0.0, node_factor=1.0) for tree in trees
    ]


def _node_level(tree: RolloutTree, config: CreditConfig) -> list[float]:
    known = rewards(tree)
    bases = _bases(tree, known)
    beginnings: dict[int, float] = {}
    for base in bases:
        if base.anchor:
            own = [known[base.leaf]] + ([] if base.kept is None else [known[base.kept]])
            beginnings[base.leaf] = math.fsum(own) / len(own)
    of_beginning = among(beginnings, config)
    of_end = _ends(tree, known, bases, config)
    nodes = [0.0] * len(tree.nodes)
    for base in bases:
        path = tree.path(base.leaf)
        for node in path[: base.anchor]:
            nodes[node] = of_beginning[base.leaf]
        for node in path[base.anchor :]:
            nodes[node] = of_end[base.leaf]
        if base.kept is not None:
            for node in tree.path(base.kept)[base.anchor :]:
                nodes[node] = of_end[base.kept]
    return nodes


def _bases(tree: RolloutTree, known: dict[int, float]) -> list[Base]:
    """The leaves from the prompt that have a verdict, by id."""
    completions = {leaf for branch in tree.branches for leaf in branch.leaves}
    found = {
        leaf: Base(leaf, max(0, len(tree.path(leaf)) - UNTRIED_DEPTH))
        for leaf in known
        if leaf not in completions
    }
    for branch in tree.branches:  # in the order asked: the last one stays
        base = found.get(branch.parent)
        if base is not None:
            base.anchor = branch.anchor
            base.kept = next((leaf for leaf in branch.kept if leaf in known), base.kept)
    return list(found.values())


def _ends(
    tree: RolloutTree, known: dict[int, float], bases: Sequence[Base], config: CreditConfig
) -> dict[int, float]:
    """Advantages of the ends of bases and kept completions, by leaf."""
    pairs = [[base.leaf] + ([] if base.kept is None else [base.kept]) for base in bases]
    compared = pairs if config.norm is Norm.pair else [[leaf for pair in pairs for leaf in pair]]
    found: dict[int, float] = {}
    for leaves in compared:
        found |= among({leaf: known[leaf] for leaf in leaves}, config)
    for base in bases:
        worse = None if base.kept is None else _worse(tree, base.leaf, base.kept)
        if worse is not None and found[worse] > 0:
            found[worse] = 0.0
    return found


def _worse(tree: RolloutTree, base: int, kept: int) -> int:
    """Which of a base and its kept completion turned out worse: the failed one, or the longer."""
    first, second = tree.nodes[base].score, tree.nodes[kept].score
    assert first is not None and second is not None, "both are leaves"
    if first.success != second.success:
        return kept if first.success else base
    return kept if len(tree.path(kept)) > len(tree.path(base)) else base
