"""Numbers of a step's trees."""

import pytest

from elpo_ray.config import BelConfig
from elpo_ray.growth.budget import Cost, Ledger
from elpo_ray.metrics import Stopwatch, tree_metrics
from elpo_ray.tree import RolloutTree
from elpo_ray.types import FinishReason, Score, Step, Turn

ANSWER = Step(Turn((1, 2), (0.0, 0.0), (0.5, 0.5), FinishReason.STOP, 0))


def tree_of(outcomes: list[bool]) -> RolloutTree:
    """Independent one-step trajectories, each a spend of the ledger."""
    tree, ledger = RolloutTree("t", len(outcomes)), Ledger(len(outcomes))
    for success in outcomes:
        with ledger.reserve() as reservation:
            reservation.leaf = tree.add_trajectory(0, [ANSWER], Score(float(success), success))
            reservation.cost = Cost(tokens=2)
    tree.ledger = ledger.entries
    return tree


def test_every_input_counts_alike_in_pass_at_1() -> None:
    values = tree_metrics([tree_of([True, True, True]), tree_of([False])], BelConfig())
    assert values["pass_at_1"] == pytest.approx(0.5)
    assert values["reward"] == pytest.approx(0.75)
    assert (values["rollouts"], values["tokens_generated"]) == (4, 8)
    assert values["entropy_root"] == pytest.approx(0.5)


def test_a_step_without_searches_still_has_a_row() -> None:
    values = tree_metrics([tree_of([False])], BelConfig())
    assert values["critical_found"] == values["critical_depth"] == 0


def test_the_phases_of_a_lap_add_up_to_its_time() -> None:
    watch = Stopwatch()
    with watch.phase("grow"):
        pass
    lap = watch.lap()
    assert set(lap) == {"grow", "other"} and all(seconds >= 0 for seconds in lap.values())
    assert set(watch.lap()) == {"other"}
