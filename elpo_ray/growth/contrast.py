"""Ends of trajectories completed anew until one turns out otherwise: BranPO (arXiv 2602.03719).

Each trajectory from the prompt, a base, may be continued some times, one, two or three steps before
its end (`depths`). A completion that tells nothing is dropped: it is paid for and not trained on.
The original gives each base its tries for itself; here they are made in rounds, one try a base,
until the budget is spent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from elpo_ray.config.growth import ContrastConfig, GrowthConfig
from elpo_ray.growth.bel import outcome
from elpo_ray.growth.independent import sample, sample_each
from elpo_ray.growth.pivot import start_of
from elpo_ray.interfaces import Rollout
from elpo_ray.tree import Branch, RolloutTree
from elpo_ray.types import EndReason

CUT = (EndReason.TURN_LENGTH, EndReason.CONTEXT)
"""Bases that ended so are not continued."""


@dataclass(slots=True)
class Base:
    """A trajectory from the prompt, and how many steps before its end it will be continued."""

    leaf: int
    length: int
    depths: list[int]


async def grow(rollout: Rollout, config: GrowthConfig) -> None:
    """Bases, rounds of tries, and what is left from the prompt."""
    tree = rollout.tree
    leaves = await sample(rollout, config.contrast.bases)
    rate = success_rate(tree, leaves)
    bases = [
        Base(leaf, len(tree.path(leaf)), depths(tree, leaf, leaves, config.contrast))
        for leaf in leaves
    ]
    while rollout.remaining and (waiting := [base for base in bases if base.depths]):
        tried = waiting[: rollout.remaining]
        anchors = [max(0, base.length - base.depths.pop(0)) for base in tried]
        starts = [start_of(rollout, base.leaf, m) for base, m in zip(tried, anchors, strict=True)]
        for base, anchor, leaf in zip(
            tried, anchors, await sample_each(rollout, starts), strict=True
        ):
            kept = preference(tree, base.leaf, leaf, rate) != 0
            tree.branches.append(Branch(base.leaf, anchor, [leaf], [leaf] if kept else []))
            if kept:
                base.depths.clear()
    await sample(rollout, rollout.remaining)


def success_rate(tree: RolloutTree, leaves: Sequence[int]) -> float:
    """Share of successes among the leaves with a verdict; 0 without any."""
    known = [seen for leaf in leaves if (seen := outcome(tree, leaf)) is not None]
    return sum(known) / len(known) if known else 0.0


def depths(tree: RolloutTree, leaf: int, bases: Sequence[int], cfg: ContrastConfig) -> list[int]:
    """How many steps before its end a base is continued, try by try."""
    success = outcome(tree, leaf)
    if success is None or tree.nodes[leaf].end in CUT:
        return []
    rate = success_rate(tree, bases)
    lengths = [len(tree.path(base)) for base in bases if outcome(tree, base)]
    if 0.5 < rate < 1 and success and len(tree.path(leaf)) - fmean(lengths) >= cfg.long_by:
        return [cfg.depth] * cfg.long_tries
    if rate == 1:
        return [1] * cfg.solved_tries
    if rate < 0.5 and not success:
        return each(cfg.tries, cfg.hard_depth)
    if rate <= 0.75 or not success:
        return each(cfg.tries, cfg.depth)
    return []


def each(tries: int, deepest: int) -> list[int]:
    """`tries` at depth 1, then at depth 2, down to the deepest."""
    return [depth for depth in range(1, deepest + 1) for _ in range(tries)]


def preference(tree: RolloutTree, base: int, leaf: int, rate: float) -> int:
    """+1 if a completion turned out better than its base, -1 if worse, 0 if it tells nothing.
    Where both succeed, and other bases do not, the shorter one is better."""
    if outcome(tree, leaf) is None or tree.nodes[leaf].end is not EndReason.ANSWER:
        return 0
    better = int(bool(outcome(tree, leaf))) - int(bool(outcome(tree, base)))
    if better or not outcome(tree, base) or not 0.5 < rate < 1:
        return better
    longer = len(tree.path(leaf)) - len(tree.path(base))
    return (longer < 0) - (longer > 0)
