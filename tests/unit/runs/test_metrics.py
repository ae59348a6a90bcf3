"""Numbers of a step's trees."""

import io

import pytest
from rich.console import Console

from elpo_ray.config.growth import BelConfig
from elpo_ray.growth.budget import Cost, Ledger
from elpo_ray.runs.metrics import Stopwatch, comparison_axes, tree_metrics, waiting
from elpo_ray.tree import RolloutTree
from elpo_ray.types import UNGRADED, FinishReason, Score, Step, Turn

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
    assert set(lap) == {"seconds/grow", "seconds/other"} and all(
        seconds >= 0 for seconds in lap.values()
    )
    assert set(watch.lap()) == {"seconds/other"}


def test_a_leaf_without_a_verdict_is_in_no_average() -> None:
    tree = tree_of([True, False])
    tree.nodes[2].score = UNGRADED
    values = tree_metrics([tree], BelConfig())
    assert (values["reward"], values["pass_at_1"], values["ungraded"]) == (1.0, 1.0, 1)
    assert values["rollouts"] == 2


def test_axes_of_comparison_are_the_totals_so_far() -> None:
    seconds = {"start": 9.0, "grow": 4.0, "credit": 0.25, "update": 2.0, "sync": 0.5, "evaluate": 3}
    totals = {"rollouts": 512.0, "tokens_generated": 9000.0, "localizations_judged": 7.0}
    totals |= {f"seconds/{phase}": value for phase, value in seconds.items()}
    assert comparison_axes(totals) == {
        "total/leaves": 512,
        "total/tokens_generated": 9000,
        "total/train_seconds": 6.75,
        "total/wall_seconds": 18.75,
    }


def test_a_wait_is_a_line_off_a_terminal_and_a_spinner_on_one() -> None:
    for terminal, said in ((False, "starting Ray …\n"), (True, "\x1b[?25h")):
        console = Console(file=io.StringIO(), force_terminal=terminal)
        with waiting(console, "starting Ray"):
            pass
        text = console.file.getvalue()
        assert said in text
        assert (text == said) is not terminal
