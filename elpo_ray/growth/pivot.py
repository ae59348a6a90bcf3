"""Many branches at one prefix of a failed trajectory: DEEP-GRPO (arXiv 2602.14169).

Which prefix is drawn at random. Late ones are preferred, and those from which a branch is likely to
succeed, as far as earlier branchings show (`recoverability`). A completion of the prompt may be a
branch too: what is compared with what is said by the tree's branches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from elpo_ray.config.growth import GrowthConfig, PivotConfig, PivotModel
from elpo_ray.growth.bel import num_tool_steps, outcome
from elpo_ray.growth.independent import sample, sample_each
from elpo_ray.interfaces import Rollout
from elpo_ray.tree import Branch

Start = tuple[int, int | None]
"""Node, and anchor for the ledger: None at the prompt."""


async def grow(rollout: Rollout, config: GrowthConfig) -> None:
    """Trajectories from the prompt; branches of the first failed ones; the rest from the prompt."""
    cfg, tree = config.pivot, rollout.tree
    roots = await sample(rollout, cfg.roots)
    failed = [leaf for leaf in roots if outcome(tree, leaf) is False][: cfg.chains]
    counts = shared_out(rollout.remaining, cfg.branches, len(failed))
    parents = [(leaf, count) for leaf, count in zip(failed, counts, strict=True) if count]
    anchors = [draw_pivot(rollout, num_tool_steps(tree.steps(leaf)), cfg) for leaf, _ in parents]
    starts: list[Start] = []
    for (leaf, count), anchor in zip(parents, anchors, strict=True):
        starts += [start_of(rollout, leaf, anchor)] * count
    rest: list[Start] = [(0, None)] * (rollout.remaining - len(starts))
    leaves = await sample_each(rollout, [*starts, *rest])
    for (parent, count), anchor in zip(parents, anchors, strict=True):
        own, leaves = leaves[:count], leaves[count:]
        tree.branches.append(Branch(parent, anchor, own, own))


def shared_out(budget: int, each: int, parents: int) -> list[int]:
    """How many completions each of the parents gets, first come first served."""
    return [max(0, min(each, budget - each * i)) for i in range(parents)]


def start_of(rollout: Rollout, leaf: int, anchor: int) -> Start:
    """Where a completion of the first `anchor` steps of a trajectory begins."""
    return (rollout.tree.path(leaf)[anchor - 1], anchor) if anchor else (0, None)


def draw_pivot(rollout: Rollout, num_tool_steps: int, cfg: PivotConfig) -> int:
    """An anchor of 0..K, by `weights`."""
    candidates = range(num_tool_steps + 1)
    (drawn,) = rollout.random.choices(candidates, weights=weights(num_tool_steps, cfg))
    return drawn


def place(anchor: int, num_tool_steps: int) -> float:
    """r = (m + 1) / (K + 2): the anchor's place in the chain over the chain's length, the prompt
    counted."""
    return (anchor + 1) / (num_tool_steps + 2)


def weights(num_tool_steps: int, cfg: PivotConfig) -> Sequence[float]:
    """Q(m) of the anchors m = 0..K, not normalised: P(r_m) r_m^γ. Shape: [K + 1]."""
    places = [place(anchor, num_tool_steps) for anchor in range(num_tool_steps + 1)]
    if cfg.model is PivotModel.random:
        return [1.0] * len(places)
    late = [r**cfg.gamma for r in places]
    if cfg.model is PivotModel.uniform or cfg.coefficients is None:
        return late
    w, b = cfg.coefficients
    return [0.5 * (1 + math.tanh((w * r + b) / 2)) * q for r, q in zip(places, late, strict=True)]
