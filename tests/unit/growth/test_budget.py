"""The ledger: nothing is overspent, nothing lost to the infrastructure is charged."""

import asyncio
import random
from collections import Counter

import pytest
from fakes import FakeTask, FakeTools, Faults, Word, bel, make_config, make_worker, planted
from hypothesis import given, settings
from hypothesis import strategies as st

from elpo_ray.config.growth import (
    ContrastConfig,
    EntropyBranchConfig,
    GrowthConfig,
    GrowthRule,
    PivotConfig,
    RandomBranchConfig,
    ResetConfig,
)
from elpo_ray.growth.budget import Cost, Ledger, Totals
from elpo_ray.types import InfrastructureError

PROBLEM = FakeTask().train_problem(0)


def spend(ledger: Ledger, leaf: int, anchor: int | None = None, cost: Cost | None = None) -> None:
    with ledger.reserve(anchor) as reservation:
        reservation.leaf, reservation.cost = leaf, cost or Cost()


def test_every_spend_is_entered_with_its_leaf_and_cost() -> None:
    ledger = Ledger(2)
    spend(ledger, 7, cost=Cost(tokens=30, tool_seconds=1.5))
    ledger.lost(3, Cost(tokens=5))
    spend(ledger, 9, anchor=3)
    assert ledger.entries == [
        dict(kind="root", anchor=None, leaf=7, charged=True, tokens=30, tool_seconds=1.5),
        dict(kind="probe", anchor=3, leaf=None, charged=False, tokens=5, tool_seconds=0.0),
        dict(kind="probe", anchor=3, leaf=9, charged=True, tokens=0, tool_seconds=0.0),
    ]
    assert (ledger.spent, ledger.remaining, ledger.reserved) == (2, 0, 0)


def test_more_than_the_budget_is_never_reserved() -> None:
    ledger = Ledger(2)
    spend(ledger, 1)
    with ledger.reserve() as reservation:
        assert ledger.remaining == 0
        with pytest.raises(AssertionError, match="budget of 2"), ledger.reserve():
            pass
        reservation.leaf = 2
    assert (ledger.spent, ledger.reserved) == (2, 0)


@pytest.mark.parametrize("error", [InfrastructureError, asyncio.CancelledError, ValueError])
def test_whatever_ends_a_completion_gives_the_rollout_back(error: type[BaseException]) -> None:
    ledger = Ledger(1)
    with pytest.raises(error), ledger.reserve():
        raise error
    assert (ledger.spent, ledger.remaining, ledger.entries) == (0, 1, [])
    spend(ledger, 1)
    assert ledger.remaining == 0


def test_totals_add_up_over_inputs() -> None:
    first, second = Ledger(2), Ledger(1)
    spend(first, 1, cost=Cost(10, 0.5))
    spend(first, 2, anchor=1, cost=Cost(4, 0.25))
    first.lost(None, Cost(3, 1.0))
    spend(second, 1, cost=Cost(1, 0.0))
    total = Totals.of(first.entries) + Totals.of(second.entries)
    assert total == Totals(
        roots=2,
        probes=1,
        tokens=15,
        tool_seconds=0.75,
        lost=1,
        lost_tokens=3,
        lost_tool_seconds=1.0,
    )
    assert total.rollouts == 3


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    n_total=st.integers(2, 16),
    rule=st.sampled_from(GrowthRule),
    policy_faults=st.lists(st.booleans(), max_size=60),
    tool_faults=st.lists(st.booleans(), max_size=60),
)
def test_books_balance_under_infrastructure_failures(
    seed: int,
    n_total: int,
    rule: GrowthRule,
    policy_faults: list[bool],
    tool_faults: list[bool],
) -> None:
    draw = random.Random(seed)

    def plan(number: int, before: list[str]) -> list[Word]:
        words = [(draw.choice("gb"), draw.random()) for _ in range(draw.randint(0, 4))]
        return [*words, (draw.choice(["=ok", "=no"]), 0.0)]

    tools = FakeTools(faults=Faults(tool_faults))
    growth = GrowthConfig(
        rule=rule,
        n_total=n_total,
        entropy=EntropyBranchConfig(initial=2),
        random=RandomBranchConfig(trees=2),
        pivot=PivotConfig(roots=2),
        contrast=ContrastConfig(bases=2),
        reset=ResetConfig(roots=2),
    )
    config = make_config(growth, retries=120)
    worker = make_worker(plan, config, policy_faults=policy_faults, tools=tools)
    tree = asyncio.run(worker.grow(PROBLEM, 0))
    totals = Totals.of(tree.ledger)
    assert totals.rollouts == n_total == len(tree.leaves()) == worker.counters.completed
    assert Counter(e["leaf"] for e in tree.ledger if e["charged"]) == Counter(
        leaf.id for leaf in tree.leaves()
    )
    assert tools.live == 0
    raised = tools.faults.raised + worker.agent.policy.faults.raised  # type: ignore[attr-defined]
    assert totals.lost == raised


def test_lost_attempts_keep_their_cost_apart() -> None:
    # two turns and one call happen before the engine fails in the third turn of the first attempt
    config = make_config(bel(2))
    worker = make_worker(planted(2, 3), config, policy_faults=[False, False, False, False, True])
    totals = Totals.of(asyncio.run(worker.grow(PROBLEM, 0)).ledger)
    assert totals.rollouts == 2 and totals.lost == 1
    assert totals.lost_tokens == 8 and totals.lost_tool_seconds == 0.5


def test_probe_costs_only_what_it_generated() -> None:
    tree = asyncio.run(make_worker(planted(4, 2), make_config(bel(2, b_max=1))).grow(PROBLEM, 0))
    root, probe = tree.ledger
    assert (root["tokens"], probe["anchor"]) == (4 * 4 + 6, 2)
    assert probe["tokens"] == 2 * 4 + 6 and probe["tool_seconds"] == 0.5
