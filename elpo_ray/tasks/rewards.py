"""Terminal rewards: the search looks at success, the advantages at the reward.

A `Reward` is one of the presets of `task.reward.name` with its shaping terms, or the user's own
function (`own_reward`). Invariants: success never depends on the shaping; a grader that comes to no
verdict gives `UNGRADED`, never a failure.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from elpo_ray.config.dotted import is_path
from elpo_ray.config.task import RewardConfig, RewardName
from elpo_ray.interfaces import Tools
from elpo_ray.tasks.grading.answers import (
    STRICT_TAIL_CHARS,
    answer_line,
    boxed_answer,
    choice_letter,
    last_boxed,
    last_program,
    strict_box,
)
from elpo_ray.tasks.grading.pool import MathGrader, Verdict
from elpo_ray.tasks.grading.programs import read_livecodebench, read_tests, run_tests
from elpo_ray.tasks.own_reward import EnvironmentReward, OwnReward
from elpo_ray.types import (
    UNGRADED,
    FinishReason,
    Problem,
    RewardValue,
    Score,
    Step,
    ToolKind,
)

AFTER_THOUGHT = "</think>"
"""What ends a model's thinking in the text of a turn."""
SUCCESS = 1.0
FAILURE = -1.1
"""The values of the paper's Figure 4."""
KIND = "answer_kind"
"""Key of `Problem.extra`: one of the readers below."""
ANSWER_LINE = "answer_line"
"""Key of `Problem.extra`: true if the prompt asks for the answer in a last line `Answer: …`."""
MATH, CHOICE, CODE, LIVECODEBENCH = "math", "choice", "code", "livecodebench"


def all_or_nothing(success: bool) -> Score:
    """The score of a finished trajectory without partial credit."""
    return Score(reward=SUCCESS if success else FAILURE, success=success)


@dataclass(frozen=True, slots=True)
class Grade:
    """What grading found, from which the reward follows."""

    success: bool
    in_form: bool
    """There is an answer in the form asked for."""
    fraction: float | None = None
    """Share of tests passed, of a program that compiles."""


def answer_turn(steps: Sequence[Step]) -> str | None:
    """The text of a finished answer behind its thoughts; None if the trajectory ends in anything
    else."""
    if not steps or steps[-1].result is not None or steps[-1].call is not None:
        return None
    if steps[-1].turn.finish is not FinishReason.STOP:
        return None
    return steps[-1].action_text.rpartition(AFTER_THOUGHT)[2]


class Reward:
    """`task.reward`, ready to score. Starts processes when it first compares mathematics."""

    def __init__(self, config: RewardConfig) -> None:
        """ValueError if a function of the user's cannot be used."""
        name = config.name or RewardName.verify
        self._config = replace(config, name=name)
        self._own = OwnReward(config) if is_path(name) else None
        self._environment = EnvironmentReward(config) if config.name is None else None
        self._grader = MathGrader(config.graders, config.grader_cpu_s)

    @property
    def needs_answer(self) -> bool:
        """Whether problems must come with the right answer, if no environment judges."""
        return self._own is None

    async def score(
        self,
        problem: Problem,
        steps: Sequence[Step],
        tools: Tools,
        environment: RewardValue = None,
    ) -> Score:
        """See `interfaces.Task.score`."""
        if environment is not None and self._environment is not None:
            return self._environment.score(environment, problem)
        if self._own is not None:
            return await self._own.score(problem, steps)
        text = answer_turn(steps)
        graded = Grade(False, False) if text is None else await self._grade(problem, text, tools)
        if graded is None:
            return UNGRADED
        return Score(reward=self._worth(graded, steps), success=graded.success)

    def answer(self, problem: Problem, steps: Sequence[Step]) -> str | None:
        """The answer as text; programs give none: they are not voted on."""
        text = answer_turn(steps)
        kind = problem.extra.get(KIND)
        if text is None or kind in (CODE, LIVECODEBENCH):
            return None
        found = self._read(problem, text)
        return choice_letter(found) if found is not None and kind == CHOICE else found

    async def same_answer(self, problem: Problem, first: str, second: str) -> bool:
        """Whether a problem's two answers are one: by what grades them."""
        literal = problem.extra.get(KIND) != MATH or self._config.name != RewardName.verify
        if literal or first == second:
            return first == second
        return await self._grader.compare(first, second) is Verdict.EQUAL

    async def _grade(self, problem: Problem, text: str, tools: Tools) -> Grade | None:
        """None without a verdict."""
        kind, truth = problem.extra[KIND], problem.ground_truth
        if kind in (CODE, LIVECODEBENCH):
            return await _grade_program(kind, truth, text, tools, self._config.exact_output)
        found = self._read(problem, text)
        if found is None:
            return Grade(False, in_form=False)
        if self._config.name != RewardName.verify:
            return Grade(found == truth, in_form=True)
        if kind == CHOICE:
            return Grade(choice_letter(found) == truth, in_form=True)
        verdict = await self._grader.compare(truth, found)
        return None if verdict is Verdict.UNDECIDED else Grade(verdict is Verdict.EQUAL, True)

    def _read(self, problem: Problem, text: str) -> str | None:
        """The answer, where the prompt asks for it."""
        verify = self._config.name == RewardName.verify
        if problem.extra.get(ANSWER_LINE):
            said = answer_line(text if verify else text[-STRICT_TAIL_CHARS:])
            if said is not None:
                return said
        if not verify:
            return strict_box(text)
        return last_boxed(text) if problem.extra[KIND] == CHOICE else boxed_answer(text)

    def _worth(self, graded: Grade, steps: Sequence[Step]) -> float:
        """The preset's value, then the shaping terms."""
        config = self._config
        calls = [step for step in steps if step.result is not None]
        reward = self._failure(len(calls))
        if graded.fraction is not None:
            reward = graded.fraction
        elif graded.success:
            reward = SUCCESS
        reward -= config.format_penalty * (not graded.in_form)
        if calls and calls[-1].result is not None and calls[-1].result.kind is not ToolKind.OK:
            reward -= config.tool_error_penalty
        reward += config.tool_bonus * (graded.success and bool(calls))
        return reward + overlong(sum(step.num_tokens for step in steps), config)

    def _failure(self, num_calls: int) -> float:
        match self._config.name:
            case RewardName.demyagent_as_run:
                return FAILURE
            case RewardName.demyagent_intended:
                return min(-0.6, -1 + 0.1 * num_calls)
        return -1.0


async def _grade_program(kind: str, truth: Any, text: str, tools: Tools, exact: bool) -> Grade:
    program = last_program(text)
    if program is None:
        return Grade(False, in_form=False)
    # In a thread: private tests are megabytes that have to be unpacked.
    reader = read_livecodebench if kind == LIVECODEBENCH else read_tests
    tests = await asyncio.to_thread(reader, truth)
    report = await run_tests(program, tests, tools, exact=exact)
    if not report.compiles:
        return Grade(False, in_form=False)
    return Grade(report.passed == report.total, in_form=True, fraction=report.fraction)


def overlong(num_tokens: int, config: RewardConfig) -> float:
    """DAPO's soft punishment: 0 up to limit - buffer, then linear down to -factor at the limit and
    on. `num_tokens` counts turns and observations, not the prompt."""
    if not config.overlong_buffer:
        return 0.0
    excess = num_tokens - (config.overlong_limit - config.overlong_buffer)
    return min(0.0, -excess / config.overlong_buffer * config.overlong_factor)
