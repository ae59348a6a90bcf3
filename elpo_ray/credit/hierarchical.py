"""Hierarchical advantages of ELPO (Eq. 6-10 of arXiv 2602.09598).

The root, the prompt, may branch but gets no advantage: its tokens are not the agent's. A node all
of whose leaves lack a verdict is left out of its parent's mean and of its siblings. Parents come
before children in `tree.nodes`, so each level is one pass over the nodes, however deep the tree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from elpo_ray.config.algorithm import CreditConfig
from elpo_ray.credit.group import among, standardize
from elpo_ray.credit.parts import Parts, any_leaf, rewards
from elpo_ray.tree import RolloutTree


def parts(trees: Sequence[RolloutTree], config: CreditConfig) -> list[Parts]:
    """λ A_b + (1 - λ) A_t (Eq. 10)."""
    return [
        Parts(
            leaf=among(rewards(tree), config),
            node=branch_level(tree, config),
            leaf_factor=1 - config.lam,
            node_factor=config.lam,
        )
        for tree in trees
    ]


def step_rewards(tree: RolloutTree) -> list[float]:
    """r (Eq. 6): a leaf's reward; elsewhere the unweighted mean over the direct children, not over
    the leaves. 0 where no leaf below has a verdict. Shape: [num_nodes]."""
    r = [0.0] * len(tree.nodes)
    graded = _graded(tree)
    for node in reversed(tree.nodes):
        if node.score is not None:
            r[node.id] = node.score.reward if graded[node.id] else 0.0
        elif graded[node.id]:
            known = [r[child] for child in node.children if graded[child]]
            r[node.id] = math.fsum(known) / len(known)
    return r


def branch_level(tree: RolloutTree, config: CreditConfig) -> list[float]:
    """A_b (Eq. 7): a node's z-score among its siblings. An only child inherits its parent's; a
    nested branching replaces it. Shape: [num_nodes]."""
    a_branch = [0.0] * len(tree.nodes)
    r, graded = step_rewards(tree), _graded(tree)
    for node in tree.nodes:
        known = [child for child in node.children if graded[child]]
        if len(known) == 1:
            a_branch[known[0]] = a_branch[node.id]
        else:
            scores = standardize([r[child] for child in known], config)
            for child, advantage in zip(known, scores, strict=True):
                a_branch[child] = advantage
    return a_branch


def _graded(tree: RolloutTree) -> list[bool]:
    """Whether a leaf with a verdict lies at or below a node. Shape: [num_nodes]."""
    return any_leaf(tree, lambda score: score.graded)
