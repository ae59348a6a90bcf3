"""Which inputs of a step are trained on: all, or by DAPO's dynamic sampling those with contrast.

Dynamic sampling (arXiv 2503.14476) grows further inputs until enough of them have both a success
and a failure. Every grown input spends its whole budget and is charged, kept or not; when the
batches run out, what was kept is trained on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from elpo_ray.config.growth import DynamicSamplingConfig
from elpo_ray.tree import RolloutTree
from elpo_ray.types import Problem

Grown = tuple[Problem, RolloutTree]


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What one step has grown and what it trains on."""

    grown: list[Grown]
    trained: list[RolloutTree]
    """The trees to train on, in the order grown; at most as many as wanted."""
    taken: int
    """Inputs of the training stream that were used up, those that were set aside included."""
    seconds: float
    """Seconds that growing took."""
    first: int | None = None
    """How many of `grown` belong to the first batch; None: all. How many come after them depends on
    outcomes."""

    @property
    def inputs(self) -> list[Problem]:
        return [problem for problem, _ in self.grown]

    @property
    def fair(self) -> list[RolloutTree]:
        """The trees that were grown whatever came of them."""
        return self.trees[: self.first]

    @property
    def trees(self) -> list[RolloutTree]:
        return [tree for _, tree in self.grown]


def collect(
    grow: Callable[[int, int], Sequence[Grown]], wanted: int, config: DynamicSamplingConfig
) -> StepBatch:
    """`wanted` inputs to train on. `grow(first, count)` grows `count` inputs of the training
    stream from the `first`-th one of this step on; it may return fewer."""
    began = time.monotonic()
    if config.max_batches == 0:
        everything = list(grow(0, wanted))
        trees = [tree for _, tree in everything]
        return StepBatch(everything, trees, wanted, time.monotonic() - began)
    grown: list[Grown] = []
    kept: list[RolloutTree] = []
    taken = 0
    first: int | None = None
    for _ in range(config.max_batches):
        further = grow(taken, wanted * config.batch_factor)
        taken += wanted * config.batch_factor
        grown.extend(further)
        first = len(grown) if first is None else first
        kept.extend(tree for _, tree in further if has_contrast(tree))
        if len(kept) >= wanted:
            break
    return StepBatch(grown, kept[:wanted], taken, time.monotonic() - began, first)


def has_contrast(tree: RolloutTree) -> bool:
    """Whether some trajectories succeed and some fail; success, not the reward, decides."""
    return (
        len({leaf.score.success for leaf in tree.leaves() if leaf.score and leaf.score.graded}) == 2
    )
