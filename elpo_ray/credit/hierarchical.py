"""Hierarchical advantages of ELPO (Eq. 6-10 of arXiv 2602.09598).

The root, the prompt, may branch but gets no advantage: its tokens are not the agent's. Parents come
before children in `tree.nodes`, so each level is one pass over the nodes, however deep the tree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from elpo_ray.config import CreditConfig
from elpo_ray.credit.group import standardize
from elpo_ray.tree import RolloutTree


def step_rewards(tree: RolloutTree) -> list[float]:
    """r (Eq. 6): a leaf's reward; elsewhere the unweighted mean over the direct children, not over
    the leaves. Shape: [num_nodes]."""
    r = [0.0] * len(tree.nodes)
    for node in reversed(tree.nodes):
        if node.score is not None:
            r[node.id] = node.score.reward
        else:
            r[node.id] = math.fsum(r[child] for child in node.children) / len(node.children)
    return r


def branch_level(tree: RolloutTree, r: Sequence[float], config: CreditConfig) -> list[float]:
    """A_b (Eq. 7): a node's z-score among its siblings. An only child inherits its parent's; a
    nested branching replaces it. Shape: [num_nodes]."""
    a_branch = [0.0] * len(tree.nodes)
    for node in tree.nodes:
        if len(node.children) == 1:
            a_branch[node.children[0]] = a_branch[node.id]
        else:
            scores = standardize([r[child] for child in node.children], config)
            for child, advantage in zip(node.children, scores, strict=True):
                a_branch[child] = advantage
    return a_branch


def combine(a_branch: Sequence[float], a_traj: Sequence[float], lam: float) -> list[float]:
    """λ A_b + (1 - λ) A_t (Eq. 10)."""
    return [lam * b + (1 - lam) * t for b, t in zip(a_branch, a_traj, strict=True)]
