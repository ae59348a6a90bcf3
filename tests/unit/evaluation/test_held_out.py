"""The held-out evaluations of a training run: which problems, and what is logged of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fakes import sample_of
from hypothesis import given
from hypothesis import strategies as st

from elpo_ray.config.task import TaskConfig, TaskName
from elpo_ray.evaluation.estimators import average
from elpo_ray.evaluation.held_out import described, held_out_values, part_of
from elpo_ray.evaluation.summary import mean_success
from elpo_ray.tasks import make_task
from elpo_ray.types import BENCHMARK, Problem


def problems(*sets: tuple[str, int]) -> list[Problem]:
    return [
        Problem(f"{name}-{number}", (), None, extra={BENCHMARK: name} if name else {})
        for name, count in sets
        for number in range(count)
    ]


def test_a_part_has_as_many_problems_of_each_benchmark() -> None:
    asked = problems(("aime24", 30), ("aime25", 30), ("gpqa", 3))
    chosen = [problem.id for problem in part_of(asked, 11)]
    assert chosen == [
        "aime24-0", "aime24-1", "aime24-2", "aime24-3", "aime25-0", "aime25-1", "aime25-2",
        "aime25-3", "gpqa-0", "gpqa-1", "gpqa-2",
    ]  # fmt: skip


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.none() | st.integers(1, 40))
def test_a_part_is_a_part(sizes: list[int], count: int | None) -> None:
    asked = problems(*((str(name), size) for name, size in enumerate(sizes)))
    part = part_of(asked, count)
    assert len(part) == min(len(asked), count or len(asked))
    assert [problem for problem in asked if problem in part] == part == part_of(asked, count)


def test_one_set_of_problems_has_one_curve_with_its_interval() -> None:
    asked = problems(("", 4))
    samples = [
        sample_of(problem.id, index, success=(place + index) % 3 == 0, tokens=10 * place)
        for place, problem in enumerate(asked)
        for index in range(2)
    ]
    values = held_out_values(asked, samples)
    outcomes = [[(place + index) % 3 == 0 for index in range(2)] for place in range(4)]
    spread = average(outcomes).over_problems
    assert values == {
        "eval/pass_at_1": pytest.approx(mean_success(samples)),
        "eval/pass_at_1_low": spread.low,
        "eval/pass_at_1_high": spread.high,
        "eval/problems": 4,
        "eval/ungraded": 0,
        "eval/tool_calls": 2,
        "eval/tokens": 15,
    }
    text = described(values)
    assert text.startswith(f"{mean_success(samples):.1%} (") and " to " in text


def test_each_of_several_benchmarks_has_its_own() -> None:
    asked = problems(("aime24", 2), ("own set", 2))
    samples = [sample_of(p.id, success=p.id.startswith("aime24")) for p in asked]
    values = held_out_values(asked, samples)
    assert values["eval/pass_at_1"] == 0.5
    assert (values["eval/aime24/pass_at_1"], values["eval/own_set/pass_at_1"]) == (1, 0)
    assert values["eval/aime24/problems"] == 2
    assert "aime24 100.0% (" in described(values) and "own_set 0.0% (" in described(values)


def test_samples_without_a_verdict_are_counted_and_nothing_is_said_of_them() -> None:
    asked = problems(("", 2))
    values = held_out_values(
        asked, [sample_of(asked[0].id, success=True), sample_of(asked[1].id, graded=False)]
    )
    assert (values["eval/pass_at_1"], values["eval/problems"], values["eval/ungraded"]) == (1, 1, 1)
    assert held_out_values(asked, [sample_of(asked[0].id, graded=False)]) == {}
    assert held_out_values(asked, []) == {}


def test_the_sets_of_a_task_are_named_in_its_problems(tmp_path: Path) -> None:
    for name in ("aime24", "aime25"):
        row = {"problem": f"a question of {name}?", "answer": "7"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    sets = [TaskName.aime24, TaskName.aime25]
    settings = TaskConfig(name=TaskName.open_agentrl, eval_sets=sets, data_dir=str(tmp_path))
    found = make_task(settings, 0).eval_problems(10)
    assert [problem.extra[BENCHMARK] for problem in found] == ["aime24", "aime25"]
