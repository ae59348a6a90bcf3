"""The first irrecoverable step of Countdown, told: what would a perfect search be worth?

It grows trees as BEL does (Algorithm 1 of arXiv 2602.09598), but asks the task's exact oracle where
BEL probes. A fixed number of completions then starts before that step, so that it has siblings;
the rest of the budget goes to trajectories from the prompt and to further searches. No run that
solves a task may use it; `conf/study/ceiling.yaml` has runs to compare with searches that are told
nothing.
"""

from __future__ import annotations

import re
from collections.abc import Coroutine, Sequence
from functools import lru_cache
from typing import Any

from elpo_ray.config.growth import GrowthConfig
from elpo_ray.config.task import CountdownConfig, TaskConfig
from elpo_ray.evaluation.oracle import first_irrecoverable
from elpo_ray.growth.bel import outcome, search_failures
from elpo_ray.growth.independent import sample
from elpo_ray.interfaces import Rollout
from elpo_ray.tasks.countdown import Countdown
from elpo_ray.tree import Localization, Probe, RolloutTree
from elpo_ray.types import Problem

PROMPT = re.compile(r"target: (?P<target>\d+)\nleft: (?P<numbers>[\d ]+)")


async def grow(
    rollout: Rollout,
    config: GrowthConfig,
    *,
    operators: str,
    max_value: int,
    max_turns: int,
    completions: int = 3,
) -> None:
    """Algorithm 1 with the oracle in place of its search. `operators`, `max_value` and `max_turns`:
    the task's; `completions`: from before each critical step."""

    def begin(leaf: int, roots: Sequence[int]) -> tuple[int, Coroutine[Any, Any, Localization]]:
        task = countdown(operators, max_value, max_turns)
        return completions, told(rollout, leaf, task, completions)

    await search_failures(rollout, config.bel, begin, completions)


async def told(rollout: Rollout, leaf: int, task: Countdown, completions: int) -> Localization:
    """The first irrecoverable step of a failed trajectory by the oracle, and completions from
    before it; these are from the prompt where it is the first step."""
    tree, path = rollout.tree, rollout.tree.path(leaf)
    critical = first_irrecoverable(task, problem_of(tree), tree.steps(leaf))
    assert critical is not None, "Countdown has an oracle"
    count = min(completions, rollout.remaining)
    if critical == 1:
        await sample(rollout, count)
        probes = []
    else:
        leaves = await sample(rollout, count, at=path[critical - 2], anchor=critical - 1)
        known = [seen for child in leaves if (seen := outcome(tree, child)) is not None]
        probes = [Probe(critical - 1, attempts=len(known), successes=sum(known))]
    return Localization(leaf, path[critical - 1], True, (critical, critical), probes)


@lru_cache(maxsize=1)
def countdown(operators: str, max_value: int, max_turns: int) -> Countdown:
    """The task with these rules; of its problems none is drawn."""
    rules = CountdownConfig(numbers=2, operators=operators, max_value=max_value)
    return Countdown(TaskConfig(max_turns=max_turns, countdown=rules), seed=0)


def problem_of(tree: RolloutTree) -> Problem:
    """The problem of a tree, from its prompt."""
    found = PROMPT.fullmatch(str(tree.messages[-1]["content"]))
    assert found is not None, "this growth rule serves Countdown only"
    numbers = [int(number) for number in found["numbers"].split()]
    return Problem(
        id=tree.task_id,
        messages=tuple(tree.messages),
        ground_truth=int(found["target"]),
        extra={"numbers": numbers},
    )
