"""BEL against Algorithm 1, Figure 4 and a planted irrecoverable step."""

import asyncio
import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from fakes import (
    FakeTask,
    Word,
    bel,
    completion_of,
    leaf_of,
    make_config,
    make_worker,
    planted,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from elpo_ray.config.growth import BelConfig, GrowthConfig, GrowthRule
from elpo_ray.evaluation.oracle import localization_accuracy
from elpo_ray.growth.bel import (
    candidates,
    entropy_gain,
    max_search_cost,
    middle,
    probe_size,
    segment_entropy,
)
from elpo_ray.growth.bel import grow as growth_rule
from elpo_ray.growth.independent import sample
from elpo_ray.tree import Localization, Probe, RolloutTree
from elpo_ray.types import (
    FinishReason,
    InfrastructureError,
    Score,
    Step,
    ToolKind,
    ToolResult,
    Turn,
)

TASK = FakeTask()
PROBLEM = TASK.train_problem(0)


def grow(plan: Callable[..., list[Word]], growth: GrowthConfig) -> RolloutTree:
    tree = asyncio.run(make_worker(plan, make_config(growth)).grow(PROBLEM, 0))
    assert len(tree.leaves()) == growth.n_total
    return tree


def first_search(plan: Callable[..., list[Word]], growth: GrowthConfig) -> Localization:
    return grow(plan, growth).localizations[0]


@pytest.mark.parametrize("verify_final", [True, False])
@pytest.mark.parametrize("num_tool_steps", range(1, 33))
def test_planted_step_is_localized_exactly(num_tool_steps: int, verify_final: bool) -> None:
    candidates = num_tool_steps + 1 if verify_final else num_tool_steps
    bound = math.ceil(math.log2(num_tool_steps + 1))
    growth = bel(1 + bound + 1, b_max=1, x_max=1, verify_final=verify_final)
    for critical in range(1, candidates + 1):
        tree = grow(planted(num_tool_steps, critical), growth)
        found = tree.localizations[0]
        assert len(found.probes) <= bound
        if candidates == 1:  # Algorithm 1 would name the only step without a probe
            assert (found.critical, found.interval, found.probes) == (None, (1, 1), [])
            continue
        assert found.confirmed and found.interval == (critical, critical)
        assert found.critical == tree.path(found.leaf)[critical - 1]


@pytest.mark.parametrize("num_tool_steps", [1, 2, 5, 8, 16, 32])
def test_sixteen_rollouts_give_the_step_or_an_interval_around_it(num_tool_steps: int) -> None:
    """Default settings: three failures are collected, then a probe takes one to three rollouts."""
    draw = random.Random(num_tool_steps).random
    unfinished = 0
    for critical in range(1, num_tool_steps + 2):
        tree = grow(planted(num_tool_steps, critical, draw), bel(16))
        assert tree.localizations
        for found in tree.localizations:
            low, high = found.interval
            assert low <= critical <= high
            path = tree.path(found.leaf)
            assert found.critical == (path[critical - 1] if found.confirmed else None)
            unfinished += not found.confirmed
        judged = sum(found.confirmed for found in tree.localizations)
        assert localization_accuracy(TASK, [PROBLEM], [tree]) == (judged, judged)
    assert num_tool_steps < 16 or unfinished


@pytest.mark.parametrize("seed", range(8))
def test_deep_search_out_of_budget_is_unconfirmed(seed: int) -> None:
    """Six probes of three do not fit into the 13 rollouts left after the three failures."""
    growth = bel(16, x_min=3)
    found = first_search(planted(32, 1 + seed * 4), growth)
    assert not found.confirmed and found.critical is None
    low, high = found.interval
    assert low <= 1 + seed * 4 <= high and low < high


def figure_4(number: int, before: list[str]) -> list[Word]:
    """Figure 4's sixteen trajectories; entropies make it search 0 and 5 with 2, 2 and 3 probes."""
    steps = [3, 2, 1, 3, 3, 3, 4, 3, 2, 3, 3, 3, 3, 1, 1, 3][number]
    words: list[Word] = [*["g"] * (steps - 1), "=ok" if number in (8, 9) else "=no"]
    entropies = {0: [0.5, 0.5, 0.6], 5: [0.5, 0.5, 2.0]}.get(number, [0.5] * steps)
    return list(zip(words, entropies, strict=True))[len(before) :]


def test_figure_4_is_replayed() -> None:
    # Its trajectories in the order in which they are asked for: the next buffer's with a search.
    order = [0, 1, 2, 5, 6, 7, 3, 4, 13, 14, 15, 8, 9, 10, 11, 12]
    tree = grow(lambda number, before: figure_4(order[number], before), bel(16))
    first, second = tree.localizations  # the third buffer is full when the budget is spent
    assert first.leaf == leaf_of(tree, order.index(0))
    assert first.probes == [Probe(anchor=1, attempts=2, successes=0)]
    assert first.critical == tree.path(first.leaf)[0] and first.confirmed
    assert second.leaf == leaf_of(tree, order.index(5))
    assert second.probes == [Probe(1, attempts=2, successes=2), Probe(2, attempts=3, successes=0)]
    assert second.critical == tree.path(second.leaf)[1] and second.confirmed
    numbers = [completion_of(tree.nodes[spend["leaf"]].step) for spend in tree.ledger]
    spends = sorted((order[n], e["anchor"]) for n, e in zip(numbers, tree.ledger, strict=True))
    roots = [number for number, anchor in spends if anchor is None]
    assert roots == [0, 1, 2, 5, 6, 7, 13, 14, 15]
    assert [s for s in spends if s[1]] == [(n, 1) for n in (3, 4, 8, 9)] + [
        (n, 2) for n in (10, 11, 12)
    ]


def test_budget_that_ends_with_a_full_buffer_starts_no_search() -> None:
    assert grow(planted(3, 2), bel(3)).localizations == []


def test_probe_cut_short_proves_nothing_unless_it_succeeds() -> None:
    growth = bel(2, b_max=1, x_min=2)
    failed = first_search(planted(1, 1), growth)
    assert failed.probes == [Probe(1, attempts=1, successes=0)]
    assert (failed.critical, failed.confirmed, failed.interval) == (None, False, (1, 2))
    tree = grow(planted(1, 2), growth)
    (recovered,) = tree.localizations
    assert recovered.probes == [Probe(1, attempts=1, successes=1)]
    assert recovered.critical == tree.path(recovered.leaf)[1]


def test_whole_probe_with_the_last_rollouts_is_conclusive() -> None:
    tree = grow(planted(1, 1), bel(3, b_max=1, x_min=2, x_max=2))
    (found,) = tree.localizations
    assert found.critical == tree.path(found.leaf)[0] and found.confirmed


def test_trajectories_without_tool_steps_are_never_searched() -> None:
    def plan(number: int, before: list[str]) -> list[Word]:
        return ["=no"]

    assert grow(plan, bel(16)).localizations == []


def test_search_prefers_tool_steps_then_gain_then_the_first() -> None:
    def plan(number: int, before: list[str]) -> list[Word]:
        words = [("g", 0.0), ("=no", 1.0)] if number else [("=no", 0.0)]
        return words[len(before) :]  # type: ignore[return-value]

    tree = grow(plan, bel(5, x_min=2, x_max=2))
    assert tree.localizations[0].leaf == leaf_of(tree, 1)


def test_success_is_searched_on_and_not_the_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    from elpo_ray.types import Score

    async def score(*_: object) -> Score:
        return Score(reward=-1.1, success=True)

    monkeypatch.setattr(FakeTask, "score", score)
    assert grow(planted(3, 1), bel(16)).localizations == []


def test_a_leaf_without_a_verdict_is_neither_searched_nor_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first trajectory has none; of the first probe's two completions the second has none."""
    from elpo_ray.types import UNGRADED, Score

    async def score(self: FakeTask, problem: object, steps: list[Step], *_: object) -> Score:
        number = completion_of(steps[-1])
        return UNGRADED if number in (0, 3) else Score(-1.0, False)

    monkeypatch.setattr(FakeTask, "score", score)
    tree = grow(planted(1, 1), bel(6, b_max=1, x_min=2, x_max=2))
    first, *_ = tree.localizations
    assert first.leaf == leaf_of(tree, 1)
    assert first.probes == [Probe(1, attempts=1, successes=0)] and not first.confirmed


def test_malformed_call_can_be_blamed() -> None:
    def plan(number: int, before: list[str]) -> list[Word]:
        # whoever has sent a malformed call never recovers
        words = ["g", "?", "g", "=no"] if not before else ["g", "g", "g", "=ok"]
        return [*words[len(before) : -1], "=no" if "?" in before else words[-1]]

    tree = grow(plan, bel(8, b_max=1))
    found = tree.localizations[0]
    assert found.critical == tree.path(found.leaf)[1]
    step = tree.nodes[found.critical].step
    assert step is not None and step.result is not None
    assert step.result.kind is ToolKind.MALFORMED and "question mark" in step.observation_text


def step_of(entropies: tuple[float, ...], tool: bool = True) -> Step:
    turn = Turn((1,) * len(entropies), (0.0,) * len(entropies), entropies, FinishReason.STOP, 0)
    return Step(turn, result=ToolResult(ToolKind.OK, "") if tool else None)


def test_segment_entropy_is_the_mean_of_the_first_tokens() -> None:
    step = step_of((1.0, 2.0, 6.0))
    assert segment_entropy(step, BelConfig(entropy_tokens=2)) == 1.5
    assert segment_entropy(step, BelConfig(entropy_tokens=20)) == 3.0
    assert segment_entropy(step, BelConfig(entropy_tokens=-1)) == 3.0


def test_entropy_gain_compares_turns_after_tools_with_the_first() -> None:
    """Eq. 4 with K = 2: H_1 is the entropy of turn 2, H_2 that of turn 3."""
    steps = [step_of((5.0,)), step_of((6.0,)), step_of((10.0,), tool=False)]
    assert entropy_gain(steps, BelConfig()) == 8.0 - 5.0


@pytest.mark.parametrize(
    ("gain", "size"), [(-100.0, 1), (-0.23, 1), (-0.2, 2), (0.0, 2), (0.21, 2), (0.23, 3), (9e9, 3)]
)
def test_probe_size_is_rounded_half_up(gain: float, size: int) -> None:
    """1 + 2 σ(5 gain) passes 1.5 and 2.5 at gain = ∓ln(3)/5 = ∓0.2197."""
    steps = [step_of((0.0,)), step_of((gain,), tool=False)]
    assert probe_size(steps, 1, BelConfig()) == size


def test_probe_size_rounds_exact_halves_up() -> None:
    steps = [step_of((1.0,)), step_of((1.0,), tool=False)]
    assert probe_size(steps, 1, BelConfig(x_min=1, x_max=2)) == 2
    assert probe_size(steps, 1, BelConfig(x_min=2, x_max=3)) == 3


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    n_total=st.integers(2, 24),
    b_max=st.integers(1, 5),
    verify_final=st.booleans(),
    rule=st.sampled_from([GrowthRule.bel, GrowthRule.independent]),
)
def test_any_policy_spends_the_budget_and_keeps_the_books(
    seed: int, n_total: int, b_max: int, verify_final: bool, rule: GrowthRule
) -> None:
    draw = random.Random(seed)

    def plan(number: int, before: list[str]) -> list[Word]:
        length = draw.randint(0, 5)
        words = [(draw.choice("gggb?"), draw.random()) for _ in range(length)]
        return [*words, (draw.choice(["=ok", "=no"]), draw.random())]

    growth = GrowthConfig(
        rule=rule, n_total=n_total, bel=BelConfig(b_max=b_max, verify_final=verify_final)
    )
    tree = grow(plan, growth)
    assert sorted(e["leaf"] for e in tree.ledger) == [leaf.id for leaf in tree.leaves()]
    probed = sum(e["anchor"] is not None for e in tree.ledger)
    assert probed == sum(p.attempts for found in tree.localizations for p in found.probes)
    for found in tree.localizations:
        low, high = found.interval
        assert 1 <= low <= high <= len(tree.path(found.leaf))
        assert found.confirmed == (found.critical is not None)
        assert all(p.successes or p.anchor >= high or not found.confirmed for p in found.probes)


class Fates:
    """`interfaces.Rollout` in which the n-th trajectory from the prompt, and the n-th completion
    from each of its anchors, have the same fate whenever they are asked for."""

    enough = False

    def __init__(self, seed: int, n_total: int, *, fixed: bool) -> None:
        self.fixed, self.remaining, self._seed = fixed, n_total, seed
        self.tree = RolloutTree("t", n_total)
        self.random = random.Random(seed)
        self.together = 0
        self._asked: dict[tuple[int, int], int] = {}
        self._root_of = {0: -1}
        self._waiting = 0

    async def complete(self, at: int = 0, *, anchor: int | None = None) -> int:
        assert self.remaining > 0
        self.remaining -= 1
        key = (self._root_of[at], anchor or 0)
        number = self._asked[key] = self._asked.get(key, 0) + 1
        draw = random.Random(f"{self._seed} {key} {number}")
        steps = [step_of((draw.random(), draw.random())) for _ in range(draw.randint(1, 6))]
        steps[-1] = Step(steps[-1].turn)
        self._waiting += 1
        self.together = max(self.together, self._waiting)
        await asyncio.sleep(0)
        self._waiting -= 1
        success = draw.random() < 0.4
        leaf = self.tree.add_trajectory(at, steps, Score(float(success), success))
        root = number if at == 0 else self._root_of[at]
        self._root_of |= {node: root for node in self.tree.path(leaf) if node not in self._root_of}
        return leaf

    def found(self) -> list[tuple[int, Localization]]:
        """What the searches found, leaves named by their trajectory."""
        return [
            (self._root_of[f.leaf], replace(f, leaf=0, critical=None))
            for f in self.tree.localizations
        ]

    def asked(self) -> dict[tuple[int, int], int]:
        return self._asked


@given(
    seed=st.integers(0, 10_000),
    n_total=st.integers(2, 24),
    b_max=st.integers(1, 4),
    verify_final=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_what_is_sampled_early_changes_nothing(
    seed: int, n_total: int, b_max: int, verify_final: bool
) -> None:
    config = bel(n_total, b_max=b_max, verify_final=verify_final)
    one, other = (Fates(seed, n_total, fixed=fixed) for fixed in (False, True))
    for rollout in (one, other):
        asyncio.run(growth_rule(rollout, config))
        assert rollout.remaining == 0
    assert one.found() == other.found() and one.asked() == other.asked()


def test_the_next_buffer_is_sampled_during_a_search() -> None:
    turns = [Fates(3, 24, fixed=fixed) for fixed in (False, True)]
    for rollout in turns:
        asyncio.run(growth_rule(rollout, bel(24)))
    assert turns[0].together <= 3 < turns[1].together


@given(
    gains=st.lists(st.floats(-1, 1), min_size=2, max_size=20),
    lost=st.lists(st.booleans(), min_size=20, max_size=20),
    verify_final=st.booleans(),
)
def test_no_search_costs_more_than_its_maximum(
    gains: list[float], lost: list[bool], verify_final: bool
) -> None:
    config = BelConfig(verify_final=verify_final)
    steps = [step_of((gain, 0.0)) for gain in gains]
    steps[-1] = Step(steps[-1].turn)
    (lo, crit), cost = candidates(steps, config), 0
    while lo < crit:
        m = middle(lo, crit, config)
        cost += probe_size(steps, m, config)
        lo, crit = (lo, m) if lost[m - 1] else (m + 1, crit)
    assert cost <= max_search_cost(steps, config)


async def test_failed_completion_cancels_the_others() -> None:
    class Completions:
        tree = RolloutTree("t", 3)
        remaining = 3
        started = ended = 0

        async def complete(self, at: int = 0, *, anchor: int | None = None) -> int:
            self.started += 1
            mine = self.started
            try:
                await asyncio.sleep(0 if mine == 2 else 60)
                raise InfrastructureError("the second one")
            finally:
                await asyncio.sleep(0)
                self.ended += 1

    rollout = Completions()
    with pytest.raises(InfrastructureError, match="second"):
        await sample(rollout, 3)
    assert rollout.started == rollout.ended == 3
