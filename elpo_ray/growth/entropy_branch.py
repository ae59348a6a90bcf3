"""Branching where entropy rises after a tool response: ARPO (arXiv 2507.19849), AEPO (2510.14545).

The originals advance all trajectories of an input in lockstep: each iteration every active one
generates a turn, gets its tool's response, and may then be copied; a copy goes on alone. Whether
a trajectory is copied does not change how it goes on, so here whole completions are sampled first
and the iterations are replayed over them, with the same distribution of trees.

Entropy of a turn: the sum over its first `entropy_tokens` tokens of the full-vocabulary entropy,
in units of ln(vocab_size); the originals truncate to the ten likeliest tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from elpo_ray.config.growth import EntropyBranchConfig, GrowthConfig
from elpo_ray.growth.independent import sample, sample_each
from elpo_ray.interfaces import Rollout
from elpo_ray.types import Step


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One completion in the replay; turns count from 0 along its whole path."""

    path: Sequence[int]
    steps: Sequence[Step]
    first: int
    """Its first own turn; those before were copied."""
    begun: int
    """The iteration that generates this turn."""


async def grow(rollout: Rollout, config: GrowthConfig) -> None:
    """Initial trajectories, then iterations of branching; while nothing is active any more, one
    further trajectory from the prompt each."""
    cfg = config.entropy
    leaves = await _initial(rollout, config)
    found = [_trajectory(rollout, leaf, first=0, begun=0) for leaf in leaves]
    iteration = in_a_row = 0
    while rollout.remaining > 0:
        active = [
            (trajectory, turn)
            for trajectory in found
            if (turn := trajectory.first + iteration - trajectory.begun) >= trajectory.first
            and turn < len(trajectory.steps)
            and trajectory.steps[turn].result is not None
        ]
        copied = [
            (trajectory, turn)
            for trajectory, turn in active
            for _ in range(cfg.beam - 1)
            if copies(entropy_rise(trajectory, turn, cfg), in_a_row, rollout.random.random(), cfg)
        ][: rollout.remaining]
        starts = [(trajectory.path[turn], turn + 1) for trajectory, turn in copied]
        for leaf, (_, first) in zip(await sample_each(rollout, starts), starts, strict=True):
            found.append(_trajectory(rollout, leaf, first=first, begun=iteration + 1))
        in_a_row = in_a_row + 1 if copied else 0
        if not active:
            (leaf,) = await sample(rollout, 1)
            found.append(_trajectory(rollout, leaf, first=0, begun=iteration + 1))
        iteration += 1


def copies(rise: float, in_a_row: int, draw: float, cfg: EntropyBranchConfig) -> bool:
    """Whether a copy is made; `draw` is uniform in [0, 1).

    P = clip(1 - (1 - p) / (1 - penalty l) + w ΔH, 0, 1), l = branchings in a row: ARPO's p + w ΔH
    without penalty, AEPO's rule with. With a threshold: (p + w ΔH)(1 - penalty l) above it.
    """
    kept = max(0.0, 1 - cfg.penalty * in_a_row)
    if cfg.threshold is not None:
        return (cfg.branch_probability + cfg.entropy_weight * rise) * kept > cfg.threshold
    if kept == 0:
        return False
    probability = 1 - (1 - cfg.branch_probability) / kept + cfg.entropy_weight * rise
    return draw < probability


def entropy_rise(trajectory: Trajectory, turn: int, cfg: EntropyBranchConfig) -> float:
    """ΔH: the entropy of `turn` less that of the first turn that the trajectory sampled itself."""
    first = trajectory.steps[trajectory.first]
    return turn_entropy(trajectory.steps[turn], cfg) - turn_entropy(first, cfg)


def turn_entropy(step: Step, cfg: EntropyBranchConfig) -> float:
    """Summed entropy of the turn's first tokens, in units of ln(vocab_size)."""
    return math.fsum(step.turn.entropies[: cfg.entropy_tokens]) / math.log(cfg.vocab_size)


def monitored_roots(steps: Sequence[Step], n_total: int, cfg: EntropyBranchConfig) -> int:
    """m = min(N, ⌊N σ(β (H_root - H_tool))⌋ + 1): trajectories from the prompt, by the first one's
    entropies; H_tool is the mean over its turns after a tool response, H_root if it has none."""
    root = turn_entropy(steps[0], cfg)
    after_tool = [turn_entropy(step, cfg) for step in steps[1:]]
    tool = math.fsum(after_tool) / len(after_tool) if after_tool else root
    sigmoid = 0.5 * (1 + math.tanh(cfg.monitor_beta * (root - tool) / 2))
    return min(n_total, math.floor(n_total * sigmoid) + 1)


async def _initial(rollout: Rollout, config: GrowthConfig) -> list[int]:
    """Leaves of the trajectories from the prompt; the monitored one counts as the first."""
    if not config.entropy.monitor:
        return await sample(rollout, config.entropy.initial)
    (first,) = await sample(rollout, 1)
    count = monitored_roots(rollout.tree.steps(first), config.n_total, config.entropy)
    return [first, *await sample(rollout, count - 1)]


def _trajectory(rollout: Rollout, leaf: int, *, first: int, begun: int) -> Trajectory:
    return Trajectory(rollout.tree.path(leaf), rollout.tree.steps(leaf), first, begun)
