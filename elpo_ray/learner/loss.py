"""The clipped surrogate objective (Eq. 1, 12) and the supervised loss of the cold start.

Invariants: everything here is a weighted sum over tokens with weights fixed beforehand, so losses,
gradients and statistics of packs and ranks just add up; only the largest ratios are maxima.
All tensors have shape [M] = trained tokens, in nats; nothing but `logp` carries a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from elpo_ray.config.algorithm import ClipConfig, LossConfig, Surrogate
from elpo_ray.forest.layout import TokenColumns


class Objective(Enum):
    """What an update optimises."""

    surrogate = "surrogate"
    """The clipped policy-gradient objective."""
    nll = "nll"
    """Negative log-likelihood of the agent tokens: the cold start."""


MAX_LOG_RATIO = 20.0
"""ρ = exp(clamp(logp - logp_old, ±this))."""


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """What the loss reads of the trained tokens, besides their current log-probabilities."""

    columns: TokenColumns[Tensor]
    old_logp: Tensor
    """Log-probability under the weights that the learner had before the first optimizer step."""
    entropy: Tensor
    """Entropy of the current policy; a statistic only."""
    normed_entropy: Tensor | None = None
    """z-score of `entropy` over the mini-batch, in any precision; for `entropy_advantage` > 0."""
    ref_logp: Tensor | None = None
    """Log-probability under the reference policy; needed when `kl_coef` > 0."""


@dataclass(frozen=True)
class LossStats:
    """Sums over tokens, of `weight * quantity` but for `tokens`; 0-dimensional tensors.

    The ELC region is where the lower bound is looser than the default 1 - ε_low. What lies outside
    it is the difference: clip_low - clip_low_elc, weight - weight_elc.
    """

    loss: Tensor
    tokens: Tensor
    """How many tokens have a weight above 0."""
    weight: Tensor
    weight_elc: Tensor
    clip_low: Tensor
    """Where A < 0 and the ratio lies under its lower bound: no gradient."""
    clip_low_elc: Tensor
    clip_high: Tensor
    """Where A > 0 and the ratio lies over 1 + ε_high: no gradient, or a bounded one."""
    clip_high_elc: Tensor
    clip_dual: Tensor
    """Where A < 0 and the ratio lies over the dual clip: no gradient."""
    ratio: Tensor
    ratio_max: Tensor
    entropy: Tensor
    mismatch_k3: Tensor
    """KL(engine || learner) of the sampling weights, k3 estimator."""
    mismatch_ratio: Tensor
    """Importance weights π_old/π_rollout, uncut."""
    mismatch_ratio_max: Tensor
    tis_capped: Tensor
    """Where the importance weight was cut at its cap."""
    icepop_masked: Tensor
    """Where it lay outside IcePop's bounds: no gradient."""
    ref_k3: Tensor
    """KL(policy || reference), k3 estimator."""
    grad: Tensor
    """|∂ surrogate / ∂ log π|, positive and negative parts of the advantage each by itself."""
    grad_elc: Tensor

    def __add__(self, other: LossStats) -> LossStats:
        pairs = {name: (mine, getattr(other, name)) for name, mine in vars(self).items()}
        return LossStats(
            **{
                name: torch.maximum(*pair) if name in MAXIMA else pair[0] + pair[1]
                for name, pair in pairs.items()
            }
        )


MAXIMA = ("ratio_max", "mismatch_ratio_max")
"""Statistics that are maxima, not sums."""


def k3(logp: Tensor, other: Tensor) -> Tensor:
    """Unbiased, non-negative estimator of KL(p || other) on samples of p: r - 1 - log r with
    r = other / p, the log-ratio clamped as everywhere."""
    log_ratio = (other - logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio.exp() - 1 - log_ratio


def surrogate_loss(
    logp: Tensor, tokens: TokenBatch, clip: ClipConfig, cfg: LossConfig
) -> tuple[Tensor, LossStats]:
    """The negative of sum_t w_t L_t, to be minimised, and its statistics (Eq. 12).

    L = min(ρ A, clip(ρ, clip_low, 1 + ε_high) A); with dual clip c, L = max(L, c A) where A < 0.
    With A = A⁺ - A⁻ this is A⁺ min(ρ, 1 + ε_high) - A⁻ min(max(ρ, clip_low), c), which also is the
    weighted mean of L over leaves whose A differ in sign, A⁺ and A⁻ being the means of their parts.
    L is multiplied by `Correction.weight`. KL: minus kl_coef * k3. With `surrogate=log` L is
    A log π instead, which nothing clips.
    """
    weight, clip_low = tokens.columns.weight, tokens.columns.clip_low
    gain, negative_advantage = signed_parts(tokens, cfg.entropy_advantage)
    ratio = (logp - tokens.old_logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    high_bound = torch.full_like(ratio, 1 + clip.eps_high)
    if clip.keep_gradient:
        high_bound = high_bound * (ratio / ratio.detach())
    falling = torch.maximum(ratio, clip_low)
    if cfg.dual_clip is not None:
        falling = falling.clamp(max=cfg.dual_clip)
    surrogate = gain * torch.minimum(ratio, high_bound) - negative_advantage * falling
    unclipped = cfg.surrogate is Surrogate.log
    if unclipped:
        surrogate = (gain - negative_advantage) * logp
    correction = Correction.of(tokens, cfg)
    surrogate = surrogate * correction.weight
    ref_k3 = torch.zeros_like(ratio)
    if cfg.kl_coef > 0:
        assert tokens.ref_logp is not None, "kl_coef > 0 needs the reference's log-probabilities"
        ref_k3 = k3(logp, tokens.ref_logp)
        surrogate = surrogate - cfg.kl_coef * ref_k3
    loss = -(weight * surrogate).sum()
    with torch.no_grad():
        high = (gain > 0) & (ratio > 1 + clip.eps_high) & (not unclipped)
        low = (negative_advantage > 0) & (ratio < clip_low) & (not unclipped)
        elc = clip_low < 1 - clip.eps_low - 1e-6
        dual = torch.zeros_like(low)
        if cfg.dual_clip is not None and not unclipped:
            dual = (negative_advantage > 0) & (ratio > cfg.dual_clip)
        pull = torch.ones_like(ratio) if unclipped else ratio
        slope = weight * pull * (gain * ~high + negative_advantage * ~(low | dual))
        if clip.keep_gradient:
            slope = slope + weight * (1 + clip.eps_high) * gain * high
        slope = slope * correction.weight
        stats = LossStats(
            loss=loss.detach(),
            tokens=(weight > 0).sum().to(weight.dtype),
            weight=weight.sum(),
            weight_elc=(weight * elc).sum(),
            clip_low=(weight * low).sum(),
            clip_low_elc=(weight * (low & elc)).sum(),
            clip_high=(weight * high).sum(),
            clip_high_elc=(weight * (high & elc)).sum(),
            clip_dual=(weight * dual).sum(),
            ratio=(weight * ratio).sum(),
            ratio_max=_largest(ratio, weight),
            entropy=(weight * tokens.entropy).sum(),
            mismatch_k3=(weight * k3(tokens.columns.rollout_logp, tokens.old_logp)).sum(),
            mismatch_ratio=(weight * correction.ratio).sum(),
            mismatch_ratio_max=_largest(correction.ratio, weight),
            tis_capped=(weight * correction.capped).sum(),
            icepop_masked=(weight * correction.masked).sum(),
            ref_k3=(weight * ref_k3).sum(),
            grad=slope.sum(),
            grad_elc=(slope * elc).sum(),
        )
    return loss, stats


@dataclass(frozen=True)
class Correction:
    """The factor on each token's term that makes up for sampling by another program (the engine) or
    with other weights. With r = π_old / π_rollout it is min(r, cap) (truncated importance
    sampling), or r inside IcePop's bounds and 0 outside (arXiv 2510.18855), or 1."""

    ratio: Tensor
    """r, its logarithm clamped as everywhere."""
    weight: Tensor
    capped: Tensor
    """bool, where the cap cut r."""
    masked: Tensor
    """bool, where r lay out of bounds."""

    @classmethod
    def of(cls, tokens: TokenBatch, cfg: LossConfig) -> Correction:
        log_ratio = tokens.old_logp - tokens.columns.rollout_logp
        ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        nowhere = torch.zeros_like(ratio, dtype=torch.bool)
        if cfg.tis_cap is not None:
            return cls(ratio, ratio.clamp(max=cfg.tis_cap), ratio > cfg.tis_cap, nowhere)
        if cfg.icepop is not None:
            low, high = cfg.icepop
            masked = (ratio < low) | (ratio > high)
            return cls(ratio, torch.where(masked, 0, ratio), nowhere, masked)
        return cls(ratio, torch.ones_like(ratio), nowhere, nowhere)


def _largest(values: Tensor, weight: Tensor) -> Tensor:
    """0-dimensional; 0 without any token of weight."""
    return torch.where(weight > 0, values, 0).max() if len(values) else weight.sum()


def signed_parts(tokens: TokenBatch, entropy_advantage: float) -> tuple[Tensor, Tensor]:
    """A⁺ and A⁻ of A·(1 + entropy_advantage · normed_entropy) (AEPO, arXiv 2510.14545)"""
    negative_advantage = tokens.columns.negative_advantage
    gain = tokens.columns.advantage + negative_advantage
    if entropy_advantage == 0:
        return gain, negative_advantage
    assert tokens.normed_entropy is not None, "entropy_advantage > 0 needs normed entropies"
    factor = 1 + entropy_advantage * tokens.normed_entropy.to(gain.dtype)
    up, down = factor.clamp(min=0), (-factor).clamp(min=0)
    return gain * up + negative_advantage * down, negative_advantage * up + gain * down


def nll_loss(logp: Tensor, weight: Tensor, entropy: Tensor) -> tuple[Tensor, LossStats]:
    """The weighted negative log-likelihood of the cold start; ratio statistics stay 0."""
    loss = -(weight * logp).sum()
    zero = torch.zeros_like(loss.detach())
    sums = {name: zero for name in LossStats.__dataclass_fields__}
    sums["loss"] = loss.detach()
    sums["tokens"] = (weight > 0).sum().to(weight.dtype)
    sums["weight"] = weight.sum()
    sums["entropy"] = (weight * entropy).sum()
    return loss, LossStats(**sums)
