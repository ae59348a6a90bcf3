"""What the study's benchmarks say of trees that are made by hand."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from benchmarks import distinct
from elpo_ray.config.algorithm import CreditConfig
from elpo_ray.credit.parts import Parts
from elpo_ray.study.plan import Study
from elpo_ray.tree import RolloutTree
from elpo_ray.types import FinishReason, Score, Step, ToolCall, ToolKind, ToolResult, Turn

ROOT = Path(__file__).resolve().parents[2]
RULES = {"operators": "+-", "max_value": 50, "max_turns": 4}


def call(code: str) -> Step:
    turn = Turn((1,), (0.0,), (0.0,), FinishReason.STOP, 0)
    asked = ToolCall("code_interpreter", {"code": code})
    return Step(turn=turn, call=asked, result=ToolResult(ToolKind.OK, ""))


def answer(text: str) -> Step:
    return Step(turn=Turn((1,), (0.0,), (0.0,), FinishReason.STOP, 0), action_text=text)


def grown(*trajectories: tuple[list[Step], bool]) -> RolloutTree:
    """Independent trajectories for `target: 2`, `left: 1 3 4`, and whether each succeeded."""
    question = {"role": "user", "content": "target: 2\nleft: 1 3 4"}
    tree = RolloutTree("p", len(trajectories), messages=[question])
    for steps, success in trajectories:
        tree.add_trajectory(0, steps, Score(reward=float(success), success=success))
    return tree


def told(monkeypatch: pytest.MonkeyPatch, tree: RolloutTree) -> Parts:
    monkeypatch.syspath_prepend(ROOT / "benchmarks/ceiling")
    for name in ("oracle_search", "oracle_credit"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    rule = importlib.import_module("oracle_credit")
    (parts,) = rule.parts([tree], CreditConfig(eps=0.0), **RULES)
    return parts


def test_the_told_credit_blames_the_first_irrecoverable_step_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    won = [call("combine(4, '-', 3)"), call("combine(1, '+', 1)"), answer("answer: 2")]
    late = [call("combine(4, '-', 3)"), call("combine(1, '-', 1)"), answer("answer: 2")]
    early = [call("combine(4, '+', 3)"), call("combine(7, '-', 1)"), answer("answer: 2")]
    last = [call("combine(4, '-', 3)"), call("combine(1, '+', 1)"), answer("answer: 3")]
    tree = grown((won, True), (late, False), (early, False), (last, False))
    parts = told(monkeypatch, tree)
    z = 3**0.5
    expected = [0, z, z, z, 0, -1 / z, 0, -1 / z, 0, 0, 0, 0, -1 / z]
    assert parts.node == pytest.approx(expected) and parts.leaf_factor == 0


def test_the_told_credit_says_nothing_where_all_fail_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    early = [call("combine(4, '+', 3)"), call("combine(7, '-', 1)"), answer("answer: 2")]
    parts = told(monkeypatch, grown((early, False), (early, False)))
    assert parts.node == [0.0] * 7


@pytest.mark.parametrize("study", ["ceiling", "any_order"])
def test_the_rules_that_an_oracle_is_told_are_those_of_its_task(study: str) -> None:
    cells = Study.read(ROOT / f"conf/study/{study}.yaml").cells
    told = [cell for cell in cells if cell.config.task.modules]
    assert told
    for cell in told:
        task, algorithm = cell.config.task, cell.config.algorithm
        options = algorithm.growth.options or algorithm.credit.options
        rules = {"operators": task.countdown.operators, "max_value": task.countdown.max_value}
        assert options == rules | {"max_turns": task.max_turns}


def test_trajectories_with_the_same_turns_and_responses_are_one(tmp_path: Path) -> None:
    def node(id: int, parent: int | None, text: str, **more: object) -> dict[str, object]:
        return {"id": id, "parent": parent, "text": text, **more}

    first = {"observation": "left: 5"}
    other = {"observation": "left: 6"}
    won, lost = {"leaf": True, "success": True}, {"leaf": True, "success": False}
    nodes = [
        node(0, None, ""),
        *(node(1, 0, "a", **first), node(2, 1, "x", **won)),
        *(node(3, 0, "a", **first), node(4, 3, "x", **won)),
        *(node(5, 0, "a", **other), node(6, 5, "x", **won)),
        node(7, 1, "y", **lost),
    ]
    path = tmp_path / "step_1.jsonl"
    path.write_text(json.dumps({"nodes": nodes}) + "\n" + json.dumps({"nodes": nodes[:1]}) + "\n")
    assert distinct.step(path) == {
        "leaves": 4,
        "distinct": 3,
        "successes": 3,
        "distinct_successes": 2,
        "inputs_with_success": 1,
    }
