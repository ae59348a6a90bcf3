"""Search by evidence: a planted step, evidence from the tree, nothing that depends on timing."""

import asyncio
import itertools
import math
import random
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from fakes import FakeTask, Word, leaf_of, make_config, make_worker, planted
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bel import Fates

from elpo_ray.config.growth import (
    BelConfig,
    FreeEvidence,
    GrowthConfig,
    GrowthRule,
    PosteriorConfig,
    Prior,
)
from elpo_ray.dump import MalformedTreeError, dump_tree, read_tree
from elpo_ray.evaluation.oracle import localization_accuracy
from elpo_ray.growth import bel as bel_rule
from elpo_ray.growth import posterior as posterior_rule
from elpo_ray.growth.posterior import free_evidence
from elpo_ray.tree import Probe, RolloutTree
from elpo_ray.types import FinishReason, Score, Step, ToolKind, ToolResult, Turn

TASK = FakeTask()
PROBLEM = TASK.train_problem(0)


def posterior(n_total: int = 16, b_max: int = 3, **knobs: Any) -> GrowthConfig:
    return GrowthConfig(
        rule=GrowthRule.posterior,
        n_total=n_total,
        bel=BelConfig(b_max=b_max),
        posterior=PosteriorConfig(**knobs),
    )


def grow(plan: Any, growth: GrowthConfig) -> RolloutTree:
    tree = asyncio.run(make_worker(plan, make_config(growth)).grow(PROBLEM, 0))
    assert len(tree.leaves()) == growth.n_total
    return tree


# --- free evidence ---


def tree_of(*trajectories: tuple[str, bool | None]) -> RolloutTree:
    """Trajectories from the prompt, a letter a step; the last one answers."""
    tree = RolloutTree("t", len(trajectories))
    for letters, verdict in trajectories:
        steps = [
            Step(
                Turn((ord(letter),), (0.0,), (0.0,), FinishReason.STOP, 0),
                observation_ids=(1,),
                result=ToolResult(ToolKind.OK, letter.lower()),
            )
            for letter in letters
        ]
        steps[-1] = replace(steps[-1], result=None, observation_ids=())
        score = Score(0.0, bool(verdict), graded=verdict is not None)
        tree.add_trajectory(0, steps, score)
    return tree


def test_a_trajectory_counts_at_every_anchor_it_shares() -> None:
    tree = tree_of(("abcX", False), ("abcX", False), ("abdX", True), ("aXX", None), ("ABcX", True))
    leaves = [leaf.id for leaf in tree.leaves()]
    found = free_evidence(tree, leaves[0], leaves, FreeEvidence.tokens)
    assert found == [Probe(1, 2, 1), Probe(2, 2, 1), Probe(3, 1, 0)]
    assert free_evidence(tree, leaves[0], leaves[:2], FreeEvidence.tokens) == [
        Probe(1, 1, 0),
        Probe(2, 1, 0),
        Probe(3, 1, 0),
    ]
    assert free_evidence(tree, leaves[0], leaves, FreeEvidence.none) == []


def test_an_equal_state_is_an_equal_history_of_results() -> None:
    tree = tree_of(("abcX", False), ("ABcX", True), ("abX", False))
    leaves = [leaf.id for leaf in tree.leaves()]
    found = free_evidence(tree, leaves[0], leaves, FreeEvidence.state)
    assert found == [Probe(1, 2, 1), Probe(2, 2, 1), Probe(3, 1, 1)]


def test_binary_search_takes_successes_of_the_tree_for_known() -> None:
    tree = tree_of(("abcX", False), ("abdX", True), ("abcX", False), ("aX", True), ("abcX", None))
    leaves = [leaf.id for leaf in tree.leaves()]
    assert bel_rule.known_sound(tree, leaves[0], leaves) == 2
    assert bel_rule.known_sound(tree, leaves[0], leaves[2:]) == 1
    assert bel_rule.known_sound(tree, leaves[0], leaves[4:]) == 0


# --- the search ---


@pytest.mark.parametrize("num_tool_steps", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("prior", list(Prior))
def test_a_planted_step_is_named(num_tool_steps: int, prior: Prior) -> None:
    """Completions of sound prefixes always succeed: V is close to 1."""
    growth = posterior(32, b_max=1, prior=prior, beta=(50.0, 0.5), max_probes=20, threshold=0.9)
    for critical in range(1, num_tool_steps + 2):
        tree = grow(planted(num_tool_steps, critical), growth)
        found = tree.localizations[0]
        assert found.confirmed and found.interval == (critical, critical)
        assert found.critical == tree.path(found.leaf)[critical - 1]
        assert found.posterior is not None and found.posterior.last[critical - 1] >= 0.9
        assert len(found.posterior.trail) == len(found.probes) + 1
        judged = sum(one.confirmed for one in tree.localizations)
        assert localization_accuracy(TASK, [PROBLEM], [tree]) == (judged, judged)


def test_a_search_names_no_step_after_its_last_probe() -> None:
    tree = grow(planted(8, 4), posterior(16, b_max=1, max_probes=1))
    assert all(len(found.probes) <= 1 for found in tree.localizations)
    found = tree.localizations[0]
    assert not found.confirmed and found.critical is None
    low, high = found.interval
    assert low < high and found.posterior is not None
    assert math.fsum(found.posterior.last[low - 1 : high]) >= 0.8


def test_a_posterior_of_exactly_the_threshold_names_its_step() -> None:
    """One of two steps is left, each as likely: rounding must not decide."""
    fates = FewWords(0, 9, fixed=True)
    fates.tree = tree_of(*[("abcdX", False)] * 2, ("aX", True), ("aX", True), ("abY", False))
    leaves = [leaf.id for leaf in fates.tree.leaves()]
    config = posterior(prior=Prior.uniform, beta=(0.6, 0.3), threshold=0.5, max_probes=0)
    free = [Probe(1, 3, 2), Probe(2, 1, 0)]
    found = asyncio.run(posterior_rule.search(fates, leaves[0], free, config))
    assert found.posterior is not None and found.posterior.last[1] == pytest.approx(0.5)
    assert found.confirmed and found.interval == (2, 2)


def test_without_probes_only_the_prior_and_the_tree_can_name() -> None:
    tree = grow(planted(3, 2), posterior(8, max_probes=0))
    assert tree.localizations and all(not found.probes for found in tree.localizations)
    assert all(entry["kind"] == "root" for entry in tree.ledger)


def test_a_completion_without_a_verdict_is_spent_and_shows_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fakes import completion_of

    from elpo_ray.types import UNGRADED

    async def score(self: FakeTask, problem: object, steps: list[Step], *_: object) -> Score:
        return UNGRADED if completion_of(steps[-1]) == 1 else Score(-1.0, False)

    monkeypatch.setattr(FakeTask, "score", score)
    tree = grow(planted(2, 1), posterior(2, b_max=1))
    [found] = tree.localizations
    assert found.probes == [replace(found.probes[0], attempts=0, successes=0)]
    assert found.posterior is not None
    assert found.posterior.trail[0] == found.posterior.trail[1]
    assert found.leaf == leaf_of(tree, 0)


KNOBS = st.builds(
    posterior,
    n_total=st.integers(2, 24),
    b_max=st.integers(1, 4),
    prior=st.sampled_from(Prior),
    free_evidence=st.sampled_from(FreeEvidence),
    threshold=st.floats(0.3, 1.0),
    max_probes=st.integers(0, 6),
)
BEL = st.builds(
    lambda n_total, b_max, **knobs: GrowthConfig(
        n_total=n_total, bel=BelConfig(b_max=b_max, **knobs)
    ),
    n_total=st.integers(2, 24),
    b_max=st.integers(1, 4),
    verify_final=st.booleans(),
    use_tree=st.booleans(),
    early_stop=st.booleans(),
)


class FewWords(Fates):
    """Fates whose trajectories share prefixes: steps have one of two tokens."""

    async def complete(self, at: int = 0, *, anchor: int | None = None) -> int:
        leaf = await super().complete(at, anchor=anchor)
        for node in self.tree.path(leaf):
            step = self.tree.nodes[node].step
            assert step is not None
            token = int(step.turn.entropies[0] * 2)
            turn = replace(step.turn, token_ids=(token,), logprobs=(-step.turn.entropies[0],))
            result = None if step.result is None else ToolResult(ToolKind.OK, str(token))
            self.tree.nodes[node].step = replace(step, turn=turn, result=result)
        return leaf


@given(seed=st.integers(0, 10_000), config=st.one_of(KNOBS, BEL))
@settings(max_examples=300, deadline=None)
def test_what_is_sampled_early_changes_nothing(seed: int, config: GrowthConfig) -> None:
    rule = posterior_rule if config.rule is GrowthRule.posterior else bel_rule
    one, other = (FewWords(seed, config.n_total, fixed=fixed) for fixed in (False, True))
    for rollout in (one, other):
        asyncio.run(rule.grow(rollout, config))
        assert rollout.remaining == 0
    assert one.found() == other.found() and one.asked() == other.asked()


def test_the_tree_does_give_evidence_in_that_world() -> None:
    """What the test above compares is not empty."""
    trees = [FewWords(seed, 24, fixed=True) for seed in range(20)]
    for rollout in trees:
        asyncio.run(posterior_rule.grow(rollout, posterior(24)))
    found = list(itertools.chain.from_iterable(tree.tree.localizations for tree in trees))
    assert any(f.posterior and f.posterior.free for f in found)
    assert {f.confirmed for f in found} == {True, False}
    assert max(rollout.together for rollout in trees) > 3


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), config=st.one_of(KNOBS, BEL))
def test_any_policy_spends_the_budget_and_keeps_the_books(seed: int, config: GrowthConfig) -> None:
    draw = random.Random(seed)

    def plan(number: int, before: list[str]) -> list[Word]:
        words: list[Word] = [
            (draw.choice("gggb?"), draw.random()) for _ in range(draw.randint(0, 5))
        ]
        return [*words, (draw.choice(["=ok", "=no"]), draw.random())]

    tree = grow(plan, config)
    assert sorted(e["leaf"] for e in tree.ledger) == [leaf.id for leaf in tree.leaves()]
    probed = sum(e["anchor"] is not None for e in tree.ledger)
    assert probed == sum(p.attempts for found in tree.localizations for p in found.probes)
    for found in tree.localizations:
        low, high = found.interval
        assert 1 <= low <= high <= len(tree.path(found.leaf))
        assert found.confirmed == (found.critical is not None)
    again = read_tree(dump_tree(tree))
    assert again.localizations == tree.localizations


def test_early_stop_ends_a_probe_with_its_first_success() -> None:
    settings = {"b_max": 1, "x_min": 3, "x_max": 3}
    for early, attempts in ((False, 3), (True, 1)):
        growth = GrowthConfig(n_total=12, bel=BelConfig(early_stop=early, **settings))
        found = grow(planted(1, 2), growth).localizations[0]
        assert found.probes == [Probe(1, attempts, attempts)]
    growth = GrowthConfig(n_total=12, bel=BelConfig(early_stop=True, **settings))
    assert grow(planted(1, 1), growth).localizations[0].probes == [Probe(1, 3, 0)]


@pytest.mark.parametrize("verify_final", [True, False])
def test_a_tree_that_shows_every_step_sound_leaves_nothing_to_probe(verify_final: bool) -> None:
    """All tool steps of the failure are shared by a success: its answer was wrong, which
    Algorithm 1 as written cannot say."""
    fates = FewWords(0, 4, fixed=True)
    fates.tree = tree_of(("abX", False), ("abY", True))
    leaf, other = (leaf.id for leaf in fates.tree.leaves())
    known = bel_rule.known_sound(fates.tree, leaf, [leaf, other])
    settings = BelConfig(verify_final=verify_final)
    found = asyncio.run(bel_rule.search(fates, leaf, settings, known + 1))
    assert (found.probes, found.interval) == ([], (3, 3))
    assert found.critical == (leaf if verify_final else None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prior": [1.0]}, r"posterior\.prior=.*one number a step"),
        ({"trail": []}, r"posterior\.trail"),
        ({"beta": [0.0, 1.0]}, r"posterior\.beta"),
        ({"free": [{"anchor": 1, "attempts": 0, "successes": 1}]}, r"posterior\.free\[0\]"),
    ],
)
def test_a_dump_with_a_broken_posterior_is_refused(change: dict[str, Any], message: str) -> None:
    record = dump_tree(grow(planted(3, 2), posterior(8, b_max=1)))
    record["localizations"][0]["posterior"] |= change
    with pytest.raises(MalformedTreeError, match=message):
        read_tree(record)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"threshold": 0.0}, r"posterior\.threshold=0\.0"),
        ({"beta": (0.0, 1.0)}, r"posterior\.beta"),
        ({"beta": (0.6,)}, r"posterior\.beta=\[0\.6\]: give 2 values"),
        ({"beta": [0.6, 1.0, 1.0]}, r"posterior\.beta=.*give 2 values"),
        ({"least_likely": 0}, r"posterior\.least_likely=0"),
        ({"max_probes": -1}, r"posterior\.max_probes=-1"),
    ],
)
def test_knobs_out_of_bounds_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        posterior(**knobs)


@cache
def fewest(left: int, missing: int, b_max: int, most: int) -> int:
    """Roots of the sequential loop at its worst, over all outcomes and all costs of searches."""
    if left == 0:
        return 0
    if missing == 0:
        return min(fewest(max(0, left - cost), b_max, b_max, most) for cost in range(most + 1))
    return 1 + min(fewest(left - 1, missing - failed, b_max, most) for failed in (0, 1))


@given(
    left=st.integers(0, 24),
    missing=st.integers(1, 4),
    b_max=st.integers(1, 4),
    most=st.integers(0, 6),
)
@settings(max_examples=300, deadline=None)
def test_what_is_sampled_ahead_is_what_is_sampled_in_any_case(
    left: int, missing: int, b_max: int, most: int
) -> None:
    missing = min(missing, b_max)
    assert bel_rule.sure_roots(left, missing, b_max, most) == fewest(left, missing, b_max, most)
    assert bel_rule.sure_roots(left, missing, b_max, None) == min(left, missing)


def test_the_first_trajectories_are_sampled_at_once() -> None:
    """Three failures and a search of at most four leave nine of 16 rollouts: three more failures, a
    second search, and the last two."""
    assert posterior_rule.first_roots(posterior(16)) == 3 + 3 + 2
    fates = FewWords(0, 16, fixed=True)
    asyncio.run(posterior_rule.grow(fates, posterior(16)))
    assert fates.together >= 8
    assert posterior_rule.first_roots(posterior(16, max_probes=0)) == 16
