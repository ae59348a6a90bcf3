"""The user's own reward: a function `(problem, steps)` that gives a float, a bool or a Score.

Invariant: a call that fails says nothing about the answer. Its sample has no verdict and carries
the reason (`Score.error`); where too many fail, the run stops and says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

from elpo_ray.config.dotted import check_call, load_object
from elpo_ray.config.task import RewardConfig
from elpo_ray.tools.caller import Caller
from elpo_ray.types import UNGRADED, InfrastructureError, Problem, RewardValue, Score, Step

KEY = "task.reward.name"
MOST_ERRORS = 0.01
"""The share of the samples whose reward may fail."""
LARGEST = 1e100
"""No reward has a larger absolute value, so that no variance overflows (`dump`)."""
FEWEST_ERRORS = 10
"""Fewer failures than this never end a run."""


def score_of(value: Any, success_above: float) -> Score:
    """The score of what a reward function or an environment returned: a Score as it is; a bool is
    worth 1 or 0; another number succeeds above `success_above`. ValueError for anything else, and
    for a reward that is not finite."""
    if isinstance(value, Score):
        if not value.graded or abs(value.reward) <= LARGEST:
            return value
        raise ValueError(f"returned {value!r:.200}; its reward must be finite")
    if not isinstance(value, int | float) and hasattr(value, "item"):
        value = _number(value)
    if isinstance(value, bool):
        return Score(reward=float(value), success=value)
    if isinstance(value, int | float) and abs(value) <= LARGEST:  # NaN is not
        return Score(reward=float(value), success=value > success_above)
    raise ValueError(
        f"returned {value!r:.200}; return a finite number, a bool or elpo_ray.types.Score"
    )


def _number(value: Any) -> Any:
    """The Python number in one of NumPy or PyTorch; an array of several stays what it is."""
    try:
        return value.item()
    except (TypeError, ValueError, RuntimeError):
        return value


class FailureRate:
    """How many rewards have failed, of how many: ends the run where that are too many."""

    def __init__(self, where: str) -> None:
        self._where = where
        self.errors = self.samples = 0

    def count(self, error: str, problem: Problem) -> None:
        """A sample was scored; `error` says why it could not be, else it is empty. ValueError once
        more than 1 % have failed, and at least `FEWEST_ERRORS`."""
        self.samples += 1
        if not error:
            return
        self.errors += 1
        if self.errors >= FEWEST_ERRORS and self.errors > MOST_ERRORS * self.samples:
            raise ValueError(
                f"{self._where}: {self.errors} of {self.samples} samples could not be scored; it "
                f"{error} on problem {problem.id}; mend it, or raise "
                "elpo_ray.types.InfrastructureError for what another try may cure"
            )


class EnvironmentReward:
    """What environments among the agent's tools give, as scores."""

    def __init__(self, config: RewardConfig) -> None:
        self._success_above = config.success_above
        self._rate = FailureRate("task.tools: reward() of an environment")

    def score(self, value: RewardValue, problem: Problem) -> Score:
        """The score of a value; without a verdict of an exception or of what is no score.
        ValueError once too many are."""
        score = UNGRADED
        if not isinstance(value, InfrastructureError):
            score = self._read(value)
            self._rate.count(score.error, problem)
        return score

    def _read(self, value: RewardValue) -> Score:
        if isinstance(value, Exception):
            return _failed(f"raised {type(value).__name__}: {value}")
        try:
            return score_of(value, self._success_above)
        except ValueError as fault:
            return _failed(str(fault))


class OwnReward:
    """`task.reward.name` as a dotted path, ready to score."""

    def __init__(self, config: RewardConfig) -> None:
        """ValueError if the function cannot be loaded or called as the configuration says."""
        assert config.name is not None
        where = f"{KEY}={config.name!r}"
        self._config = config
        function = load_object(KEY, config.name)
        check_call(where, function, ("problem", "steps"), config.options)
        own_call = getattr(function, "__call__", None)  # noqa: B004 - an object may be awaited
        self._function = own_call if inspect.iscoroutinefunction(own_call) else function
        self._caller = Caller(config.timeout_s)
        self._rate = FailureRate(where)

    async def score(self, problem: Problem, steps: Sequence[Step]) -> Score:
        """The function's score; without a verdict if it raises, takes too long or returns what is
        no score. InfrastructureError passes through; ValueError once too many have failed."""
        score = await self._ask(problem, steps)
        self._rate.count(score.error, problem)
        return score

    async def _ask(self, problem: Problem, steps: Sequence[Step]) -> Score:
        config = self._config
        try:
            asked = partial(self._function, problem, steps, **config.options)
            value = await self._caller.value("reward", asked)
            return score_of(value, config.success_above)
        except InfrastructureError:
            raise
        except TimeoutError:
            error = f"took longer than task.reward.timeout_s={config.timeout_s}"
        except ValueError as fault:
            text = str(fault)
            error = text if text.startswith("returned ") else f"raised ValueError: {text}"
        except Exception as fault:  # the user's code is a boundary
            error = f"raised {type(fault).__name__}: {fault}"
        return _failed(error)


def _failed(error: str) -> Score:
    return Score(reward=0.0, success=False, graded=False, error=error[:500])
