"""Tasks of the package reasoning_gym: over a hundred kinds of generated problems, with verifiers.

`task.dataset` names the kind, `task.options` are its settings. A problem follows from its number
alone. Held-out problems are those of the smallest numbers, whatever the seed; training draws from
the other numbers, and passes over a problem that is held out. The verifier's value, from 0 to 1, is
the reward; above `task.reward.success_above` it is a success.
"""

from __future__ import annotations

import difflib
import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

from elpo_ray.config.rules import require
from elpo_ray.config.task import RewardConfig, TaskConfig
from elpo_ray.interfaces import Tools
from elpo_ray.tasks.grading.verifiers import Verifiers, maker
from elpo_ray.tasks.own_reward import EnvironmentReward, OwnReward
from elpo_ray.tasks.rewards import answer_turn
from elpo_ray.tools.code_interpreter import called
from elpo_ray.tools.ready_made import needs
from elpo_ray.types import UNGRADED, Message, Problem, RewardValue, Score, Step

HELD_OUT = 1 << 24
"""Numbers below this are held-out problems'."""
NUMBERS = 1 << 32
"""Numbers of problems: what every kind takes as a seed."""
DRAWS = 100
"""Problems in a row that may be held out, or repeated, before a kind is said to have no more."""
DEMONSTRATIONS = 2000
MAKER_CPU_S = "3600"
"""The processor time of the process that makes problems, which reads no answers."""
FORM = "Give the final answer, and nothing else, between <answer> and </answer>."
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class ReasoningGym:
    """`interfaces.Task` over one kind of problems."""

    def __init__(self, config: TaskConfig, seed: int) -> None:
        """`seed` draws the training problems. ValueError if there is no such kind, or if it does
        not take the options."""
        needs("task.name='reasoning_gym'", "reasoning_gym")
        self._config = config
        self._seed = seed
        self._name = _checked(config)
        self._own, self._environment = _other_rewards(config.reward)
        reward = config.reward
        child = [sys.executable, "-m", "elpo_ray.tasks.grading.verifier_child", self._name]
        child.append(json.dumps(config.options))
        self._maker = maker(*child, MAKER_CPU_S)
        self._verifiers = Verifiers(
            [*child, str(reward.grader_cpu_s)], reward.graders, reward.grader_cpu_s
        )
        dataset_of(self._name, config.options, 0)

    def train_problem(self, index: int) -> Problem:
        """The `index`-th problem; ValueError if none can be drawn that is not held out."""
        draw = random.Random(f"{self._seed}/{index}")
        for _ in range(DRAWS):
            number = draw.randrange(HELD_OUT, NUMBERS)
            entry = self._entry(number)
            if entry["question"] not in self._held_out_questions:
                return self._problem(f"train-{index}", number, entry)
        raise ValueError(
            f"task.dataset={self._name!r}: {DRAWS} problems in a row were held out; lower "
            f"task.eval_problems={self._config.eval_problems}, or make it more varied with "
            "task.options"
        )

    def eval_problems(self, count: int) -> list[Problem]:
        """The first `count` different held-out problems; ValueError if the kind has fewer."""
        found = list(islice(self._distinct(), count))
        if len(found) < count:
            raise ValueError(
                f"task.eval_problems={count}: {self._name} has only {len(found)} different "
                "problems; lower it, or make them more varied with task.options"
            )
        return [self._problem(f"eval-{number}", number, entry) for number, entry in found]

    async def score(
        self,
        problem: Problem,
        steps: Sequence[Step],
        tools: Tools,
        environment: RewardValue = None,
    ) -> Score:
        """The verifier's value, unless the user, or an environment, judges."""
        if self._own is not None:
            return await self._own.score(problem, steps)
        if environment is not None:
            return self._environment.score(environment, problem)
        answer = self.answer(problem, steps)
        if answer is None:
            return Score(0.0, success=False)
        value = await self._verifiers.score(problem.extra["number"], answer)
        if value is None:
            return UNGRADED
        return Score(value, success=value > self._config.reward.success_above)

    def answer(self, problem: Problem, steps: Sequence[Step]) -> str | None:
        """What the last pair of marks holds."""
        found = ANSWER.findall(answer_turn(steps) or "")
        return found[-1].strip() if found else None

    def recoverable(self, problem: Problem, steps: Sequence[Step]) -> bool | None:
        """No oracle."""
        return None

    def demonstration(self, index: int) -> list[Message] | None:
        """A training problem with its answer, which teaches the form; before it the lines of a
        program, for the kinds that have one (`gym_programs`), if the policy may run code. None for
        a kind that knows no answer beforehand."""
        if index >= DEMONSTRATIONS:
            return None
        problem = self.train_problem(-1 - index)
        if not isinstance(problem.ground_truth, str):
            return None
        messages = list(problem.messages)
        program = self._entry(problem.extra["number"])["program"]
        if program is not None and self._config.interpreter:
            for code, shown in program:
                messages += called(code, shown)
        text = f"<answer>{problem.ground_truth}</answer>"
        return [*messages, {"role": "assistant", "content": text}]

    @cached_property
    def _held_out_questions(self) -> set[str]:
        found = islice(self._distinct(), self._config.eval_problems)
        return {entry["question"] for _, entry in found}

    def _distinct(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Held-out numbers and their problems, each of which is asked once."""
        seen: set[str] = set()
        repeated = 0
        for number in range(HELD_OUT):
            entry = self._entry(number)
            if entry["question"] not in seen:
                seen.add(entry["question"])
                repeated = 0
                yield number, entry
            elif (repeated := repeated + 1) == DRAWS:
                return

    def _problem(self, id: str, number: int, entry: dict[str, Any]) -> Problem:
        asked = {"role": "user", "content": f"{entry['question'].rstrip()}\n\n{FORM}"}
        return Problem(id, (asked,), entry["answer"], extra={"number": number})

    def _entry(self, number: int) -> dict[str, Any]:
        return self._maker.entry(number)


def dataset_of(name: str, options: dict[str, Any], number: int) -> Any:
    """A data set with one problem, that of the number. ValueError if the kind does not take the
    options."""
    import reasoning_gym  # seconds to import

    try:
        return reasoning_gym.create_dataset(name, size=1, seed=number, **options)
    except (TypeError, AssertionError, ValueError) as fault:
        reason = " ".join(str(fault).split())
        raise ValueError(
            f"task.options={options!r}: {name} does not take them ({reason or 'out of bounds'})"
        ) from None


def _checked(config: TaskConfig) -> str:
    """The name of the kind. ValueError if there is none of that name."""
    from reasoning_gym.factory import DATASETS

    name, known = config.dataset or "", sorted(DATASETS)
    near = difflib.get_close_matches(name, known, n=3)
    meant = f"did you mean {' or '.join(near)}? Else " if near else ""
    require(name in known, "task.dataset", config.dataset, f"{meant}use one of {', '.join(known)}")
    return name


def _other_rewards(config: RewardConfig) -> tuple[OwnReward | None, EnvironmentReward]:
    """The user's function, if there is one, and what scores an environment."""
    own = None
    if config.name is not None:
        require(
            ":" in config.name,
            "task.reward.name",
            config.name,
            "reasoning_gym verifies answers itself; leave it out, or name your own as "
            "module:attribute",
        )
        own = OwnReward(config)
    return own, EnvironmentReward(config)
