"""GiGPO (arXiv 2505.10978): trajectories compared as wholes, steps with steps from equal states.

The state before the first step is the prompt, before a later one the last tool response, blanks
aside. A step shared by several leaves is taken once by each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from elpo_ray.config.algorithm import CreditConfig
from elpo_ray.credit.group import among, standardize
from elpo_ray.credit.nodes import observation
from elpo_ray.credit.parts import Parts, rewards
from elpo_ray.tree import RolloutTree


def parts(trees: Sequence[RolloutTree], config: CreditConfig) -> list[Parts]:
    """A^E + ω A^S: the z-score of the reward over the input's leaves, and that of the discounted
    return over the steps of the input that left from the same state."""
    return [
        Parts(
            leaf=among(rewards(tree), config),
            node=step_level(tree, config),
            node_factor=config.step.omega,
        )
        for tree in trees
    ]


def step_level(tree: RolloutTree, config: CreditConfig) -> list[float]:
    """A^S: step t of a trajectory of T steps returns G = gamma^(T - t) R; its z-score in its group,
    0 alone. A shared node has the mean over its leaves. Shape: [num_nodes]."""
    groups: defaultdict[str | None, list[tuple[int, float]]] = defaultdict(list)
    for leaf, reward in rewards(tree).items():
        path = tree.path(leaf)
        for t, node in enumerate(path):
            state = None if t == 0 else " ".join(observation(tree, path[t - 1]).split())
            groups[state].append((node, config.step.gamma ** (len(path) - 1 - t) * reward))
    taken: defaultdict[int, list[float]] = defaultdict(list)
    for steps in groups.values():
        scores = standardize([value for _, value in steps], config)
        for (node, _), score in zip(steps, scores, strict=True):
            taken[node].append(score)
    return [sum(taken[i]) / len(taken[i]) if i in taken else 0.0 for i in range(len(tree.nodes))]
