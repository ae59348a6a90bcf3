"""A world without a model: trajectories that a known step dooms, with known probabilities.

A trajectory has K tool steps and an answer. While nothing went wrong, step m keeps the episode
recoverable with a fixed probability; after a mistake nothing succeeds. The growth rules that train
the real model spend their budget here through the same interface, so that what they find can be
compared with the truth, thousands of inputs a second.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from elpo_ray import growth
from elpo_ray.config.growth import BelConfig, GrowthConfig
from elpo_ray.growth.bel import probe_size
from elpo_ray.tree import RolloutTree
from elpo_ray.types import FinishReason, Score, Step, ToolKind, ToolResult, Turn

TURN = Turn((0,), (0.0,), (0.0,), FinishReason.STOP, weight_version=0)
"""All turns have the same entropy, so the gate of Eq. 5 asks for the middle probe size."""
RESULT = ToolResult(ToolKind.OK, "")
SOUND, DOOMED = "", "doomed"
"""`Step.state`: what the tool session would know."""


@dataclass(frozen=True, slots=True)
class Chain:
    """One input as success probabilities: `values[m]`, m = 0..K, is the chance of success from a
    prefix of m sound tool steps. `values[0]` is the policy's pass@1."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        values = self.values
        if not all(0 < value <= 1 for value in values):
            raise ValueError(f"success={list(values)}: give probabilities in (0, 1]")
        if list(values) != sorted(values):
            raise ValueError(
                f"success={list(values)}: must not fall along the steps: the chance from a longer "
                "sound prefix includes all that could still have gone wrong before"
            )

    @classmethod
    def even(cls, success: float, tool_steps: int) -> Chain:
        """Each of the K tool steps and the answer equally likely to fail."""
        if tool_steps < 1:
            raise ValueError(f"tool_steps={tool_steps}: use 1 or more")
        steps = tool_steps + 1
        return cls(tuple(success ** ((steps - m) / steps) for m in range(steps)))

    @property
    def tool_steps(self) -> int:
        """K."""
        return len(self.values) - 1

    def keeps(self, step: int) -> float:
        """Chance that step 1..K+1 of a sound prefix makes no fatal mistake."""
        following = self.values[step] if step <= self.tool_steps else 1.0
        return self.values[step - 1] / following


class ChainRollout:
    """`interfaces.Rollout` for one input."""

    enough, fixed = False, True

    def __init__(self, chain: Chain, n_total: int, rng: random.Random) -> None:
        self.tree = RolloutTree("simulated", n_total)
        self.turns = 0
        """Turns sampled so far."""
        self._chain = chain
        self.random = rng
        self.remaining = n_total

    async def complete(self, at: int = 0, *, anchor: int | None = None) -> int:
        """See `interfaces.Rollout`."""
        assert self.remaining > 0
        self.remaining -= 1
        before = self.tree.steps(at)
        doomed = bool(before) and before[-1].state == DOOMED
        steps: list[Step] = []
        for number in range(len(before) + 1, self._chain.tool_steps + 1):
            doomed = doomed or self.random.random() >= self._chain.keeps(number)
            steps.append(Step(TURN, result=RESULT, state=DOOMED if doomed else SOUND))
        doomed = doomed or self.random.random() >= self._chain.keeps(self._chain.tool_steps + 1)
        steps.append(Step(TURN))
        self.turns += len(steps)
        return self.tree.add_trajectory(at, steps, Score(float(not doomed), not doomed))


@dataclass(slots=True)
class Findings:
    """Sums over simulated inputs."""

    inputs: int = 0
    mixed: int = 0
    """Inputs with a success and a failure: only they have an advantage to learn from."""
    searches: int = 0
    named: int = 0
    """Searches that named a critical step."""
    right: int = 0
    """Searches that named the first doomed step."""
    located: int = 0
    """Inputs with at least one critical step named rightly."""
    probes_sound: int = 0
    """Complete probes of anchors from which success was possible."""
    probes_blamed: int = 0
    """Those of them without a success: the anchor was falsely called irrecoverable."""
    turns: int = 0
    turns_flat: int = 0
    """Turns of as many whole trajectories."""

    def add(self, rollout: ChainRollout, chain: Chain, bel: BelConfig) -> None:
        """Compare what the searches of one finished tree found with the truth."""
        tree, right = rollout.tree, 0
        outcomes = {leaf.score.success for leaf in tree.leaves() if leaf.score}
        for found in tree.localizations:
            steps = tree.steps(found.leaf)
            truth = first_doomed(steps)
            self.named += found.critical is not None
            right += found.critical == tree.path(found.leaf)[truth - 1]
            for probe in found.probes:
                complete = probe.attempts == probe_size(steps, probe.anchor, bel)
                if probe.anchor < truth and complete:
                    self.probes_sound += 1
                    self.probes_blamed += not probe.successes
        self.inputs += 1
        self.mixed += len(outcomes) == 2
        self.searches += len(tree.localizations)
        self.right += right
        self.located += right > 0
        self.turns += rollout.turns
        self.turns_flat += tree.budget * (chain.tool_steps + 1)


def first_doomed(steps: Sequence[Step]) -> int:
    """The step, from 1, that doomed a failed trajectory; its answer if no tool step did."""
    return next((m for m, step in enumerate(steps, 1) if step.state == DOOMED), len(steps))


async def simulate(
    chains: Sequence[Chain], config: GrowthConfig, inputs: int, seed: int
) -> Findings:
    """`inputs` trees grown by `config`, their inputs going through `chains` in turn."""
    findings = Findings()
    for index in range(inputs):
        chain = chains[index % len(chains)]
        rollout = ChainRollout(chain, config.n_total, random.Random(f"{seed}/{index}"))
        await growth.grow(rollout, config)
        findings.add(rollout, chain, config.bel)
    return findings


def completions_needed(success: float, miss: float) -> int:
    """The probe size X whose chance (1 - success)^X of no success at all is at most `miss`."""
    if success >= 1:
        return 1
    return max(1, math.ceil(math.log(miss) / math.log1p(-success) - 1e-9))
