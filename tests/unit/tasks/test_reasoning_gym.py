"""Tasks of reasoning_gym: their problems, and what is refused."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from elpo_ray.config.task import RewardConfig, TaskConfig
from elpo_ray.tasks import make_task
from elpo_ray.tasks.reasoning_gym import ReasoningGym
from elpo_ray.types import FinishReason, Problem, Step, Turn


def make(seed: int = 0, **settings: Any) -> ReasoningGym:
    settings = {"name": "reasoning_gym", "dataset": "chain_sum", "eval_problems": 20} | settings
    task = make_task(TaskConfig(**settings), seed)
    assert isinstance(task, ReasoningGym)
    return task


def answer(text: str, finish: FinishReason = FinishReason.STOP) -> list[Step]:
    return [Step(Turn((1,), (0.0,), (0.0,), finish, 0), action_text=text)]


def asked(problems: list[Problem]) -> list[str]:
    return [problem.messages[0]["content"] for problem in problems]


def test_the_held_out_problems_are_the_same_and_never_trained_on() -> None:
    one, other = make(0), make(1)
    held_out = asked(one.eval_problems(20))
    assert held_out == asked(other.eval_problems(20)) and len(set(held_out)) == 20
    first = asked([one.train_problem(i) for i in range(100)])
    assert first == asked([make(0).train_problem(i) for i in range(100)])
    assert first != asked([other.train_problem(i) for i in range(100)])
    assert not set(first) & set(held_out)
    assert first[0].endswith("between <answer> and </answer>.")


def test_a_kind_with_few_problems_keeps_the_halves_apart_or_says_so() -> None:
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    few = make(options=options, eval_problems=100)
    held_out = set(asked(few.eval_problems(100)))
    assert not held_out & set(asked([few.train_problem(i) for i in range(50)]))
    with pytest.raises(ValueError, match=r"task\.eval_problems=2000: chain_sum has only \d+ diff"):
        make(options=options).eval_problems(2000)
    coin = {"dataset": "coin_flip", "options": {"min_trials": 3, "max_trials": 3}}
    with pytest.raises(ValueError, match=r"task\.dataset='coin_flip': 100 problems in a row were"):
        make(**coin, eval_problems=10_000).train_problem(0)


def test_the_answer_is_what_the_last_marks_hold() -> None:
    task = make()
    problem = task.train_problem(0)
    text = "<answer>1</answer> no: <answer>\n2 3\n</answer>."
    assert task.answer(problem, answer(text)) == "2 3"
    assert task.answer(problem, answer("2")) is None
    assert task.answer(problem, answer(text, FinishReason.LENGTH)) is None
    assert task.answer(problem, []) is None


def test_a_demonstration_is_a_training_problem_with_its_answer() -> None:
    task = make(dataset="gcd")
    shown = task.demonstration(3)
    assert shown is not None
    assert shown[0]["content"] not in asked(task.eval_problems(20))
    assert shown[1] == {"role": "assistant", "content": shown[1]["content"]}
    assert shown[1]["content"].startswith("<answer>")
    assert task.demonstration(10**6) is None
    assert make(dataset="graph_color").demonstration(0) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": None}, r"task\.dataset=None: use one of ab, acre"),
        ({"dataset": "chainsum"}, r"task\.dataset='chainsum': did you mean chain_sum"),
        ({"options": {"min_term": 2}}, r"task\.options=\{'min_term': 2\}: chain_sum does not take"),
        ({"options": {"min_terms": 9, "max_terms": 2}}, r"task\.options=.*does not take them"),
        ({"reward": RewardConfig(name="verify")}, r"task\.reward\.name=.*verifies answers itself"),
        ({"name": "jsonl"}, r"task\.dataset='chain_sum': name=jsonl has none; use task=reasoning"),
    ],
)
def test_what_cannot_be_used_is_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make(**settings)
    assert "\n" not in str(caught.value)


def test_the_package_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
    with pytest.raises(ValueError, match=r"package reasoning_gym is missing; pip install .*tools"):
        make()
