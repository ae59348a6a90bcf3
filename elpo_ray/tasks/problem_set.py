"""Tasks over data sets: a family says where the rows are and how a row becomes a problem.

Rows load when first asked for, so a rollout worker, which only scores, loads none. Invariant: no
held-out prompt is ever trained on.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from elpo_ray.config.task import TaskConfig
from elpo_ray.interfaces import Tools
from elpo_ray.tasks.demonstrations import read_demonstration
from elpo_ray.tasks.rewards import KIND, MATH, Reward
from elpo_ray.tasks.sources import Row, Source, Table, check_apart, load
from elpo_ray.tools.catalog import judged
from elpo_ray.types import BENCHMARK, Message, Problem, RewardValue, Score, Step

Reader = Callable[[Row, str, int, bool], Problem]
"""(row, id, seed, code) -> its problem; `code`: the policy may run code, which the prompt advises.
ValueError says what is wrong with the row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one data set differs from others. A split without a source needs a file of the user's."""

    read: Reader
    train: Source | None = None
    held_out: Source | None = None
    demonstrations: Source | None = None
    keep: Callable[[Row, TaskConfig], bool] = lambda row, config: True
    """Which held-out rows the configuration asks for."""


class ProblemSet:
    """`interfaces.Task` over the rows of a family."""

    def __init__(self, families: Mapping[str, Family], config: TaskConfig, seed: int) -> None:
        """`seed` orders the training stream and the options of multiple-choice problems.
        ValueError if the user's reward function cannot be loaded."""
        self._families = families
        self._family = families[config.name]
        self._config = config
        self._seed = seed
        self._reward = Reward(config.reward)

    def train_problem(self, index: int) -> Problem:
        """The rows in a new order every epoch, fixed by the seed. ValueError without a usable
        training split."""
        problems = self._train
        epoch, place = divmod(index, len(problems))
        order = list(range(len(problems)))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)
        return problems[order[place]]

    def eval_problems(self, count: int) -> list[Problem]:
        """The first `count` held-out problems, or all of them: those of `task.eval_sets` one set
        after the other, or the family's own. ValueError without a usable split."""
        return self._held_out[:count]

    async def score(
        self,
        problem: Problem,
        steps: Sequence[Step],
        tools: Tools,
        environment: RewardValue = None,
    ) -> Score:
        """Grade the answer by `task.reward`, or as the environment says."""
        return await self._reward.score(problem, steps, tools, environment)

    def answer(self, problem: Problem, steps: Sequence[Step]) -> str | None:
        """What the last box holds; None for programs."""
        return self._reward.answer(problem, steps)

    async def same_answer(self, problem: Problem, first: str, second: str) -> bool:
        """The equality that grades decides."""
        return await self._reward.same_answer(problem, first, second)

    def recoverable(self, problem: Problem, steps: Sequence[Step]) -> bool | None:
        """No oracle."""
        return None

    def demonstration(self, index: int) -> list[Message] | None:
        """The `index`-th conversation of the cold-start data; None after the last, and for a
        family without such data. ValueError if the data cannot be used."""
        return self._demonstrations[index] if index < len(self._demonstrations) else None

    @cached_property
    def _judged(self) -> bool:
        """Whether an environment among the tools says what a trajectory is worth."""
        return self._config.reward.name is None and judged(self._config)

    @cached_property
    def _train(self) -> list[Problem]:
        config = self._config
        if config.train_file is None and self._family.train is None:
            raise ValueError(
                f"task.train_file=None: {config.name} has no training split of its own; name "
                "a JSON-lines or parquet file of problems with the same fields (docs/tasks.md), or "
                "train on another task and evaluate on this one with task.eval_sets"
            )
        table = load(self._family.train, "task.train_file", config.train_file, config.data_dir)
        problems = self._read(self._family, table, "train")
        check_apart(problems, self._held_out, table.origin)
        return problems

    @cached_property
    def _held_out(self) -> list[Problem]:
        config = self._config
        if config.eval_sets:
            return [
                replace(problem, extra=problem.extra | {BENCHMARK: name})
                for name in config.eval_sets
                for problem in self._set(name, None)
            ]
        return self._set(config.name, config.eval_file)

    def _set(self, name: str, file: str | None) -> list[Problem]:
        if name not in self._families:
            raise ValueError(
                f"task.eval_sets={name}: no data set; use some of {', '.join(self._families)}"
            )
        family, config = self._families[name], self._config
        table = load(family.held_out, "task.eval_file", file, config.data_dir)
        kept = [row for row in table.rows if family.keep(row, config)]
        if not kept:
            raise ValueError(f"{table.origin}: no row within task.contest_from..contest_until")
        return self._read(family, replace(table, rows=kept), name)

    def _read(self, family: Family, table: Table, prefix: str) -> list[Problem]:
        def read(row: Row, number: int) -> Problem:
            code = self._config.interpreter
            problem = family.read(row, f"{prefix}-{number}", self._seed, code)
            text = isinstance(problem.ground_truth, str) or problem.extra.get(KIND) != MATH
            if self._reward.needs_answer and not text and not self._judged:
                raise ValueError(
                    "no answer: give it as text, or score without one (task.reward=module:function)"
                )
            return problem

        return table.each(read)

    @cached_property
    def _demonstrations(self) -> list[list[Message]]:
        config, source = self._config, self._family.demonstrations
        if source is None and config.demonstrations_file is None:
            return []
        key = "task.demonstrations_file"
        table = load(source, key, config.demonstrations_file, config.data_dir)
        return table.each(lambda row, number: read_demonstration(row))
