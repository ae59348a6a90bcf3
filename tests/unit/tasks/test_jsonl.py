"""JSON-lines problems: every bad file is one clear line, the reward is the last box."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import FakeTools

from elpo_ray.config.task import RewardConfig, RewardName, TaskConfig, TaskName
from elpo_ray.tasks import make_task
from elpo_ray.tasks.grading.answers import last_boxed
from elpo_ray.tasks.problem_set import ProblemSet
from elpo_ray.types import FinishReason, Problem, Score, Step, Turn


def row(question: str, truth: str = "7") -> dict[str, object]:
    return {
        "data_source": "test",
        "prompt": [{"role": "user", "content": question}],
        "reward_model": {"ground_truth": truth},
        "extra_info": {"index": 3},
    }


def write(path: Path, *rows: object) -> str:
    lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def make(tmp_path: Path, *train: object, seed: int = 0) -> ProblemSet:
    config = TaskConfig(
        name=TaskName.jsonl,
        reward=RewardConfig(name=RewardName.demyagent_as_run),
        train_file=write(tmp_path / "train.jsonl", *train),
        eval_file=write(tmp_path / "eval.jsonl", row("held out")),
    )
    task = make_task(config, seed)
    assert isinstance(task, ProblemSet)
    return task


def answer(text: str, finish: FinishReason = FinishReason.STOP) -> Step:
    return Step(turn=Turn((1,), (0.0,), (0.0,), finish, 0), action_text=text)


def score(task: ProblemSet, asked: Problem, steps: list[Step]) -> Score:
    return asyncio.run(task.score(asked, steps, FakeTools()))


def test_problems_and_epochs(tmp_path: Path) -> None:
    task = make(tmp_path, *(row(f"q{i}") for i in range(20)))
    first = [task.train_problem(i).id for i in range(20)]
    second = [task.train_problem(i).id for i in range(20, 40)]
    assert sorted(first) == sorted(second)
    assert first != second
    assert [p.messages[0]["content"] for p in task.eval_problems(5)] == ["held out"]
    assert task.train_problem(0).extra == {"data_source": "test", "index": 3, "answer_kind": "math"}
    assert task.demonstration(0) is None
    assert task.recoverable(task.train_problem(0), []) is None


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{nope", r"line 2: not JSON .*; put one object on each line"),
        ("[1]", r"line 2: not an object"),
        ({**row("q"), "prompt": []}, r"row 2: prompt is not a list of chat messages; use \["),
        ({**row("q"), "prompt": [{"role": "user"}]}, r"row 2: a message of prompt has no role"),
        ({**row("q"), "reward_model": {}}, r"row 2: reward_model\.ground_truth is not a string"),
        ({**row("q"), "data_source": None}, r"row 2: data_source is not a string"),
        ({**row("q"), "extra_info": [1]}, r"row 2: extra_info is not an object"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, bad: object, message: str) -> None:
    with pytest.raises(ValueError, match=r"task\.train_file='.*train\.jsonl': " + message):
        make(tmp_path, row("ok"), bad).train_problem(0)


def test_a_prompt_an_answer_and_further_columns_make_a_problem(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q2"}]
    rows: list[dict[str, object]] = [
        {"prompt": "q1", "answer": 42, "budget": 5},
        {"prompt": messages, "answer": " x+1 "},
        {"problem": "q3", "solution": r"so \boxed{9}"},
        {"question": "q4", "answer": "because #### 1,000"},
        {**row("q5"), "budget": 6},
    ]
    task = make(tmp_path, *rows)
    found = {p.id: p for p in map(task.train_problem, range(5))}
    asked = [found[f"train-{i}"] for i in range(5)]
    assert [p.messages[-1]["content"] for p in asked] == ["q1", "q2", "q3", "q4", "q5"]
    assert [p.messages[0]["role"] for p in asked] == ["user", "system", "user", "user", "user"]
    assert [p.ground_truth for p in asked] == ["42", "x+1", "9", "1000", "7"]
    assert [p.extra["row"] for p in asked] == rows
    assert score(task, asked[0], [answer(r"\boxed{42}")]).success


@pytest.mark.parametrize(
    "bad", [{"prompt": "q"}, {"prompt": "q", "answer": " "}, {"prompt": "q", "answer": [1, 2]}]
)
def test_only_a_reward_of_ones_own_does_without_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: dict[str, object]
) -> None:
    with pytest.raises(ValueError, match=r"row 1: no answer: give it as text, or score without"):
        make(tmp_path, bad).train_problem(0)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "jsonl_reward.py").write_text("def f(problem, steps): return problem.ground_truth")
    task = make(tmp_path, bad)
    reward = RewardConfig(name="jsonl_reward:f")
    own = make_task(replace(task._config, reward=reward), 0)
    assert own.train_problem(0).ground_truth in (None, [1, 2])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"text": "q", "answer": "7"}, "no prompt or problem or Problem or question: give it"),
        ({"prompt": {}, "answer": "7"}, "no prompt or problem"),
        ({"prompt": [], "answer": "7"}, "prompt is not a list of chat messages"),
        ({"prompt": [{"role": "user"}], "answer": "7"}, "a message of prompt has no role"),
    ],
)
def test_a_row_that_asks_nothing_is_named(tmp_path: Path, bad: object, message: str) -> None:
    with pytest.raises(ValueError, match=r"train\.jsonl': row 2: " + message):
        make(tmp_path, row("ok"), bad).train_problem(0)


def test_unusable_files_are_named(tmp_path: Path) -> None:
    there = write(tmp_path / "there.jsonl", row("q"))
    empty = write(tmp_path / "empty.jsonl")
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    for train, message in [
        (None, r"task\.train_file=None: jsonl has no training split of its own; name a JSON"),
        (str(tmp_path / "gone.jsonl"), r"task\.train_file='.*gone\.jsonl': no such file"),
        (empty, r"task\.train_file='.*empty\.jsonl': no problems in it"),
        (str(binary), r"task\.train_file='.*binary\.jsonl': not UTF-8"),
    ]:
        config = TaskConfig(name=TaskName.jsonl, train_file=train, eval_file=there)
        with pytest.raises(ValueError, match=message):
            make_task(config, 0).train_problem(0)


def test_a_held_out_prompt_may_not_be_trained_on(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train-1 asks the same as jsonl-0"):
        make(tmp_path, row("q"), row("held out")).train_problem(0)


def test_reward_is_the_last_box_of_the_answer_turn(tmp_path: Path) -> None:
    task = make(tmp_path, row("q", r"\frac{1}{2}"))
    asked = task.train_problem(0)
    assert score(task, asked, [answer(r"\boxed{3}, no: \boxed{\frac{1}{2}}")]).reward == 1.0
    assert score(task, asked, [answer(r"\boxed{\frac{1}{2}}, no: \boxed{3}")]).reward == -1.1
    assert not score(task, asked, [answer(r"\frac{1}{2}")]).success
    assert not score(task, asked, [answer(r"\boxed{\frac{1}{2}}", FinishReason.LENGTH)]).success
    assert not score(task, asked, []).success


def test_last_boxed_balances_braces() -> None:
    assert last_boxed(r"a \boxed{ {x}_{y} } b") == "{x}_{y}"
    assert last_boxed(r"\boxed{open") is None
    assert last_boxed("none") is None
