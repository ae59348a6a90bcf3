"""A growth rule of the user's: named by its path, checked before a run, held to the budget."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from fakes import make_config, make_worker, planted

from elpo_ray import growth
from elpo_ray.config import Config
from elpo_ray.config.algorithm import AlgorithmConfig
from elpo_ray.config.growth import GrowthConfig
from elpo_ray.config.schedule import BudgetConfig, BudgetScope
from elpo_ray.tree import RolloutTree
from elpo_ray.types import InfrastructureError

RULES = """
import asyncio
from elpo_ray.types import InfrastructureError

async def twice(rollout, config, *, first=2):
    leaves = await asyncio.gather(*(rollout.complete() for _ in range(first)))
    starts = [path[0] for path in map(rollout.tree.path, leaves) if len(path) > 1]
    await asyncio.gather(*(rollout.complete(node, anchor=1) for node in starts))
    await asyncio.gather(*(rollout.complete() for _ in range(rollout.remaining)))
twice.width = 2

async def lazy(rollout, config): await rollout.complete()
async def broken(rollout, config): raise KeyError("nope")
async def lost(rollout, config): raise InfrastructureError("engine is down")
async def flat(rollout, config):
    await asyncio.gather(*(rollout.complete() for _ in range(rollout.remaining)))
flat.branches, flat.shares_budget = False, True
async def wide(rollout, config): ...
wide.width = 0
def narrow(rollout): ...
number = 3
"""


@pytest.fixture(autouse=True)
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_growth.py").write_text(RULES)
    monkeypatch.syspath_prepend(str(tmp_path))


def config(name: str, **options: Any) -> GrowthConfig:
    return GrowthConfig(rule=f"own_growth:{name}", options=options, n_total=9)


def grow(settings: GrowthConfig) -> RolloutTree:
    worker = make_worker(planted(3, 2), make_config(settings))
    return asyncio.run(worker.grow(worker.task.train_problem(0), 0))


@pytest.mark.parametrize("first", [2, 4])
def test_the_rule_grows_the_tree_with_its_options(first: int) -> None:
    tree = grow(config("twice", first=first))
    assert len(tree.leaves()) == 9
    assert sum(entry["anchor"] == 1 for entry in tree.ledger) == first


def test_what_the_rule_says_of_itself_is_known() -> None:
    assert growth.width(config("twice")) == 2
    assert growth.width(config("flat")) == 9
    assert growth.branches(config("twice")) and not growth.branches(config("flat"))
    growth.check(config("flat"), shared_budget=True)
    with pytest.raises(
        ValueError, match=r"own_growth:twice': .*budget.scope=input, or set shares_"
    ):
        growth.check(config("twice"), shared_budget=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("gone", {}), "own_growth has no gone"),
        (("number", {}), "it is no function"),
        (("narrow", {}), r"it must take \(rollout, config\)"),
        (("twice", {"fisrt": 3}), "no option fisrt; it takes first"),
        (("wide", {}), "its width=0 is no number of completions"),
    ],
)
def test_a_rule_that_cannot_be_used_is_refused(settings: Any, message: str) -> None:
    name, options = settings
    with pytest.raises(ValueError, match=rf"algorithm.growth.rule='own_growth:{name}': {message}"):
        growth.check(config(name, **options))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lazy", "it returned with 8 rollouts unspent; await rollout.complete"),
        ("broken", "raised KeyError: 'nope'; mend it"),
    ],
)
def test_a_rule_that_fails_is_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"algorithm.growth.rule='own_growth:{name}': {message}"):
        grow(config(name))


def test_a_fault_of_the_machines_is_none_of_the_rules() -> None:
    with pytest.raises(InfrastructureError, match="engine is down"):
        grow(config("lost"))


def test_the_schema_takes_a_path_and_leaves_the_budgets_scope_to_the_check() -> None:
    algorithm = AlgorithmConfig(growth=config("twice"))
    whole = Config(algorithm=algorithm, budget=BudgetConfig(scope=BudgetScope.batch))
    assert whole.algorithm.growth.rule == "own_growth:twice"
    with pytest.raises(ValueError, match=r"growth\.options=\{'a': 1\}: rule=bel has none"):
        GrowthConfig(options={"a": 1})
