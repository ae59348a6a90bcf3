"""The simulated world: closed forms, BEL's own guarantees on it, the command."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from math import exp, lgamma, sqrt

import pytest

from elpo_ray.config.growth import BelConfig, GrowthConfig, GrowthRule, PosteriorConfig
from elpo_ray.evaluation.analysis.world import (
    Chain,
    ChainRollout,
    completions_needed,
    first_doomed,
    simulate,
)
from elpo_ray.simulate import main

INPUTS = 400


def bel(n_total: int, x: int, b_max: int = 3) -> GrowthConfig:
    return GrowthConfig(n_total=n_total, bel=BelConfig(x_min=x, x_max=x, b_max=b_max))


def near(value: float, truth: float, draws: int) -> bool:
    return abs(value - truth) < 4 * sqrt(truth * (1 - truth) / draws)


def test_an_even_chain_fails_at_each_step_alike() -> None:
    chain = Chain.even(0.3, 4)
    assert chain.tool_steps == 4 and chain.values[0] == pytest.approx(0.3)
    sound, failed = 1.0, []
    for value, following in pairwise([*chain.values, 1.0]):
        failed.append(sound * (1 - value / following))
        sound *= value / following
    weights = chain.mistakes(0)
    expected = [one / sum(failed) for one in failed]
    assert [one / sum(weights) for one in weights] == pytest.approx(expected)
    assert sound == pytest.approx(0.3)


@pytest.mark.parametrize("values", [(0.4, 0.9, 0.0, 1.0), (0.0, 0.5), (0.3, 0.2, 0.1), (1.0, 0.0)])
async def test_any_measured_values_are_a_world(values: tuple[float, ...]) -> None:
    """Zero and one included, and also where they fall along the steps."""
    chain = Chain(values)
    rollout = ChainRollout(chain, 4000, random.Random(0))
    leaves = [await rollout.complete() for _ in range(500)]
    won = [rollout.tree.nodes[leaf].score.success for leaf in leaves]  # type: ignore[union-attr]
    assert sum(won) / 500 == pytest.approx(values[0], abs=0.1)
    for m in range(1, len(values)):
        starts = [
            node
            for leaf in leaves
            if (node := rollout.tree.path(leaf)[m - 1])
            and rollout.tree.nodes[node].step.state == values[m]  # type: ignore[union-attr]
        ][:300]
        again = [await rollout.complete(node, anchor=m) for node in starts]
        won = [rollout.tree.nodes[leaf].score.success for leaf in again]  # type: ignore[union-attr]
        assert not again or sum(won) / len(again) == pytest.approx(values[m], abs=0.1)


async def test_sound_prefixes_differ_as_a_beta_says() -> None:
    chain = Chain.spread(0.6, 1.0, 3)
    rollout = ChainRollout(chain, 3000, random.Random(1))
    seen = []
    for _ in range(3000):
        [first, *_] = rollout.tree.steps(await rollout.complete())
        if first.state != "doomed":
            seen.append(first.state)
    mean = sum(seen) / len(seen)
    assert mean == pytest.approx(0.6 / 1.6, abs=0.03)
    variance = sum((v - mean) ** 2 for v in seen) / len(seen)
    assert variance == pytest.approx(0.6 * 1.0 / (1.6**2 * 2.6), abs=0.02)


async def test_prefixes_that_differ_are_harder_than_their_mean() -> None:
    """Equal chances let a probe be larger until it is right; unequal ones leave some that never
    succeed."""
    alike = await simulate([Chain((0.2, *[0.375] * 4))], bel(64, 4), INPUTS, seed=0)
    differ = await simulate([Chain.spread(0.6, 1.0, 4)], bel(64, 4), INPUTS, seed=0)
    blamed = [found.probes_blamed / found.probes_sound for found in (alike, differ)]
    assert near(blamed[0], (1 - 0.375) ** 4, alike.probes_sound)
    assert blamed[1] > blamed[0] + 0.1
    assert differ.right / differ.named < alike.right / alike.named


async def test_the_posterior_search_is_as_sure_as_it_says() -> None:
    """In a world of its own assumptions, a named step is right at least as often as its
    threshold."""
    config = GrowthConfig(
        rule=GrowthRule.posterior,
        n_total=64,
        posterior=PosteriorConfig(threshold=0.6, max_probes=12, beta=(2.0, 1.0)),
    )
    found = await simulate([Chain.spread(2.0, 1.0, 3)], config, INPUTS, seed=0)
    assert found.named > 200 and found.right / found.named > 0.6
    assert found.probes_sound == 0


async def test_independent_leaves_have_the_closed_form() -> None:
    config = GrowthConfig(rule=GrowthRule.independent, n_total=4)
    found = await simulate([Chain.even(0.3, 3)], config, INPUTS, seed=0)
    assert near(found.mixed / found.inputs, 1 - 0.3**4 - 0.7**4, INPUTS)
    assert found.turns == found.turns_flat == INPUTS * 4 * 4
    assert found.searches == 0


async def test_a_probe_blames_a_sound_anchor_as_often_as_it_must() -> None:
    """Two tool steps: BEL probes anchor 1 first; success from there is values[1]."""
    chain = Chain((0.25, 0.5, 1.0))
    found = await simulate([chain], bel(n_total=64, x=2), INPUTS, seed=1)
    # step 1 fails with 0.5, step 2 with 0.5: sound anchors are anchor 1 (0.5) only
    assert near(found.probes_blamed / found.probes_sound, 0.25, found.probes_sound)


async def test_sure_probes_are_always_right() -> None:
    chain = Chain((0.5, 1.0, 1.0, 1.0))
    found = await simulate([chain], bel(n_total=16, x=1), 50, seed=2)
    assert found.named and found.right == found.named and found.probes_blamed == 0


async def test_completions_cost_only_their_own_turns() -> None:
    rollout = ChainRollout(Chain.even(0.5, 3), 2, random.Random(0))
    leaf = await rollout.complete()
    path = rollout.tree.path(leaf)
    assert (rollout.turns, rollout.remaining, len(path)) == (4, 1, 4)
    await rollout.complete(path[1], anchor=2)
    assert (rollout.turns, rollout.remaining) == (6, 0)
    steps = rollout.tree.steps(leaf)
    assert 1 <= first_doomed(steps) <= 4


def test_completions_needed_is_the_smallest_that_suffices() -> None:
    assert completions_needed(0.5, 0.25) == 2
    assert completions_needed(0.3, 0.2) == 5
    assert completions_needed(1.0, 0.01) == 1
    assert completions_needed(0.0, 0.01) is None and completions_needed(1e-9, 0.01) is None


@pytest.mark.parametrize(("a", "b", "miss"), [(0.6, 1.0, 0.2), (2.0, 1.0, 0.05), (1.0, 1.0, 0.5)])
def test_where_chances_differ_more_completions_are_needed(a: float, b: float, miss: float) -> None:
    def missed(size: int) -> float:
        """B(a, b + size) / B(a, b)."""
        return exp(lgamma(b + size) + lgamma(a + b) - lgamma(b) - lgamma(a + b + size))

    size = completions_needed(a / (a + b), miss, a + b)
    assert size is not None and missed(size) <= miss + 1e-9
    assert size == 1 or missed(size - 1) > miss
    alike = completions_needed(a / (a + b), miss)
    assert alike is not None and size >= alike
    assert completions_needed(1e-9, miss, 1.0) is None


def test_the_advice_does_not_take_a_spread_for_its_mean(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--beta", "0.6,1", "--inputs", "20", "--n-total", "8", "--x", "1"]) == 0
    assert "on average, so X=12 misses a sound one at most 20%" in capsys.readouterr().out


def test_values_say_how_many_steps_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    call = ["--values", "0.3,0.5,0.6", "--tool-steps", "3,4", "--inputs", "20", "--n-total", "8"]
    assert main([*call, "--x", "1", "--json"]) == 0
    [row] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert row["tool_steps"] == 2


def test_the_command_answers_in_json_and_says_what_suffices(
    capsys: pytest.CaptureFixture[str],
) -> None:
    call = ["--success", "0.2,0.6", "--tool-steps", "2", "--n-total", "8,24", "--x", "1,4",
            "--inputs", "60"]  # fmt: skip
    assert main([*call, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["n_total"], row["x"]) for row in rows] == [
        (8, "1"),
        (8, "4"),
        (24, "1"),
        (24, "4"),
    ]
    assert rows[3]["right"] > rows[2]["right"]
    assert main(call) == 0
    said = capsys.readouterr().out
    assert "N_total" in said and "K=2: N_total=24 with X=4" in said


def test_the_command_compares_searches(capsys: pytest.CaptureFixture[str]) -> None:
    call = ["--beta", "0.6,1", "--tool-steps", "3", "--n-total", "16", "--x", "paper,4",
            "--rule", "bel,posterior", "--threshold", "0.5", "--inputs", "60"]  # fmt: skip
    assert main([*call, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["rule"], r["x"]) for r in rows] == [
        ("bel", "paper"),
        ("bel", "4"),
        ("posterior", None),
    ]
    assert rows[2]["right"] > rows[0]["right"] and rows[2]["blamed"] is None
    assert main(call) == 0
    assert "posterior" in capsys.readouterr().out
    assert main(["--values", "0.3,0,1", "--inputs", "20", "--n-total", "8"]) == 0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (["--values", "0.5,1.2"], "probabilities"),
        (["--values", "0.5"], "one value for each"),
        (["--beta", "0,1"], "beta=0,1"),
        (["--beta", "1"], "give two numbers"),
        (["--beta", "inf,1"], "beta=inf,1: use two finite numbers"),
        (["--values", "a,b"], "'a,b': give numbers"),
        (["--tool-steps", "2.5"], "'2.5': give whole numbers"),
        (["--beta", "1,1", "--values", "0.1,0.2"], "not both"),
        (["--rule", "independent"], "is no search"),
        (["--threshold", "0", "--rule", "posterior"], "threshold"),
        (["--n-total", "1"], "n_total=1"),
        (["--x", "0"], "neither paper nor 1 or more"),
        (["--inputs", "0"], "--inputs=0"),
        (["--want", "1"], "--want=1"),
        (["--success", "1.5"], "probabilities"),
    ],
)
def test_a_mistake_is_one_line(
    call: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(call)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
