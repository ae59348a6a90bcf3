"""The user's own reward: what it may return, what a failure costs, when a run ends."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import make_config, make_worker, planted

from elpo_ray.config.growth import GrowthConfig
from elpo_ray.config.task import RewardConfig
from elpo_ray.interfaces import Tools
from elpo_ray.runs.metrics import tree_metrics
from elpo_ray.tasks.own_reward import FEWEST_ERRORS, FailureRate, OwnReward, score_of
from elpo_ray.tasks.rewards import Reward
from elpo_ray.types import FinishReason, InfrastructureError, Problem, Score, Step, Turn

OWN = """
import asyncio, time
from elpo_ray.types import Score, InfrastructureError
def whole(problem, steps): return Score(2.5, problem.ground_truth in steps[-1].action_text)
async def later(problem, steps): return Score(0.5, True)
def value(problem, steps, *, of=1.0): return of
class Judge:
    async def __call__(self, problem, steps): return True
judge = Judge()
def raises(problem, steps): raise KeyError("nope")
def wrong(problem, steps): raise ValueError("bad value")
def exits(problem, steps): raise SystemExit(3)
def stops(problem, steps): raise StopIteration
def lost(problem, steps): raise InfrastructureError("judge is down")
def slow(problem, steps): time.sleep(30)
async def hangs(problem, steps): await asyncio.sleep(30)
def narrow(problem): ...
number = 3
"""
PROBLEM = Problem("p", ({"role": "user", "content": "?"},), "7")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_rewards.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_rewards"


def answer(text: str) -> list[Step]:
    return [Step(Turn((1,), (0.0,), (0.0,), FinishReason.STOP, 0), action_text=text)]


def by(path: str, **settings: Any) -> Score:
    reward = Reward(RewardConfig(name=path, **settings))
    tools: Tools = None  # type: ignore[assignment]
    return asyncio.run(reward.score(PROBLEM, answer("it is 7"), tools))


@pytest.mark.parametrize(
    ("value", "score"),
    [
        (Score(-3.0, True), Score(-3.0, True)),
        (True, Score(1.0, True)),
        (False, Score(0.0, False)),
        (1, Score(1.0, True)),
        (0.5, Score(0.5, False)),
        (np.float32(0.75), Score(0.75, True)),
        (np.bool_(True), Score(1.0, True)),
        (np.array(2), Score(2.0, True)),
    ],
)
def test_a_number_a_bool_or_a_score_is_a_score(value: Any, score: Score) -> None:
    assert score_of(value, 0.5) == score


@pytest.mark.parametrize(
    "value",
    [
        None,
        "1.0",
        float("nan"),
        float("inf"),
        1e101,
        [1.0],
        np.array([1.0, 2.0]),
        Score(1e200, True),
    ],
)
def test_anything_else_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"returned .*finite"):
        score_of(value, 0.5)


def test_a_users_reward_is_used_plain_or_async_with_its_options(own: str) -> None:
    assert by(f"{own}:whole") == Score(2.5, True)
    assert by(f"{own}:later") == Score(0.5, True)
    assert by(f"{own}:judge") == Score(1.0, True)
    assert by(f"{own}:value") == Score(1.0, True)
    assert by(f"{own}:value", options={"of": 0.25}) == Score(0.25, False)
    assert by(f"{own}:value", options={"of": 0.25}, success_above=0.2) == Score(0.25, True)


@pytest.mark.parametrize(
    ("name", "settings", "error"),
    [
        ("raises", {}, "raised KeyError: 'nope'"),
        ("wrong", {}, "raised ValueError: bad value"),
        ("exits", {}, "raised RuntimeError: SystemExit: 3"),
        ("stops", {}, "raised RuntimeError: coroutine raised StopIteration"),
        ("value", {"options": {"of": None}}, "returned None; return a finite number"),
        ("value", {"options": {"of": "good"}}, "returned 'good'; return a finite number"),
        ("value", {"options": {"of": float("nan")}}, "returned nan; return a finite number"),
        ("slow", {"timeout_s": 0.05}, "took longer than task.reward.timeout_s=0.05"),
        ("hangs", {"timeout_s": 0.05}, "took longer than task.reward.timeout_s=0.05"),
    ],
)
def test_a_reward_that_fails_leaves_its_sample_without_a_verdict(
    own: str, name: str, settings: dict[str, Any], error: str
) -> None:
    begun = time.monotonic()
    score = by(f"{own}:{name}", **settings)
    assert not score.graded and not score.success and score.reward == 0.0
    assert score.error.startswith(error)
    assert time.monotonic() - begun < 10


def test_a_users_reward_may_ask_for_another_try(own: str) -> None:
    with pytest.raises(InfrastructureError, match="judge is down"):
        by(f"{own}:lost")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gone", {}, "own_rewards has no gone"),
        ("number", {}, "it is int, not something to call"),
        ("narrow", {}, r"it must take \(problem, steps\)"),
        ("value", {"options": {"off": 1}}, "no option off; it takes of"),
    ],
)
def test_a_users_reward_that_cannot_be_used_is_named(
    own: str, name: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"task\.reward\.name='own_rewards:{name}': {message}"):
        OwnReward(RewardConfig(name=f"{own}:{name}", **settings))


def test_one_failure_in_a_hundred_is_borne_and_more_end_the_run() -> None:
    rate = FailureRate("task.reward.name='m:f'")
    for number in range(5000):
        rate.count("raised KeyError: 'x'" if number % 100 == 99 else "", PROBLEM)
    assert (rate.errors, rate.samples) == (50, 5000)
    broken = FailureRate("task.reward.name='m:f'")
    for _ in range(FEWEST_ERRORS - 1):
        broken.count("raised KeyError: 'x'", PROBLEM)
    said = (
        r"task\.reward\.name='m:f': 10 of 10 samples could not be scored; it raised KeyError: 'x' "
        r"on problem p; mend it, or raise elpo_ray\.types\.InfrastructureError"
    )
    with pytest.raises(ValueError, match=said):
        broken.count("raised KeyError: 'x'", PROBLEM)


def test_the_tree_goes_on_and_counts_the_sample_that_failed() -> None:
    worker = make_worker(planted(3, 2), make_config(GrowthConfig(n_total=9)))
    scores = iter([Score(0.0, False, graded=False, error="raised KeyError: 'x'")])
    inner = worker.task.score

    async def score(problem: Problem, steps: Any, tools: Tools) -> Score:
        return next(scores, None) or await inner(problem, steps, tools)

    worker.task.score = score  # type: ignore[method-assign]
    tree = asyncio.run(worker.grow(worker.task.train_problem(0), 0))
    values = tree_metrics([tree], worker.settings.growth)
    assert len(tree.leaves()) == 9
    assert (values["ungraded"], values["reward_errors"]) == (1, 1)


def test_rewards_that_block_keep_no_place_that_others_need(own: str) -> None:
    reward = OwnReward(RewardConfig(name=f"{own}:slow", timeout_s=0.2))
    quick = OwnReward(RewardConfig(name=f"{own}:value"))
    before = threading.active_count()

    async def all_of_them() -> list[Score]:
        blocked = [reward._ask(PROBLEM, answer("x")) for _ in range(60)]
        return await asyncio.gather(
            *blocked, *(quick.score(PROBLEM, answer("x")) for _ in range(60))
        )

    begun = time.monotonic()
    scores = asyncio.run(all_of_them())
    assert time.monotonic() - begun < 5
    assert [score.graded for score in scores] == [False] * 60 + [True] * 60
    assert threading.active_count() >= before + 60
