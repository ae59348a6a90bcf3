"""A credit rule of the user's: named by its path, checked, and its answer held to the trees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from elpo_ray import credit
from elpo_ray.config.algorithm import AlgorithmConfig, CreditConfig
from elpo_ray.credit.__main__ import main
from elpo_ray.dump import dump_tree
from elpo_ray.tree import RolloutTree
from elpo_ray.types import FinishReason, Score, Step, Turn

RULES = """
from elpo_ray.credit.parts import Parts, rewards

def centred(trees, config, *, by=1.0):
    found = []
    for tree in trees:
        reward = rewards(tree)
        mean = sum(reward.values()) / len(reward)
        level = {leaf: by * (value - mean) for leaf, value in reward.items()}
        found.append(Parts(leaf=level, node=[0.0] * len(tree.nodes)))
    return found

def broken(trees, config): raise KeyError("nope")
def one(trees, config): return centred(trees, config)[:1]
def nothing(trees, config): return None
def short(trees, config): return [Parts(leaf={}, node=[0.0]) for _ in trees]
def inner(trees, config): return [Parts(leaf={0: 1.0}, node=[0.0] * len(t.nodes)) for t in trees]
def endless(trees, config): return centred(trees, config, by=float("nan"))
def narrow(trees): ...
"""


@pytest.fixture(autouse=True)
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_credit.py").write_text(RULES)
    monkeypatch.syspath_prepend(str(tmp_path))


def tree() -> RolloutTree:
    grown = RolloutTree("t", 2)
    step = Step(Turn((1,), (0.0,), (0.0,), FinishReason.STOP, 0), action_text="x")
    for reward in (1.0, -1.0):
        grown.add_trajectory(0, [step], Score(reward, reward > 0))
    return grown


def config(name: str, **options: Any) -> AlgorithmConfig:
    return AlgorithmConfig(credit=CreditConfig(rule=f"own_credit:{name}", options=options))


def test_the_rule_gives_the_advantages() -> None:
    first, second = credit.assign([tree(), tree()], config("centred", by=2.0))
    assert first.advantage.tolist() == second.advantage.tolist() == [0.0, 2.0, -2.0]


def test_dumped_trees_are_read_by_it_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dump = tmp_path / "trees.jsonl"
    dump.write_text(json.dumps(dump_tree(tree())) + "\n")
    options = ["credit.rule=own_credit:centred", "credit.options.by=3"]
    assert main([str(dump), "--json", *options]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert [node["advantage"] for node in json.loads(line)["nodes"]] == [0.0, 3.0, -3.0]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gone", {}, "own_credit has no gone"),
        ("narrow", {}, r"it must take \(trees, config\)"),
        ("centred", {"bye": 1}, "no option bye; it takes by"),
    ],
)
def test_a_rule_that_cannot_be_used_is_refused(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"algorithm.credit.rule='own_credit:{name}': {message}"):
        credit.check(config(name, **options).credit)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", "raised KeyError: 'nope'; mend it"),
        ("one", "it returned 1 Parts for 2 trees"),
        ("nothing", "it must return a list of elpo_ray.credit.parts.Parts"),
        ("short", "tree t: Parts.node has 1 values for 3 nodes"),
        ("inner", "tree t: Parts.leaf has node 0, which is no graded leaf"),
        ("endless", "tree t: Parts holds a number that is not finite"),
    ],
)
def test_an_answer_that_does_not_fit_the_trees_is_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"algorithm.credit.rule='own_credit:{name}': {message}"):
        credit.assign([tree(), tree()], config(name))
