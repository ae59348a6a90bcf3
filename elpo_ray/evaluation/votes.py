"""Equal answers are one vote, however they are written."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from elpo_ray.evaluation.summary import by_problem
from elpo_ray.interfaces import ComparesAnswers, Task
from elpo_ray.rollout.sample import Sample
from elpo_ray.types import Problem


async def one_vote_each(
    task: Task, problems: Sequence[Problem], samples: Sequence[Sample]
) -> list[Sample]:
    """The samples with equal answers written alike: each answer becomes that of the first sample
    of its problem, by index, whose answer it equals. The equality is the one that grades, which is
    not transitive; a sample therefore joins the first class whose first member it equals."""
    asked = {problem.id: problem for problem in problems}
    groups = by_problem(samples)
    merged = await asyncio.gather(
        *(_merge(task, asked[problem], group) for problem, group in groups.items())
    )
    return [sample for group in merged for sample in group]


async def _merge(task: Task, problem: Problem, samples: Sequence[Sample]) -> list[Sample]:
    firsts: list[str] = []
    written: dict[str, str] = {}
    merged = []
    for sample in samples:
        answer = sample.answer
        if answer is not None and answer not in written:
            for first in firsts:
                if await _same(task, problem, first, answer):
                    written[answer] = first
                    break
            else:
                firsts.append(answer)
                written[answer] = answer
        merged.append(sample if answer is None else replace(sample, answer=written[answer]))
    return merged


async def _same(task: Task, problem: Problem, first: str, second: str) -> bool:
    """The task's own equality decides; without one different texts are different answers."""
    return isinstance(task, ComparesAnswers) and await task.same_answer(problem, first, second)
