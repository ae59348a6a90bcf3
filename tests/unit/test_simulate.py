"""The simulated world: closed forms, BEL's own guarantees on it, the command."""

from __future__ import annotations

import json
import random
from math import sqrt

import pytest

from elpo_ray.config.growth import BelConfig, GrowthConfig, GrowthRule
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


def test_a_chain_is_consistent() -> None:
    chain = Chain.even(0.3, 4)
    assert chain.tool_steps == 4
    product = 1.0
    for step in range(1, 6):
        product *= chain.keeps(step)
    assert product == pytest.approx(0.3)
    with pytest.raises(ValueError, match="must not fall"):
        Chain((0.5, 0.4))
    with pytest.raises(ValueError, match="probabilities"):
        Chain((0.0, 0.4))


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


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (["--values", "0.5,0.2"], "must not fall"),
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
