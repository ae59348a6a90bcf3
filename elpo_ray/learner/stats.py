"""What one update reports: sums over packs and ranks turned into means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import reduce
from operator import add
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from elpo_ray.learner.loss import MAXIMA, LossStats


@dataclass(frozen=True, kw_only=True)
class UpdateStats:
    """Statistics of one update, over all its optimizer steps and all ranks; equal on every rank.

    Fractions and means are over trained tokens in their weight in the objective. Tokens that
    cannot move the weights (no weight, or a sequence of zero advantages) are in none of them.
    """

    optimizer_steps: int = 0
    skipped_steps: int = 0
    """Mini-batches in which nothing could move the weights: no step was taken."""
    loss: float = 0.0
    """Mean over optimizer steps."""
    grad_norm: float = 0.0
    """Gradient norm before clipping; mean over optimizer steps."""
    lr: float = 0.0
    """Learning rate of the last optimizer step."""
    trained_tokens: int = 0
    """Tokens with a loss, counted once per pass, however many leaves share them; twice where two
    of those leaves have different clip bounds."""
    forward_tokens: int = 0
    """Tokens through the model with gradient, without padding."""
    padded_tokens: int = 0
    """Tokens through the model with gradient, padding and dummies included."""
    packs: int = 0
    learner_seconds: float = 0.0
    """Seconds of the update on the learner, without the way there and back."""
    learner_tokens_per_s: float = 0.0
    """`forward_tokens` over `learner_seconds`."""
    mfu: float = 0.0
    """Share of the GPUs' peak FLOP/s, recomputation not counted; 0 on CPU."""
    r_tok: float = 1.0
    """Tokens of the flat sequences over those of their trees; `r_attn`: visible (query, key) pairs;
    `r_agent`: trained tokens."""
    r_attn: float = 1.0
    r_agent: float = 1.0
    speedup_predicted: float = 1.0
    """FLOPs of the flat sequences over those of the packs."""
    speedup_measured: float = 0.0
    """Seconds of flat sequences over those of their tree, on one pack a rank, forward only; taken
    every `speed.MEASURE_EVERY` updates, 0 before."""
    repetition: float = 0.0
    """Share of the forwarded tokens that another pack or sequence forwards too."""
    entropy: float = 0.0
    ratio_mean: float = 0.0
    ratio_max: float = 0.0
    clip_low: float = 0.0
    """Fraction of the weight whose ratio was cut at its lower bound."""
    clip_high: float = 0.0
    clip_dual: float = 0.0
    elc_weight: float = 0.0
    """Fraction of the weight in the ELC region (a looser lower bound)."""
    elc_gradient: float = 0.0
    """Fraction of Σ |∂ loss / ∂ log π| in the ELC region: the critical step and its suffix."""
    clip_low_inside: float = 0.0
    """Fraction of the ELC region's weight that was cut; `outside` is of the rest."""
    clip_low_outside: float = 0.0
    clip_high_inside: float = 0.0
    clip_high_outside: float = 0.0
    mismatch_k3: float = 0.0
    """KL(rollout engine || learner) of the same weights, nats per token."""
    mismatch_ratio_mean: float = 0.0
    """Mean of π_old/π_rollout, 1 where engine and learner agree; before any cap."""
    mismatch_ratio_max: float = 0.0
    tis_capped: float = 0.0
    """Fraction of the weight whose π_old/π_rollout was cut at `tis_cap`."""
    icepop_masked: float = 0.0
    """Fraction of the weight that IcePop took out."""
    ref_k3: float = 0.0
    """KL(policy || reference), nats per token."""


@dataclass(frozen=True)
class OptimizerStep:
    """One optimizer step: `stats` of all ranks, counts of this one."""

    stats: LossStats
    grad_norm: float
    lr: float
    padded_tokens: int
    packs: int


def summarize(
    steps: Sequence[OptimizerStep], *, forward_tokens: int, seconds: float, **more: Any
) -> UpdateStats:
    """All steps (one or more) of all ranks, whose counts are added up here; `more`: fields that do
    not follow from them. A collective."""
    total = reduce(add, (step.stats for step in steps))
    counts = torch.tensor(
        [sum(step.padded_tokens for step in steps), sum(step.packs for step in steps)],
        device=total.loss.device,
    )
    dist.all_reduce(counts)
    shares: dict[str, Any] = {**means(total), **more}
    return UpdateStats(
        optimizer_steps=len(steps),
        loss=float(total.loss) / len(steps),
        grad_norm=sum(step.grad_norm for step in steps) / len(steps),
        lr=steps[-1].lr,
        trained_tokens=int(total.tokens),
        forward_tokens=forward_tokens,
        padded_tokens=int(counts[0]),
        packs=int(counts[1]),
        learner_seconds=seconds,
        learner_tokens_per_s=forward_tokens / seconds,
        **shares,
    )


def entropy_moments(packs: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean and sample standard deviation of token entropies over the packs of all ranks.

    A pack is (entropies, weights, copies), each of shape [M]: how many leaves a token stands for.
    Tokens count by their weight in the objective (alike under token_mean). The deviation is 1 where
    all are equal up to rounding.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=packs[0][0].device)
    for entropy, weight, copies in packs:
        h, w = entropy.double(), weight.double()
        sums += torch.stack([w.sum(), (w * h).sum(), (w * h * h).sum(), copies.double().sum()])
    dist.all_reduce(sums)
    total, first, second, count = sums
    mean = first / total
    variance = (second / total - mean * mean).clamp(min=0)
    deviation = (variance * count / (count - 1).clamp(min=1)).sqrt()
    return mean, torch.where(deviation > 1e-6 * mean, deviation, 1.0)


def all_reduce(stats: LossStats) -> LossStats:
    """The statistics of all ranks together."""
    names = [f.name for f in fields(stats)]
    values = torch.stack([getattr(stats, name).double() for name in names])
    largest = torch.stack([getattr(stats, name).double() for name in MAXIMA])
    dist.all_reduce(values)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    reduced = dict(zip(names, values, strict=True))
    reduced |= dict(zip(MAXIMA, largest, strict=True))
    return LossStats(**reduced)


def means(stats: LossStats) -> dict[str, float]:
    """The ratios of sums that `UpdateStats` reports, 0 where there is no weight."""
    value = {f.name: float(getattr(stats, f.name)) for f in fields(stats)}

    def share(name: str, of: float) -> float:
        return value[name] / of if of > 0 else 0.0

    def outside(name: str) -> float:
        rest = value["weight"] - value["weight_elc"]
        # The difference of two sums in floating point is never quite 0.
        return (value[name] - value[name + "_elc"]) / rest if rest > 1e-6 * value["weight"] else 0.0

    weight, elc = value["weight"], value["weight_elc"]
    return {
        "entropy": share("entropy", weight),
        "ratio_mean": share("ratio", weight),
        "ratio_max": value["ratio_max"],
        "clip_low": share("clip_low", weight),
        "clip_high": share("clip_high", weight),
        "clip_dual": share("clip_dual", weight),
        "elc_weight": share("weight_elc", weight),
        "elc_gradient": share("grad_elc", value["grad"]),
        "clip_low_inside": share("clip_low_elc", elc),
        "clip_low_outside": outside("clip_low"),
        "clip_high_inside": share("clip_high_elc", elc),
        "clip_high_outside": outside("clip_high"),
        "mismatch_k3": share("mismatch_k3", weight),
        "mismatch_ratio_mean": share("mismatch_ratio", weight),
        "mismatch_ratio_max": value["mismatch_ratio_max"],
        "tis_capped": share("tis_capped", weight),
        "icepop_masked": share("icepop_masked", weight),
        "ref_k3": share("ref_k3", weight),
    }
