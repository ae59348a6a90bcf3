"""Bayes' rule over the steps of a failed trajectory: small cases, enumeration, and the priors."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elpo_ray.config.growth import GrowthConfig, PosteriorConfig, Prior
from elpo_ray.growth.belief import (
    Belief,
    credible_interval,
    entropy,
    log_no_success,
    prior_over,
    reaches,
    surprise,
)
from elpo_ray.types import FinishReason, Step, Turn


def with_prior(prior: Prior) -> GrowthConfig:
    return GrowthConfig(posterior=PosteriorConfig(prior=prior))


def by_enumeration(prior: list[float], beta: tuple[float, float], seen: dict[int, list[bool]]):
    """The posterior by its definition: every anchor's V is integrated over numerically."""
    a, b = beta
    grid = [(i + 0.5) / 20000 for i in range(20000)]
    density = [v ** (a - 1) * (1 - v) ** (b - 1) for v in grid]
    whole = math.fsum(density)
    weights = []
    for step, weight in enumerate(prior, start=1):
        for anchor, outcomes in seen.items():
            won, lost = outcomes.count(True), outcomes.count(False)
            if anchor < step:
                chance = (d * v**won * (1 - v) ** lost for d, v in zip(density, grid, strict=True))
                weight *= math.fsum(chance) / whole
            elif won:
                weight = 0.0
        weights.append(weight)
    total = math.fsum(weights)
    return [weight / total for weight in weights]


@pytest.mark.parametrize(
    "seen",
    [
        {},
        {2: [False]},
        {1: [False, False], 3: [False]},
        {2: [True], 3: [False, False]},
        {1: [False], 2: [True, False], 3: [False]},
        {3: [True]},
    ],
)
def test_the_posterior_is_bayes_rule(seen: dict[int, list[bool]]) -> None:
    prior, beta = [0.1, 0.4, 0.3, 0.2], (1.5, 2.0)
    belief = Belief.of(prior, beta)
    for anchor, outcomes in seen.items():
        for success in outcomes:
            belief = belief.seen(anchor, success)
    assert belief.posterior() == pytest.approx(by_enumeration(prior, beta, seen), abs=1e-4)


def test_no_success_has_the_beta_functions_likelihood() -> None:
    a, b, f = 0.6, 1.0, 5
    beta = lambda x, y: math.lgamma(x) + math.lgamma(y) - math.lgamma(x + y)  # noqa: E731
    assert log_no_success(f, a, b) == pytest.approx(beta(a, b + f) - beta(a, b))
    assert log_no_success(0, a, b) == 0


@given(
    prior=st.lists(st.floats(0.01, 1), min_size=2, max_size=9),
    evidence=st.lists(st.tuples(st.integers(1, 8), st.booleans()), max_size=20),
    a=st.floats(0.1, 5),
    b=st.floats(0.1, 5),
)
@settings(max_examples=100, deadline=None)
def test_the_order_of_completions_does_not_matter(
    prior: list[float], evidence: list[tuple[int, bool]], a: float, b: float
) -> None:
    total = math.fsum(prior)
    evidence = [(1 + (m - 1) % (len(prior) - 1), success) for m, success in evidence]
    one = other = Belief.of([p / total for p in prior], (a, b))
    for m, success in evidence:
        one = one.seen(m, success)
    for m, success in reversed(evidence):
        other = other.seen(m, success)
    found = one.posterior()
    assert found == pytest.approx(other.posterior())
    assert math.fsum(found) == pytest.approx(1) and min(found) >= 0
    sound = max((m for m, success in evidence if success), default=0)
    assert all(p == 0 for p in found[:sound]) and all(p > 0 for p in found[sound:])


@given(prior=st.lists(st.floats(0.01, 1), min_size=3, max_size=7), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_next_anchor_is_the_one_that_tells_most(prior: list[float], seed: int) -> None:
    total, draw = math.fsum(prior), random.Random(seed)
    belief = Belief.of([p / total for p in prior], (0.6, 1.0))
    for _ in range(draw.randrange(4)):
        belief = belief.seen(draw.randrange(1, len(prior)), draw.random() < 0.3)
    now = belief.posterior()

    def expected(m: int) -> float:
        """By enumeration over where the critical step is, and over the outcome."""
        a, b = belief.beta
        chance = a / (a + b + belief.failures[m - 1])
        success = sum(p * chance for c, p in enumerate(now, start=1) if c > m)
        parts = []
        for outcome, share in ((True, success), (False, 1 - success)):
            weights = [
                p * ((chance if outcome else 1 - chance) if c > m else float(not outcome))
                for c, p in enumerate(now, start=1)
            ]
            if share > 0:
                parts.append(share * entropy([w / sum(weights) for w in weights]))
        return entropy(now) - sum(parts)

    gains = [expected(m) for m in range(1, len(prior))]
    assert gains[belief.best_anchor() - 1] == pytest.approx(max(gains), abs=1e-9)


def turn_of(logprobs: tuple[float, ...], entropies: tuple[float, ...] = ()) -> Step:
    ids = tuple(range(len(logprobs)))
    entropies = entropies or (0.0,) * len(ids)
    return Step(Turn(ids, logprobs, entropies, FinishReason.STOP, 0))


def test_surprise_is_one_less_the_mean_of_the_least_likely_tokens() -> None:
    step = turn_of((math.log(0.5), math.log(0.1), math.log(0.9)))
    assert surprise(step, 1) == pytest.approx(0.9)
    assert surprise(step, 2) == pytest.approx(1 - (0.1 + 0.5) / 2)
    assert surprise(step, 9) == pytest.approx(1 - (0.1 + 0.5 + 0.9) / 3)


def test_each_prior_says_what_it_is_named_after() -> None:
    steps = [turn_of((0.0,), (0.0,)), turn_of((math.log(0.5),), (2.0,))]
    assert prior_over(steps, with_prior(Prior.uniform)) == [0.5, 0.5]
    floor = 1e-3
    expected = [floor / (floor + 0.5), 0.5 / (floor + 0.5)]
    assert prior_over(steps, with_prior(Prior.surprise)) == pytest.approx(expected)
    expected = [floor / (floor + 2), 2 / (floor + 2)]
    assert prior_over(steps, with_prior(Prior.entropy)) == pytest.approx(expected)


def test_the_interval_is_the_shortest_that_holds_the_mass() -> None:
    assert credible_interval([0.1, 0.2, 0.3, 0.4], 0.4) == (4, 4)
    assert credible_interval([0.1, 0.2, 0.3, 0.4], 0.7) == (3, 4)
    assert credible_interval([0.25] * 4, 0.5) == (1, 2)
    assert credible_interval([0.25] * 4, 1.0) == (1, 4)


def test_rounding_does_not_decide_whether_a_threshold_is_reached() -> None:
    """Three steps are left, one of them twice as likely as the others: exactly one half."""
    belief = Belief.of([0.2] * 5, (0.6, 0.3))
    for anchor, success in ((1, True), (1, True), (1, False), (2, False)):
        belief = belief.seen(anchor, success)
    found = belief.posterior()
    assert found == pytest.approx([0, 1 / 2, 1 / 6, 1 / 6, 1 / 6])
    assert reaches(found[1], 0.5) and not reaches(found[1], 0.500001)
    assert credible_interval(found, 0.5) == (2, 2)
    assert credible_interval([0.1] * 10, 0.3) == (1, 3)
    assert reaches(1 - 1e-12, 1.0) and not reaches(1 - 1e-6, 1.0)
