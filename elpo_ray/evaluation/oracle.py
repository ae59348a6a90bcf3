"""What the searches found, compared with the task's oracle of recoverability."""

from __future__ import annotations

from collections.abc import Sequence

from elpo_ray.interfaces import Task
from elpo_ray.tree import RolloutTree
from elpo_ray.types import Problem, Step


def localization_accuracy(
    task: Task, problems: Sequence[Problem], trees: Sequence[RolloutTree]
) -> tuple[int, int]:
    """(right, judged): confirmed localizations whose critical step is the oracle's first
    irrecoverable one, among those that the oracle can judge. `trees` run parallel to `problems`."""
    right = judged = 0
    for problem, tree in zip(problems, trees, strict=True):
        for found in tree.localizations:
            if found.confirmed:
                truth = first_irrecoverable(task, problem, tree.steps(found.leaf))
                judged += truth is not None
                right += truth is not None and tree.path(found.leaf)[truth - 1] == found.critical
    return right, judged


def first_irrecoverable(task: Task, problem: Problem, steps: Sequence[Step]) -> int | None:
    """The oracle's answer for one failed trajectory: the first step, counted from 1, after which
    no continuation succeeds; the last turn, K+1, if every tool step left a way. None without an
    oracle."""
    for m in range(1, len(steps)):
        match task.recoverable(problem, steps[:m]):
            case None:
                return None
            case False:
                return m
    return len(steps)
