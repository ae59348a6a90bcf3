"""How a finished tree becomes one advantage and one clip bound per node.

Pure functions of the tree's shape, rewards and localizations; float64; no torch. All agent tokens
of a node share its values. `python -m elpo_ray.credit` applies them to dumped trees.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elpo_ray.config import AlgorithmConfig, CreditRule
from elpo_ray.credit.clip import clip_low
from elpo_ray.credit.group import trajectory_level
from elpo_ray.credit.hierarchical import branch_level, combine, step_rewards
from elpo_ray.tree import RolloutTree

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Credit:
    """Values per node, indexed by node id. Shape of each: [num_nodes]."""

    r: Array
    """Step reward (Eq. 6)."""
    a_branch: Array
    """Branch-level advantage (Eq. 7); 0 under the group rule."""
    a_traj: Array
    """Trajectory-level advantage (Eq. 8, 9); GRPO's advantage, averaged over a node's leaves."""
    advantage: Array
    """What the loss uses; 0 at the root."""
    blame: Array
    """Its negative part, >= 0; the positive part is advantage + blame."""
    share: Array
    """Multiplies the weight of the node's tokens in the loss."""
    clip_low: Array
    """Lower bound of the probability ratio, 1 - ε_low^t (Eq. 11)."""


def assign(tree: RolloutTree, config: AlgorithmConfig) -> Credit:
    """Credit of every node by `config.credit` and `config.clip`."""
    r = step_rewards(tree)
    a_traj = trajectory_level(tree, config.credit)
    match config.credit.rule:
        case CreditRule.hierarchical:
            a_branch = branch_level(tree, r, config.credit)
            advantage = combine(a_branch, a_traj, config.credit.lam)
        case CreditRule.group:
            a_branch = [0.0] * len(tree.nodes)
            advantage = a_traj
    return Credit(
        r=np.array(r),
        a_branch=np.array(a_branch),
        a_traj=np.array(a_traj),
        advantage=np.array(advantage),
        blame=np.maximum(-np.array(advantage), 0.0),
        share=np.ones(len(tree.nodes)),
        clip_low=np.array(clip_low(tree, config.clip)),
    )
