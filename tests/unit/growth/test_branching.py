"""Branching by entropy and at random."""

import asyncio
import math
import random
from collections import Counter
from collections.abc import Sequence

import pytest
from fakes import FakeTask, Plan, Word, completion_of, make_config, make_worker
from hypothesis import given, settings
from hypothesis import strategies as st

from elpo_ray.config.growth import EntropyBranchConfig, GrowthConfig, GrowthRule, RandomBranchConfig
from elpo_ray.growth.budget import Totals
from elpo_ray.growth.entropy_branch import copies, monitored_roots, turn_entropy
from elpo_ray.growth.random_branch import deal, prefixes
from elpo_ray.rollout.episode import derive_seed
from elpo_ray.tree import RolloutTree
from elpo_ray.types import FinishReason, Score, Step, Turn

PROBLEM = FakeTask().train_problem(0)


def grow(plan: Plan, growth: GrowthConfig, seed: int = 0) -> RolloutTree:
    config = make_config(growth)
    config.trainer.seed = seed
    return asyncio.run(make_worker(plan, config).grow(PROBLEM, 0))


def by_entropy(n_total: int = 16, **settings: object) -> GrowthConfig:
    entropy = EntropyBranchConfig(**{"vocab_size": 3} | settings)  # type: ignore[arg-type]
    return GrowthConfig(rule=GrowthRule.entropy_branch, n_total=n_total, entropy=entropy)


def at_random(n_total: int = 16, **settings: int) -> GrowthConfig:
    branch = RandomBranchConfig(**settings)
    return GrowthConfig(rule=GrowthRule.random_branch, n_total=n_total, random=branch)


def origins(tree: RolloutTree) -> list[tuple[int | None, int]]:
    """For each completion in the order asked for: that whose prefix it continues, and the depth of
    the prefix; None and 0 from the prompt."""
    found: dict[int, tuple[int | None, int]] = {}
    for leaf in tree.leaves():
        steps = tree.steps(leaf.id)
        numbers = [completion_of(step) for step in steps]
        depth = numbers.index(numbers[-1])
        found[numbers[-1]] = (numbers[depth - 1] if depth else None, depth)
    return [found[i] for i in range(len(found))]


# --- entropy branching ---


def wordy(seed: int) -> tuple[Plan, dict[int, list[float]]]:
    """A plan of random lengths and entropies, and where it records each completion's entropies."""
    entropies: dict[int, list[float]] = {}

    def plan(number: int, before: list[str]) -> list[Word]:
        draw = random.Random(f"{seed}-{number}")
        length = draw.randint(0, 5)
        entropies[number] = [draw.uniform(0, 2) for _ in range(length + 1)]
        words = ["g"] * length + [draw.choice(["=ok", "=no"])]
        return list(zip(words, entropies[number], strict=True))

    return plan, entropies


def lockstep(
    n_total: int, cfg: EntropyBranchConfig, entropies: dict[int, list[float]], draw: random.Random
) -> list[tuple[int | None, int]]:
    """ARPO's and AEPO's loop turn by turn, as the original writes it, over known entropies."""
    tokens = 4  # a scripted turn "g~N;" with a one-digit N, each token with the same entropy

    def h(path: int, turn: int) -> float:
        length = tokens + (path >= 10) + (turn == len(entropies[path]) - 1) * 2
        return min(length, cfg.entropy_tokens) * entropies[path][turn] / math.log(cfg.vocab_size)

    came: list[tuple[int | None, int]] = [(None, 0)] * cfg.initial
    turn_of = dict.fromkeys(range(cfg.initial), 0)  # own turn each active path generates now
    in_a_row = 0
    while len(came) < n_total:
        active = [p for p in turn_of if turn_of[p] < len(entropies[p]) - 1]
        added = []
        for path in active:
            for _ in range(cfg.beam - 1):
                if len(came) + len(added) >= n_total:
                    break
                value = draw.random()
                if cfg.penalty == 0:  # ARPO: clip(u - w dH) <= p
                    value -= cfg.entropy_weight * (h(path, turn_of[path]) - h(path, 0))
                    hit = min(max(value, 0), 1) < cfg.branch_probability
                else:  # AEPO with the complement of the draw: clip((u + w dH)(1 - 0.05 l)) >= 1 - p
                    value = 1 - value
                    value += cfg.entropy_weight * (h(path, turn_of[path]) - h(path, 0))
                    value *= max(0, 1 - cfg.penalty * in_a_row)
                    hit = min(max(value, 0), 1) > 1 - cfg.branch_probability
                if hit:
                    added.append((path, came[path][1] + turn_of[path] + 1))
        in_a_row = in_a_row + 1 if added else 0
        turn_of = {path: turn_of[path] + 1 for path in active}
        if not active:
            added.append((None, 0))
        for origin in added:
            turn_of[len(came)] = 0
            came.append(origin)
    return came


@pytest.mark.parametrize("penalty", [0.0, 0.05, 0.4])
@pytest.mark.parametrize("seed", range(12))
def test_replay_equals_the_lockstep_of_the_original(seed: int, penalty: float) -> None:
    growth = by_entropy(
        initial=3, beam=2 + seed % 2, penalty=penalty, entropy_weight=0.1, entropy_tokens=3
    )
    plan, entropies = wordy(seed)
    tree = grow(plan, growth, seed)
    draw = random.Random(derive_seed(seed, "branch", PROBLEM.id, 0))
    assert origins(tree) == lockstep(16, growth.entropy, entropies, draw)


def long(number: int, before: list[str]) -> list[Word]:
    """Six turns in all, wherever a completion starts."""
    return (["g"] * 5 + ["=no"])[len(before) :]


def test_certain_branching_doubles_every_iteration() -> None:
    tree = grow(long, by_entropy(4, initial=1, branch_probability=1.0, entropy_weight=0.0))
    assert origins(tree) == [(None, 0), (0, 1), (0, 2), (1, 2)]


def test_a_full_penalty_pauses_after_each_branching() -> None:
    growth = by_entropy(4, initial=1, branch_probability=1.0, entropy_weight=0.0, penalty=1.0)
    assert origins(grow(long, growth)) == [(None, 0), (0, 1), (0, 3), (1, 3)]


def test_without_branching_the_budget_is_filled_from_the_prompt() -> None:
    growth = by_entropy(6, initial=2, branch_probability=0.0, entropy_weight=0.0)
    assert origins(grow(long, growth)) == [(None, 0)] * 6


@pytest.mark.parametrize(
    ("rise", "in_a_row", "penalty", "probability"),
    [
        (0.0, 0, 0.0, 0.5),
        (1.0, 0, 0.0, 0.7),
        (-1.0, 3, 0.0, 0.3),
        (9.0, 0, 0.0, 1.0),
        (-9.0, 0, 0.0, 0.0),
        (0.0, 2, 0.05, 1 - 0.5 / 0.9),
        (0.5, 2, 0.05, 1 - 0.5 / 0.9 + 0.1),
        (9.0, 20, 0.05, 0.0),
    ],
)
def test_probability_of_a_branch(
    rise: float, in_a_row: int, penalty: float, probability: float
) -> None:
    cfg = EntropyBranchConfig(penalty=penalty)
    grid = [(i + 0.5) / 10000 for i in range(10000)]
    share = sum(copies(rise, in_a_row, draw, cfg) for draw in grid) / len(grid)
    assert share == pytest.approx(probability, abs=1e-4)


def test_threshold_rule_needs_no_draw() -> None:
    cfg = EntropyBranchConfig(threshold=0.6, penalty=0.05)
    for draw in (0.0, 0.999):
        assert copies(0.51, 0, draw, cfg) and not copies(0.49, 0, draw, cfg)
        assert not copies(0.51, 1, draw, cfg)  # 0.602 * 0.95


def step_of(*entropies: float) -> Step:
    count = len(entropies)
    return Step(Turn((1,) * count, (0.0,) * count, entropies, FinishReason.STOP, 0))


def test_turn_entropy_is_a_sum_in_units_of_the_vocabulary() -> None:
    cfg = EntropyBranchConfig(entropy_tokens=2, vocab_size=8)
    assert turn_entropy(step_of(1.0, 2.0, 4.0), cfg) == pytest.approx(3 / math.log(8))


@pytest.mark.parametrize(
    ("gap", "roots"), [(0.0, 9), (100.0, 16), (-100.0, 1), (2.0, 12), (-2.0, 5)]
)
def test_monitored_trajectory_says_how_many_start_at_the_prompt(gap: float, roots: int) -> None:
    """σ(0.5 · 2) = 0.731: 11.7 -> 12; σ(-1) = 0.269: 4.3 -> 5."""
    cfg = EntropyBranchConfig(monitor=True)
    unit = math.log(cfg.vocab_size)
    steps = [step_of(gap * unit), step_of(-unit), step_of(unit)]
    assert monitored_roots(steps, 16, cfg) == roots
    assert monitored_roots(steps[:1], 16, cfg) == 9


def test_monitored_trajectory_is_one_of_the_budget() -> None:
    growth = by_entropy(monitor=True, branch_probability=0.0, entropy_weight=0.0, initial=16)
    tree = grow(long, growth)
    assert len(tree.leaves()) == 16 and Totals.of(tree.ledger).rollouts == 16
    started = grow(long, by_entropy(monitor=True, branch_probability=1.0, entropy_weight=0.0))
    assert origins(started)[:10] == [(None, 0)] * 9 + [(0, 1)]


# --- random branching ---


def test_tree_grpo_grows_four_trees_of_four() -> None:
    tree = grow(long, at_random(trees=4))
    assert Counter(leaf.group for leaf in tree.leaves()) == {0: 4, 1: 4, 2: 4, 3: 4}
    came = origins(tree)
    assert came[:4] == [(None, 0)] * 4
    group = {completion_of(leaf.step): leaf.group for leaf in tree.leaves() if leaf.step}
    assert [group[i] for i in range(4)] == [0, 1, 2, 3]
    for number, (origin, _) in enumerate(came):
        assert origin is None or group[origin] == group[number]
    assert any(origin is not None for origin, _ in came)


def test_one_tree_of_four_chains_is_elpo_without_bel() -> None:
    came = origins(grow(long, at_random(trees=1, chains=4)))
    assert came[:4] == [(None, 0)] * 4
    assert {origin for origin, _ in came[4:]} <= {None, 0, 1, 2, 3}


def test_later_rounds_draw_from_earlier_expansions() -> None:
    came = origins(grow(long, at_random(trees=1, rounds=15), seed=2))
    assert any(origin is not None and came[origin][0] is not None for origin, _ in came)


def test_prefixes_are_the_prompt_and_the_inner_nodes_of_one_tree() -> None:
    tree = RolloutTree("t", 3)
    first = tree.add_trajectory(0, [step_of(0.0)] * 3, Score(1.0, True))
    second = tree.add_trajectory(1, [step_of(0.0)] * 2, Score(0.0, False))
    other = tree.add_trajectory(0, [step_of(0.0)] * 2, Score(0.0, False))
    assert sorted(prefixes(tree, [first, second])) == [0, 1, 2, 4]
    assert sorted(prefixes(tree, [other])) == [0, 6]


def test_every_prefix_is_drawn_equally_often() -> None:
    counts = Counter(
        origin
        for seed in range(300)
        for origin in origins(grow(long, at_random(2, trees=1), seed))[1:]
    )
    assert set(counts) == {(None, 0), *((0, depth) for depth in range(1, 6))}
    assert all(25 <= count <= 80 for count in counts.values())  # 50 expected, deviation 6.5


@given(st.integers(0, 100), st.integers(1, 12))
def test_dealing_is_even(count: int, hands: int) -> None:
    dealt = deal(count, hands)
    assert sum(dealt) == count and len(dealt) == hands and max(dealt) - min(dealt) <= 1


# --- every rule ---


def rule_configs(n_total: int) -> Sequence[GrowthConfig]:
    some = min(3, n_total)
    return [
        by_entropy(n_total, initial=some, beam=3, penalty=0.3),
        by_entropy(n_total, initial=some, monitor=True, threshold=0.4),
        at_random(n_total, trees=some),
        at_random(n_total, trees=1, chains=some, rounds=3),
    ]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), n_total=st.integers(2, 24), which=st.integers(0, 3))
def test_budget_is_spent_and_prefixes_are_shared_nodes(seed: int, n_total: int, which: int) -> None:
    plan, _ = wordy(seed)
    tree = grow(plan, rule_configs(n_total)[which], seed % 1000)
    assert len(tree.leaves()) == n_total
    charged = [entry for entry in tree.ledger if entry["charged"]]
    assert sorted(e["leaf"] for e in charged) == sorted(leaf.id for leaf in tree.leaves())
    anchors = {e["leaf"]: e["anchor"] for e in charged}
    by_number = {completion_of(leaf.step): leaf.id for leaf in tree.leaves() if leaf.step}
    for number, (origin, depth) in enumerate(origins(tree)):
        assert (anchors[by_number[number]] or 0) == depth
        if origin is not None:
            mine, theirs = tree.path(by_number[number]), tree.path(by_number[origin])
            assert mine[:depth] == theirs[:depth] and mine[depth] != theirs[depth]
    sampled = sum(len(step.turn.token_ids) for node in tree.nodes if (step := node.step))
    assert Totals.of(tree.ledger).tokens == sampled


def test_same_seed_same_tree_whatever_finishes_first() -> None:
    for growth in rule_configs(16):
        if growth.entropy.threshold is not None:
            continue  # draws nothing
        runs = [origins(grow(wordy(5)[0], growth, seed=7)) for _ in range(2)]
        assert runs[0] == runs[1]
        assert any(origins(grow(wordy(5)[0], growth, seed=s)) != runs[0] for s in range(5))


@pytest.mark.parametrize(
    ("growth", "said"),
    [
        ({"rule": GrowthRule.entropy_branch, "n_total": 4}, r"entropy\.initial=8.*n_total=4"),
        ({"rule": GrowthRule.random_branch, "n_total": 3}, r"random\.trees=4.*n_total=3"),
        ({"max_tool_calls": [1, -1]}, r"max_tool_calls=\[1, -1\]"),
    ],
)
def test_growth_that_cannot_be_is_told(growth: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=r"algorithm\.growth\." + said):
        GrowthConfig(**growth)  # type: ignore[arg-type]
