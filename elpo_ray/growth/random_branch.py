"""Branching at prefixes drawn at random: Tree-GRPO (arXiv 2509.21240), and ELPO without BEL.

Several trees of one input hang on one prompt; each leaf's `Node.group` says of which it is. A node
is drawn with replacement from the prompt and all inner nodes of the tree that it is drawn for.
"""

from __future__ import annotations

from collections.abc import Sequence

from elpo_ray.config.growth import GrowthConfig
from elpo_ray.growth.independent import sample, sample_each
from elpo_ray.interfaces import Rollout
from elpo_ray.tree import RolloutTree


async def grow(rollout: Rollout, config: GrowthConfig) -> None:
    """M trees of `chains` trajectories from the prompt, then L rounds: the rollouts left are dealt
    out evenly, and each completes one drawn prefix. All draws of a round come before its first
    completion. (M, N, L) of the paper is trees=M, chains=1, rounds=L with N_total = M (1 + N L)."""
    cfg = config.random
    chains = await sample(rollout, cfg.trees * cfg.chains)
    trees = [chains[i * cfg.chains : (i + 1) * cfg.chains] for i in range(cfg.trees)]
    for rounds_left in range(cfg.rounds, 0, -1):
        dealt = deal(rollout.remaining // rounds_left, cfg.trees)
        owners = [i for i, count in enumerate(dealt) for _ in range(count)]
        nodes = [rollout.random.choice(prefixes(rollout.tree, trees[i])) for i in owners]
        starts = [(node, len(rollout.tree.path(node)) or None) for node in nodes]
        for i, leaf in zip(owners, await sample_each(rollout, starts), strict=True):
            trees[i].append(leaf)
    for i, leaves in enumerate(trees):
        for leaf in leaves:
            rollout.tree.nodes[leaf].group = i


def deal(count: int, hands: int) -> list[int]:
    """`count` split over `hands` as evenly as possible, the first ones getting more."""
    each, extra = divmod(count, hands)
    return [each + (i < extra) for i in range(hands)]


def prefixes(tree: RolloutTree, leaves: Sequence[int]) -> list[int]:
    """The prompt and the inner nodes above `leaves`, in an order that does not depend on which
    completion finished first."""
    found = {0: None} | {node: None for leaf in leaves for node in tree.path(leaf)[:-1]}
    return list(found)
