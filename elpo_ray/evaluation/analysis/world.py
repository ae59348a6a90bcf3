"""A world without a model: trajectories that a known step dooms, with known probabilities.

A trajectory has K tool steps and an answer. A sound prefix succeeds with a chance V of its own;
after a mistake nothing succeeds. The growth rules that train the real model spend their budget here
through the same interface, so that what they find can be compared with the truth, thousands of
inputs a second.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from elpo_ray import growth
from elpo_ray.config.growth import BelConfig, GrowthConfig, GrowthRule
from elpo_ray.growth.bel import probe_size
from elpo_ray.tree import RolloutTree
from elpo_ray.types import FinishReason, Message, Score, Step, ToolKind, ToolResult, Turn

RESULT = ToolResult(ToolKind.OK, "")
DOOMED = "doomed"
"""`Step.state` from the mistake on; a sound step's is its prefix's V."""
MOST = 10_000
"""A probe of more completions than this is out of reach."""
LEAST = 1e-9
"""A chance of success below this counts as this where a mistake has to be placed."""


@dataclass(frozen=True, slots=True)
class Chain:
    """One input as success probabilities: `values[m]`, m = 0..K, is the chance of success from a
    prefix of m sound tool steps, on average. `values[0]` is the policy's pass@1."""

    values: tuple[float, ...]
    concentration: float | None = None
    """How alike sound prefixes of one length are: the V of each is a draw from
    Beta(v c, (1 - v) c) with v = `values[m]`; None: all have `values[m]`."""

    def __post_init__(self) -> None:
        values = self.values
        if not all(0 <= value <= 1 for value in values):
            raise ValueError(f"success={list(values)}: give probabilities in [0, 1]")
        if len(values) < 2:
            raise ValueError(f"success={list(values)}: give one value for each of 0, 1, …, K steps")

    @classmethod
    def even(cls, success: float, tool_steps: int) -> Chain:
        """Each of the K tool steps and the answer equally likely to fail."""
        _require_steps(tool_steps)
        steps = tool_steps + 1
        return cls(tuple(success ** ((steps - m) / steps) for m in range(steps)))

    @classmethod
    def spread(cls, a: float, b: float, tool_steps: int) -> Chain:
        """Every sound prefix's V, the prompt's too, is a draw of its own from Beta(a, b)."""
        _require_steps(tool_steps)
        if not (0 < a < math.inf and 0 < b < math.inf):
            raise ValueError(f"beta={a:g},{b:g}: use two finite numbers above 0")
        return cls((a / (a + b),) * (tool_steps + 1), a + b)

    @property
    def tool_steps(self) -> int:
        """K."""
        return len(self.values) - 1

    def draw(self, length: int, rng: random.Random) -> float:
        """The V of one sound prefix of `length` steps."""
        value = self.values[length]
        if self.concentration is None or value in (0, 1):
            return value
        return rng.betavariate(value * self.concentration, (1 - value) * self.concentration)

    def mistakes(self, length: int) -> list[float]:
        """How likely the fatal step of a failed completion of `length` sound steps is each of
        length + 1..K+1, up to a factor. Where all sound prefixes of one length are alike, mistakes
        are where the chances of success rise; otherwise every step is equally likely."""
        even = [1.0] * (len(self.values) - length)
        if self.concentration is not None:
            return even
        chances = [*accumulate((max(value, LEAST) for value in self.values), max), 1.0]
        weights = [1 / now - 1 / then for now, then in pairwise(chances[length:])]
        return weights if sum(weights) > 0 else even


def _require_steps(tool_steps: int) -> None:
    if tool_steps < 1:
        raise ValueError(f"tool_steps={tool_steps}: use 1 or more")


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
        self._pass_at_1 = chain.draw(0, rng)
        self._token = 0

    async def complete(self, at: int = 0, *, anchor: int | None = None) -> int:
        """See `interfaces.Rollout`."""
        assert self.remaining > 0
        self.remaining -= 1
        before, chain = self.tree.steps(at), self._chain
        fatal = self._fatal_step(before)
        steps: list[Step] = []
        for number in range(len(before) + 1, chain.tool_steps + 2):
            state: float | str | None = None
            if fatal is not None and number >= fatal:
                state = DOOMED
            elif number <= chain.tool_steps:
                state = chain.draw(number, self.random)
            result = RESULT if number <= chain.tool_steps else None
            steps.append(Step(self._turn(), result=result, state=state))
        self.turns += len(steps)
        success = fatal is None
        return self.tree.add_trajectory(at, steps, Score(float(success), success))

    async def ask(
        self, messages: Sequence[Message], *, temperature: float, top_p: float, max_tokens: int
    ) -> str:
        """Nothing: the chain's policy knows no words."""
        return ""

    def _fatal_step(self, before: Sequence[Step]) -> int | None:
        """The step that dooms a completion of these steps, drawn; 0 if they have, None: none."""
        value = before[-1].state if before else self._pass_at_1
        if value == DOOMED:
            return 0
        if self.random.random() < value:
            return None
        weights = self._chain.mistakes(len(before))
        return self.random.choices(range(len(before) + 1, self._chain.tool_steps + 2), weights)[0]

    def _turn(self) -> Turn:
        """A turn like no other: no trajectory shows anything about another one's prefixes. All have
        the same entropy, so the gate of Eq. 5 asks for the middle probe size and no step is more
        suspect than another."""
        self._token += 1
        return Turn((self._token,), (0.0,), (0.0,), FinishReason.STOP, weight_version=0)


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

    def add(self, rollout: ChainRollout, chain: Chain, bel: BelConfig | None) -> None:
        """Compare what the searches of one finished tree found with the truth. Only probes of
        BEL, with the settings `bel`, can blame an anchor."""
        tree, right = rollout.tree, 0
        outcomes = {leaf.score.success for leaf in tree.leaves() if leaf.score}
        for found in tree.localizations:
            steps = tree.steps(found.leaf)
            truth = first_doomed(steps)
            self.named += found.critical is not None
            right += found.critical == tree.path(found.leaf)[truth - 1]
            for probe in found.probes:
                if bel is None:
                    continue
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
    doomed = (m for m, step in enumerate(steps, start=1) if step.state == DOOMED)
    return next(doomed, len(steps))


async def simulate(
    chains: Sequence[Chain], config: GrowthConfig, inputs: int, seed: int
) -> Findings:
    """`inputs` trees grown by `config`, their inputs going through `chains` in turn."""
    findings = Findings()
    for index in range(inputs):
        chain = chains[index % len(chains)]
        rollout = ChainRollout(chain, config.n_total, random.Random(f"{seed}/{index}"))
        await growth.grow(rollout, config)
        findings.add(rollout, chain, config.bel if config.rule == GrowthRule.bel else None)
    return findings


def completions_needed(
    success: float, miss: float, concentration: float | None = None
) -> int | None:
    """The probe size X whose chance of no success at all, at a sound prefix, is at most `miss`:
    (1 - v)^X with v = `success`, or its mean where V differs (`Chain.concentration`). None if that
    takes more than `MOST` completions."""
    if success >= 1:
        return 1
    if success <= 0:
        return None
    if concentration is None:
        size = max(1, math.ceil(math.log(miss) / math.log1p(-success) - 1e-9))
        return size if size <= MOST else None
    a, b = success * concentration, (1 - success) * concentration
    log_missed = 0.0
    for size in range(1, MOST + 1):
        log_missed += math.log((b + size - 1) / (a + b + size - 1))
        if log_missed <= math.log(miss) + 1e-9:
            return size
    return None
