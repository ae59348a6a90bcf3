"""Numbers of a step's trees."""

import asyncio
import io
import math
import re
from dataclasses import replace
from random import Random

import pytest
from rich.console import Console

from elpo_ray.config.growth import (
    BelConfig,
    DynamicSamplingConfig,
    EntropyBranchConfig,
    GrowthConfig,
    GrowthRule,
    RandomBranchConfig,
)
from elpo_ray.growth import GROWTH, fair_roots
from elpo_ray.growth.budget import Cost, Ledger
from elpo_ray.runs.metrics import (
    Stopwatch,
    comparison_axes,
    step_metrics,
    tree_metrics,
)
from elpo_ray.runs.progress import progress_bar, waiting
from elpo_ray.scheduling.dynamic_sampling import collect
from elpo_ray.tree import Localization, Posterior, Probe, RolloutTree
from elpo_ray.types import (
    UNGRADED,
    FinishReason,
    Problem,
    Score,
    Step,
    ToolKind,
    ToolResult,
    Turn,
)

ANSWER = Step(Turn((1, 2), (0.0, 0.0), (0.5, 0.5), FinishReason.STOP, 0))
CALL = replace(ANSWER, result=ToolResult(ToolKind.OK, ""))


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
    values = tree_metrics([tree_of([True, True, True]), tree_of([False])], GrowthConfig())
    assert values["pass_at_1"] == pytest.approx(0.5)
    assert values["reward"] == pytest.approx(0.75)
    assert (values["rollouts"], values["tokens_generated"]) == (4, 8)
    assert values["entropy_root"] == pytest.approx(0.5)


class Coins:
    """`interfaces.Rollout` whose trajectories from the prompt succeed with one probability."""

    enough, fixed = False, True

    def __init__(self, success: float, n_total: int, seed: int) -> None:
        self.tree, self.ledger = RolloutTree("t", n_total), Ledger(n_total)
        self.random, self._draw = Random(seed), Random(f"coins {seed}")
        self._success = success

    @property
    def remaining(self) -> int:
        return self.ledger.remaining

    async def complete(self, at: int = 0, *, anchor: int | None = None) -> int:
        with self.ledger.reserve(anchor) as reservation:
            await asyncio.sleep(0)
            success = self._draw.random() < self._success
            steps = [CALL, ANSWER] if at == 0 else [ANSWER]
            reservation.leaf = self.tree.add_trajectory(at, steps, Score(float(success), success))
            return reservation.leaf


@pytest.mark.parametrize("success", [0.2, 0.6])
@pytest.mark.parametrize(
    "config",
    [
        GrowthConfig(),
        GrowthConfig(rule=GrowthRule.posterior),
        GrowthConfig(bel=BelConfig(use_tree=True, early_stop=True)),
        GrowthConfig(rule=GrowthRule.independent),
        GrowthConfig(rule=GrowthRule.random_branch, random=RandomBranchConfig(trees=2)),
        GrowthConfig(rule=GrowthRule.entropy_branch, entropy=EntropyBranchConfig(initial=4)),
        GrowthConfig(rule=GrowthRule.entropy_branch, entropy=EntropyBranchConfig(monitor=True)),
    ],
    ids=lambda config: config.rule.value,
)
def test_pass_at_1_of_training_is_unbiased(config: GrowthConfig, success: float) -> None:
    """A search that stops sampling from the prompt once enough have failed must not show in it."""
    trees = []
    for seed in range(3000):
        rollout = Coins(success, 16, seed)
        asyncio.run(GROWTH[config.rule](rollout, config))
        rollout.tree.ledger = rollout.ledger.entries
        trees.append(rollout.tree)
    found = tree_metrics(trees, config)["pass_at_1"]
    error = math.sqrt(success * (1 - success) / (3000 * fair_roots(config)))
    assert found == pytest.approx(success, abs=3.5 * error)


def test_pass_at_1_is_unbiased_under_dynamic_sampling() -> None:
    """Batches are grown until an input has contrast: all inputs together see too much of it."""
    config, draw = GrowthConfig(rule=GrowthRule.independent, n_total=2), Random(0)
    problem = Problem("p", (), None)

    def grow(first: int, count: int) -> list[tuple[Problem, RolloutTree]]:
        return [(problem, tree_of([draw.random() < 0.2 for _ in range(2)])) for _ in range(count)]

    steps = [collect(grow, 1, DynamicSamplingConfig(max_batches=8)) for _ in range(3000)]
    found = [step_metrics(batch, config, 1) for batch in steps]
    mean = math.fsum(one["pass_at_1"] for one in found) / len(found)
    assert mean == pytest.approx(0.2, abs=3.5 * math.sqrt(0.2 * 0.8 / 6000))
    every = math.fsum(tree_metrics(b.trees, config)["pass_at_1"] for b in steps) / len(steps)
    assert every > 0.25
    assert max(one["inputs_grown"] for one in found) > 1


def test_a_step_without_searches_still_has_a_row() -> None:
    values = tree_metrics([tree_of([False])], GrowthConfig())
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
    values = tree_metrics([tree], GrowthConfig())
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
    for terminal in (False, True):
        console = Console(file=io.StringIO(), force_terminal=terminal)
        with waiting(console, "starting Ray"):
            pass
        text = console.file.getvalue()
        assert ("\x1b[?25h" in text) is terminal
        assert terminal or re.fullmatch(r"starting Ray …\nstarting Ray: \d\.\d s\n", text)
        assert text.rstrip().endswith(" s"), "what it took stays on the screen"


def test_a_bar_off_a_terminal_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    console, now = Console(file=io.StringIO(), width=200), [0.0]
    monkeypatch.setattr("elpo_ray.runs.progress.time.monotonic", lambda: now[0])
    with progress_bar(console, "cold start", 1000, True) as advance:
        for done in range(1000):
            now[0] = float(done)
            advance(done, note="2 at work" if done == 10 else "")
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "cold start: 10 of 1,000 in 10 s, 2 at work"
    assert [line.split()[2] for line in lines] == ["10", "20", "40", "80", "160", "320", "640"]
    with progress_bar(console, "quiet", 9, False) as advance:
        now[0] = 5000.0
        advance(3)
    assert "quiet" not in console.file.getvalue()


def test_searches_by_evidence_have_numbers_of_their_own() -> None:
    tree = tree_of([False, True])
    free = [Probe(1, 3, 1), Probe(2, 1, 0)]
    sure = Posterior([0.5, 0.5], (0.6, 1.0), free, [[0.5, 0.5], [0.9, 0.1]])
    unsure = Posterior([0.5, 0.5], (0.6, 1.0), [], [[0.6, 0.4]])
    tree.localizations += [
        Localization(1, 1, True, (1, 1), [Probe(1, 1, 0)], sure),
        Localization(1, None, False, (1, 2), [], unsure),
    ]
    values = tree_metrics([tree], GrowthConfig(rule=GrowthRule.posterior))
    assert values["posterior/named"] == 0.9 and values["posterior/highest"] == 0.75
    assert (values["posterior/probes"], values["posterior/alike"]) == (0.5, 1.5)
    assert values["posterior/beta_mean"] == pytest.approx(0.375)
    assert not [key for key in tree_metrics([tree_of([True])], GrowthConfig()) if "/named" in key]
