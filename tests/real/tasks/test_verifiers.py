"""Verifiers of reasoning_gym in their processes: every kind, and answers that do harm."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeTools
from reasoning_gym.factory import DATASETS

from elpo_ray.config.task import RewardConfig, TaskConfig
from elpo_ray.tasks.reasoning_gym import ReasoningGym, dataset_of
from elpo_ray.types import FinishReason, Score, Step, Turn

NO_ONE_ANSWER = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
"""Kinds that give no answer beforehand: many are right."""
NO_DATA = {"composite", "pool_matrix"}
"""One needs other kinds as its settings; one draws from NumPy's own generator."""


def make(dataset: str, **reward: Any) -> ReasoningGym:
    settings = RewardConfig(success_above=0.99, **reward)
    config = TaskConfig(name="reasoning_gym", dataset=dataset, reward=settings, eval_problems=2)
    return ReasoningGym(config, 0)


def answered(text: str) -> list[Step]:
    turn = Turn((1,), (0.0,), (0.0,), FinishReason.STOP, 0)
    return [Step(turn, action_text=f"I say <answer>{text}</answer>")]


async def test_the_verifiers_value_is_the_reward() -> None:
    task = make("word_sorting")
    problem = task.train_problem(0)
    right = await task.score(problem, answered(problem.ground_truth), FakeTools())
    assert right == Score(1.0, True)
    wrong = await task.score(problem, answered("zebra"), FakeTools())
    assert not wrong.success and wrong.graded and wrong.reward < 0.99
    silent = answered("x")[0]
    steps = [Step(silent.turn, action_text="no marks")]
    assert await task.score(problem, steps, FakeTools()) == Score(0.0, False)
    same = await asyncio.gather(
        *(task.score(problem, answered(problem.ground_truth), FakeTools()) for _ in range(10))
    )
    assert same == [right] * 10


async def test_an_answer_can_neither_hang_nor_write(tmp_path: Path) -> None:
    task = make("polynomial_multiplication", grader_cpu_s=1.0, graders=1)
    problem = task.train_problem(0)
    target = tmp_path / "written"
    begun = time.monotonic()
    giant = await task.score(problem, answered("9**9**9**9"), FakeTools())
    assert giant == Score(0.0, False), "what takes all the processor time is wrong"
    assert time.monotonic() - begun < 100
    harmful = (
        f"open({str(target)!r}, 'w').write('x')",
        f"__import__('os').system('touch {target}')",
        "__import__('os')._exit(0)",
        "__import__('sys').exit(0)",
        "(" * 50_000,
    )
    for text in harmful:
        assert await task.score(problem, answered(text), FakeTools()) == Score(0.0, False), text
    assert not target.exists()
    right = await task.score(problem, answered(problem.ground_truth), FakeTools())
    assert right == Score(1.0, True)


@pytest.mark.parametrize(
    "dataset", ["chain_sum", "sudoku", "maze", "zebra_puzzles", "gsm_symbolic"]
)
async def test_a_kinds_own_answer_is_right(dataset: str) -> None:
    task = make(dataset)
    for problem in [task.train_problem(0), task.eval_problems(1)[0]]:
        score = await task.score(problem, answered(problem.ground_truth), FakeTools())
        assert score == Score(1.0, True)


def test_every_kind_gives_problems_that_its_verifier_knows() -> None:
    assert len(DATASETS) > 100
    for name in sorted(DATASETS.keys() - NO_DATA):
        dataset = dataset_of(name, {}, (1 << 24) + 7)
        entry = dataset[0]
        assert len(entry["question"]) > 10
        if name not in NO_ONE_ANSWER:
            assert dataset.score_answer(entry["answer"], entry) == 1.0, name
