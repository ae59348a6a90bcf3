"""Blame for the first irrecoverable step alone, told: what would perfect credit be worth?

Trajectories and their z-scores are GRPO's. The task's exact oracle then says which step of a
failed trajectory takes its z-score: the first irrecoverable one. The steps before it and behind it
get the advantage 0. No run that solves a task may use it; `conf/study/ceiling.yaml` has runs to
compare with credit that is told nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from oracle_search import countdown, problem_of

from elpo_ray.config.algorithm import CreditConfig
from elpo_ray.credit.group import among
from elpo_ray.credit.parts import Parts, rewards
from elpo_ray.evaluation.oracle import first_irrecoverable
from elpo_ray.tasks.countdown import Countdown
from elpo_ray.tree import RolloutTree


def parts(
    trees: Sequence[RolloutTree],
    config: CreditConfig,
    *,
    operators: str,
    max_value: int,
    max_turns: int,
) -> list[Parts]:
    """Advantages of independent trajectories. `operators`, `max_value`, `max_turns`: the task's."""
    task = countdown(operators, max_value, max_turns)
    return [Parts({}, told(tree, task, config), 0.0, 1.0) for tree in trees]


def told(tree: RolloutTree, task: Countdown, config: CreditConfig) -> list[float]:
    """The advantage of every node: of a success all steps have its z-score, of a failure the
    critical one. Shape: [num_nodes]."""
    node = [0.0] * len(tree.nodes)
    for leaf, value in among(rewards(tree), config).items():
        score, path = tree.nodes[leaf].score, tree.path(leaf)
        assert score is not None
        if score.success:
            taking = path
        else:
            critical = first_irrecoverable(task, problem_of(tree), tree.steps(leaf))
            assert critical is not None, "Countdown has an oracle"
            taking = [path[critical - 1]]
        for step in taking:
            node[step] = value
    return node
