"""Failed trajectories of one input, and the extra budget that an analysis of them spends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from elpo_ray.growth.bel import num_tool_steps, outcome
from elpo_ray.growth.independent import sample
from elpo_ray.rollout.worker import TreeRollout
from elpo_ray.tree import RolloutTree
from elpo_ray.types import Message

Record = dict[str, Any]
"""One thing that was examined, as a line of the results' file has it."""


@dataclass(frozen=True, slots=True)
class Failures:
    """Failed trajectories with at least one tool step, in sampling order."""

    leaves: list[int]
    success_rate: float
    """Share of the graded trajectories from the prompt that succeeded: the policy's strength."""
    graded: int
    """How many they were."""


async def sample_failures(rollout: TreeRollout, most: int) -> Failures:
    """Spend the rollout's whole budget on trajectories from the prompt; keep at most `most` of the
    failed ones."""
    tree = rollout.tree
    leaves = await sample(rollout, rollout.remaining)
    failed = [leaf for leaf in leaves if outcome(tree, leaf) is False]
    searchable = [leaf for leaf in failed if num_tool_steps(tree.steps(leaf)) > 0]
    known = verdicts(tree, leaves)
    rate = sum(known) / len(known) if known else 0.0
    return Failures(searchable[:most], rate, len(known))


class ExtraBudget:
    """`interfaces.Rollout` that allows a finished tree `budget` further completions."""

    enough, fixed = False, True

    def __init__(self, rollout: TreeRollout, budget: int) -> None:
        self.tree: RolloutTree = rollout.tree
        self.random: Random = rollout.random
        self.remaining = budget
        self.spent = 0
        self._rollout = rollout

    async def complete(self, at: int = 0, *, anchor: int | None = None) -> int:
        """See `interfaces.Rollout`."""
        assert self.remaining > 0
        self.remaining -= 1
        self.spent += 1
        self._rollout.extend(1)
        return await self._rollout.complete(at, anchor=anchor)

    async def ask(
        self, messages: Sequence[Message], *, temperature: float, top_p: float, max_tokens: int
    ) -> str:
        """See `interfaces.Rollout`."""
        return await self._rollout.ask(
            messages, temperature=temperature, top_p=top_p, max_tokens=max_tokens
        )


def verdicts(tree: RolloutTree, leaves: Sequence[int]) -> list[bool]:
    """Whether they succeeded, of those leaves that were graded."""
    return [known for leaf in leaves if (known := outcome(tree, leaf)) is not None]
