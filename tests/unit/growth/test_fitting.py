"""Beta(a, b) from probes: what is counted, what is fitted, and when a step may use it."""

import json
import random
from dataclasses import asdict, replace

import pytest

from elpo_ray.growth.fitting import BetaFit, fit, probed_anchors
from elpo_ray.tree import Localization, Posterior, Probe, RolloutTree


def tree_with(last: list[float], *probes: tuple[int, bool]) -> RolloutTree:
    tree = RolloutTree("t", 16)
    made = [Probe(anchor, 1, int(success)) for anchor, success in probes]
    belief = Posterior([0.5, 0.5], (0.6, 1.0), [], [last])
    tree.localizations.append(Localization(0, None, False, (1, len(last)), made, belief))
    return tree


def test_an_anchor_counts_as_far_as_it_is_believed_to_be_recoverable() -> None:
    tree = tree_with([0.1, 0.2, 0.7], (2, False), (1, False), (2, False), (1, True))
    assert list(probed_anchors([tree])) == [
        (0, 2, 1, pytest.approx(0.9)),
        (0, 2, 0, pytest.approx(0.7)),
    ]


def test_a_prefix_that_failed_before_is_expected_to_fail_again() -> None:
    """Two failures of the tree came before the probes of anchor 1: given them, a failure says
    less about Beta(a, b)."""
    tree = tree_with([0.1, 0.9], (1, False))
    belief = tree.localizations[0].posterior
    assert belief is not None
    tree.localizations[0].posterior = replace(belief, free=[Probe(1, 2, 0)])
    assert list(probed_anchors([tree])) == [(2, 1, 0, pytest.approx(0.9))]
    means = [a / (a + b) for a, b in (fit({key: 9.0}, (0.6, 1.0)) for key in ("0,1,0", "2,1,0"))]
    assert means[0] < means[1] < 0.6 / 1.6


def test_binary_searches_count_nothing() -> None:
    tree = tree_with([1.0], (1, True))
    tree.localizations[0].posterior = None
    assert list(probed_anchors([tree])) == []


@pytest.mark.parametrize(("a", "b"), [(0.6, 1.0), (2.0, 1.0), (1.0, 3.0)])
def test_the_fit_finds_the_mean_that_made_the_outcomes(a: float, b: float) -> None:
    draw, outcomes = random.Random(0), dict[str, float]()
    for _ in range(4000):
        chance = draw.betavariate(a, b)
        won = sum(draw.random() < chance for _ in range(4))
        key = f"0,4,{won}"
        outcomes[key] = outcomes.get(key, 0.0) + 1
    found = fit(outcomes, (0.6, 1.0))
    assert found[0] / sum(found) == pytest.approx(a / (a + b), abs=0.05)
    assert found == pytest.approx((a, b), rel=0.3)


def test_without_outcomes_the_configured_values_stay() -> None:
    assert fit({}, (0.6, 1.0)) == (0.6, 1.0)


def test_a_step_is_grown_with_what_was_fitted_before_its_growth_could_begin() -> None:
    state = BetaFit()
    for step in (1, 2, 3):
        state.add(step, [tree_with([0.0, 1.0], *[(1, True)] * step)], (0.6, 1.0))
    state = BetaFit(**json.loads(json.dumps(asdict(state))))  # as a checkpoint keeps it
    assert set(state.fitted) == {"1", "2", "3"}
    for staleness in (0, 1):
        assert state.before(3, staleness, (9.0, 9.0)) == tuple(state.fitted[str(3 - staleness)])
    assert BetaFit().before(0, 1, (0.6, 1.0)) == (0.6, 1.0)
    state.add(4, [], (0.6, 1.0))
    assert set(state.fitted) == {"2", "3", "4"}


def test_older_outcomes_count_less() -> None:
    state = BetaFit()
    state.add(1, [tree_with([0.0, 1.0], (1, True))], (0.6, 1.0))
    state.add(2, [tree_with([0.0, 1.0], (1, False))], (0.6, 1.0))
    assert state.outcomes == {"0,1,1": pytest.approx(0.9), "0,1,0": 1.0}
