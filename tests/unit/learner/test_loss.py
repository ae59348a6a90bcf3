"""The surrogate objective by hand-computed values, one token at a time."""

from __future__ import annotations

import math
from dataclasses import replace
from operator import itemgetter

import pytest
import torch
from train_trees import token_columns

from elpo_ray.config.algorithm import ClipConfig, LossConfig, Surrogate
from elpo_ray.learner.loss import LossStats, TokenBatch, k3, nll_loss, surrogate_loss

CLIP = ClipConfig(eps_low=0.2, eps_high=0.315, eps_elc=0.115)
DEFAULT_LOW, ELC_LOW = 0.8, 0.685


def batch(size: int = 1, **values: float | list[float]) -> TokenBatch:
    base = {"weight": 1.0, "advantage": 1.0, "clip_low": DEFAULT_LOW, "old_logp": 0.0}
    base |= {"rollout_logp": 0.0, "entropy": 0.5}
    tensors = {
        key: torch.tensor(v if isinstance(v, list) else [v] * size, dtype=torch.float64)
        for key, v in (base | values).items()
    }
    own = {key: tensors.pop(key) for key in ("old_logp", "entropy")}
    return TokenBatch(columns=token_columns(**tensors), **own)


def evaluate(
    ratio: float, tokens: TokenBatch, cfg: LossConfig | None = None
) -> tuple[float, float, LossStats]:
    """Loss, its gradient by logp, statistics."""
    logp = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    loss, stats = surrogate_loss(logp, tokens, CLIP, cfg or LossConfig())
    loss.backward()
    assert logp.grad is not None
    return loss.item(), logp.grad.item(), stats


@pytest.mark.parametrize(
    ("ratio", "advantage", "clip_low", "loss", "grad"),
    [
        # A > 0: the gain is capped at 1 + eps_high; below 1 nothing is clipped, however low.
        (1.0, 2.0, DEFAULT_LOW, -2.0, -2.0),
        (1.3, 2.0, DEFAULT_LOW, -2.6, -2.6),
        (1.4, 2.0, DEFAULT_LOW, -2.63, 0.0),
        (0.5, 2.0, DEFAULT_LOW, -1.0, -1.0),
        # A < 0: the pushing down ends at the token's own lower bound.
        (0.9, -2.0, DEFAULT_LOW, 1.8, 1.8),
        (0.7, -2.0, DEFAULT_LOW, 1.6, 0.0),
        (0.7, -2.0, ELC_LOW, 1.4, 1.4),
        (0.6, -2.0, ELC_LOW, 1.37, 0.0),
        (1.5, -2.0, DEFAULT_LOW, 3.0, 3.0),
        # Dual clip, c = 10.
        (12.0, -2.0, DEFAULT_LOW, 20.0, 0.0),
        (9.0, -2.0, DEFAULT_LOW, 18.0, 18.0),
        (12.0, 2.0, DEFAULT_LOW, -2.63, 0.0),
    ],
)
def test_surrogate_by_hand(
    ratio: float, advantage: float, clip_low: float, loss: float, grad: float
) -> None:
    value, gradient, _ = evaluate(ratio, batch(advantage=advantage, clip_low=clip_low))
    assert value == pytest.approx(loss, abs=1e-12)
    assert gradient == pytest.approx(grad, abs=1e-12)


@pytest.mark.parametrize("advantage", [-2.0, 0.5])
@pytest.mark.parametrize("ratio", [0.1, 0.7, 1.0, 1.5, 12.0])
def test_the_log_surrogate_has_no_ratio_and_no_clipping(ratio: float, advantage: float) -> None:
    """A log π: whatever the ratio, the gradient is the advantage."""
    cfg = LossConfig(surrogate=Surrogate.log)
    value, gradient, stats = evaluate(ratio, batch(advantage=advantage, weight=0.5), cfg)
    assert value == pytest.approx(-0.5 * advantage * math.log(ratio))
    assert gradient == pytest.approx(-0.5 * advantage)
    assert stats.grad.item() == pytest.approx(0.5 * abs(advantage))
    assert not stats.clip_low + stats.clip_high + stats.clip_dual
    assert stats.ratio_max.item() == pytest.approx(ratio)


def test_without_dual_clip_a_large_ratio_is_unbounded() -> None:
    value, gradient, _ = evaluate(12.0, batch(advantage=-2.0), LossConfig(dual_clip=None))
    assert value == pytest.approx(24.0)
    assert gradient == pytest.approx(24.0)


def test_the_weight_multiplies() -> None:
    value, gradient, stats = evaluate(1.1, batch(advantage=3.0, weight=0.25))
    assert value == pytest.approx(-0.825)
    assert gradient == pytest.approx(-0.825)
    assert stats.ratio.item() == pytest.approx(0.275)
    assert stats.entropy.item() == pytest.approx(0.125)


def test_the_log_ratio_is_clamped() -> None:
    logp = torch.tensor([500.0], dtype=torch.float64)
    loss, _ = surrogate_loss(logp, batch(advantage=-1.0), CLIP, LossConfig(dual_clip=None))
    assert loss.item() == pytest.approx(math.exp(20))


def test_truncated_importance_sampling() -> None:
    tokens = batch(advantage=1.0, rollout_logp=-math.log(3.0))  # π_old / π_rollout = 3
    value, gradient, stats = evaluate(1.1, tokens, LossConfig(tis_cap=2.0))
    assert value == pytest.approx(-2.2)
    assert gradient == pytest.approx(-2.2)
    assert stats.tis_capped.item() == 1
    value, _, stats = evaluate(1.1, tokens, LossConfig(tis_cap=5.0))
    assert value == pytest.approx(-3.3)
    assert stats.tis_capped.item() == 0


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize(
    ("drift", "weight"), [(0.4, 0.0), (0.5, 0.5), (1.0, 1.0), (5.0, 5.0), (5.1, 0.0)]
)
def test_icepop_weighs_inside_its_bounds_and_masks_outside(
    advantage: float, drift: float, weight: float
) -> None:
    """`drift` = π_old / π_rollout."""
    tokens = batch(advantage=advantage, rollout_logp=-math.log(drift))
    value, gradient, stats = evaluate(1.1, tokens, LossConfig(icepop=(0.4999, 5.0001)))
    assert value == pytest.approx(-1.1 * advantage * weight)
    assert gradient == pytest.approx(-1.1 * advantage * weight)
    assert stats.grad.item() == pytest.approx(abs(gradient))
    assert stats.icepop_masked == (weight == 0)
    assert stats.tis_capped == 0


def test_icepop_leaves_the_divergence_alone() -> None:
    ref = torch.tensor([math.log(0.5)]).double()
    tokens = replace(batch(rollout_logp=-3.0), ref_logp=ref)
    value, _, _ = evaluate(1.0, tokens, LossConfig(icepop=(0.5, 5.0), kl_coef=0.1))
    assert value == pytest.approx(0.1 * (0.5 - 1 - math.log(0.5)))


def test_mismatch_statistics_by_hand() -> None:
    """Three tokens of weights 0.5, 0.3, 0.2 with π_old / π_rollout of 1, 3 and 0.25; a fourth
    without weight."""
    drift, weight = [1.0, 3.0, 0.25, 40.0], [0.5, 0.3, 0.2, 0.0]
    size = dict.fromkeys(("advantage", "clip_low", "old_logp", "entropy"), [0.0] * 4)
    tokens = batch(**size | {"weight": weight, "rollout_logp": [-math.log(d) for d in drift]})
    logp = torch.zeros(4, dtype=torch.float64)
    _, stats = surrogate_loss(logp, tokens, CLIP, LossConfig(tis_cap=2.0))
    k3_by_hand = sum(w * (d - 1 - math.log(d)) for d, w in zip(drift, weight, strict=True))
    assert stats.mismatch_k3.item() == pytest.approx(k3_by_hand)
    assert stats.mismatch_ratio.item() == pytest.approx(0.5 + 0.9 + 0.05)
    assert stats.mismatch_ratio_max.item() == pytest.approx(3)
    assert stats.tis_capped.item() == pytest.approx(0.3)
    assert stats.icepop_masked == 0
    _, stats = surrogate_loss(logp, tokens, CLIP, LossConfig(icepop=(0.5, 5.0)))
    assert (stats.tis_capped, stats.icepop_masked.item()) == (0, pytest.approx(0.2))


def test_one_correction_at_a_time() -> None:
    with pytest.raises(ValueError, match=r"algorithm\.loss\.icepop.*tis_cap=2\.0"):
        LossConfig(tis_cap=2.0, icepop=(0.5, 5.0))
    with pytest.raises(ValueError, match=r"bounds around 1"):
        LossConfig(icepop=(1.5, 5.0))


def test_kl_to_the_reference() -> None:
    tokens = replace(batch(advantage=0.0), ref_logp=torch.tensor([math.log(0.5)]).double())
    value, gradient, stats = evaluate(1.0, tokens, LossConfig(kl_coef=0.1))
    kl = 0.5 - 1 - math.log(0.5)
    assert value == pytest.approx(0.1 * kl)
    assert gradient == pytest.approx(0.1 * (1 - 0.5))
    assert stats.ref_k3.item() == pytest.approx(kl)


def test_k3_is_zero_at_equality_and_positive_elsewhere() -> None:
    logp = torch.tensor([-1.0, -1.0, -1.0])
    estimate = k3(logp, torch.tensor([-1.0, -2.0, -0.5]))
    assert estimate[0] == 0
    assert (estimate[1:] > 0).all()


def test_clip_statistics_inside_and_outside_the_region() -> None:
    ratio = [0.75, 0.6, 0.75, 1.4, 1.4, 11.0, 50.0]
    tokens = batch(
        weight=[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0],
        advantage=[-1.0, -1.0, -1.0, 1.0, 1.0, -1.0, -1.0],
        clip_low=[DEFAULT_LOW, ELC_LOW, ELC_LOW, DEFAULT_LOW, ELC_LOW, DEFAULT_LOW, DEFAULT_LOW],
        old_logp=[0.0] * 7,
        rollout_logp=[0.0] * 7,
        entropy=[0.0] * 7,
    )
    logp = torch.tensor(ratio, dtype=torch.float64).log()
    _, stats = surrogate_loss(logp, tokens, CLIP, LossConfig())
    assert stats.tokens == 6
    assert stats.weight_elc == 3
    assert (stats.clip_low, stats.clip_low_elc) == (2, 1)
    assert (stats.clip_high, stats.clip_high_elc) == (2, 1)
    assert stats.clip_dual == 1
    assert stats.ratio_max.item() == pytest.approx(11)


def test_losses_and_statistics_of_parts_add_up() -> None:
    generator = torch.Generator().manual_seed(0)

    def random() -> torch.Tensor:
        return torch.randn(40, generator=generator, dtype=torch.float64)

    logp, old = -random().abs(), -random().abs()
    columns = token_columns(
        weight=random().abs(),
        advantage=random(),
        clip_low=torch.where(random() > 0, ELC_LOW, DEFAULT_LOW).double(),
        rollout_logp=old + 0.1 * random(),
    )
    entropy = random().abs()
    tokens = TokenBatch(columns=columns, old_logp=old, entropy=entropy)
    cfg = LossConfig(icepop=(0.95, 1.05))
    loss, whole = surrogate_loss(logp, tokens, CLIP, cfg)
    parts = []
    for part in (slice(0, 13), slice(13, 40), slice(40, 40)):
        picked = TokenBatch(
            columns=columns.map(itemgetter(part)), old_logp=old[part], entropy=entropy[part]
        )
        parts.append(surrogate_loss(logp[part], picked, CLIP, cfg))
    assert sum(part for part, _ in parts).item() == pytest.approx(loss.item(), rel=1e-12)
    total = parts[0][1] + parts[1][1] + parts[2][1]
    for name, value in vars(whole).items():
        torch.testing.assert_close(getattr(total, name), value, rtol=1e-12, atol=1e-12)


def test_nll_is_the_weighted_mean() -> None:
    logp = torch.tensor([-1.0, -3.0, -9.0], requires_grad=True)
    loss, stats = nll_loss(logp, torch.tensor([0.5, 0.5, 0.0]), torch.ones(3))
    loss.backward()
    assert loss.item() == pytest.approx(2.0)
    assert logp.grad is not None
    assert logp.grad.tolist() == [-0.5, -0.5, 0.0]
    assert (stats.tokens, stats.entropy, stats.ratio) == (2, 1, 0)


def test_gradient_is_kept_above_the_upper_bound() -> None:
    """AEPO: the value is that of the clip, the gradient (1 + eps_high) d log ρ."""
    clip = ClipConfig(eps_low=0.2, eps_high=0.2, eps_elc=0.0, keep_gradient=True)
    cases = [
        (1.5, 2.0, -2.4, -2.4),
        (1.1, 2.0, -2.2, -2.2),
        (0.5, -2.0, 1.6, 0.0),
        (1.5, -2.0, 3.0, 3.0),
    ]
    for ratio, advantage, value, gradient in cases:
        logp = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
        loss, stats = surrogate_loss(logp, batch(advantage=advantage), clip, LossConfig())
        loss.backward()
        assert logp.grad is not None
        assert (loss.item(), logp.grad.item()) == pytest.approx((value, gradient))
        assert stats.clip_high == (ratio > 1.2 and advantage > 0)


@pytest.mark.parametrize("z", [-7.0, -1.0, 0.0, 2.5])
@pytest.mark.parametrize("advantage", [-2.0, 0.0, 1.5])
@pytest.mark.parametrize("ratio", [0.6, 1.0, 1.4, 12.0])
def test_entropy_scales_the_advantage(z: float, advantage: float, ratio: float) -> None:
    """AEPO: A (1 + 0.2 z), also where the factor is below 0."""
    tokens = replace(batch(advantage=advantage), normed_entropy=torch.tensor([z]))
    value, gradient, _ = evaluate(ratio, tokens, LossConfig(entropy_advantage=0.2))
    scaled = advantage * (1 + 0.2 * z)
    expected = evaluate(ratio, batch(advantage=scaled))
    assert (value, gradient) == pytest.approx(expected[:2], abs=1e-6)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("ratio", [0.3, 0.75, 1.0, 1.25, 1.5, 5.0])
def test_signed_parts_are_the_mean_over_leaves_of_either_sign(
    ratio: float, dual_clip: float | None
) -> None:
    """Leaves with advantages 2, 0.5, -1.5 and -0.5 share a token; ρ is clipped leaf by leaf."""
    cfg = LossConfig(dual_clip=dual_clip)
    leaves = [evaluate(ratio, batch(advantage=a, weight=0.25), cfg) for a in (2.0, 0.5, -1.5, -0.5)]
    together = batch(advantage=0.125, negative_advantage=0.5)
    value, gradient, _ = evaluate(ratio, together, cfg)
    assert value == pytest.approx(sum(leaf[0] for leaf in leaves), abs=1e-12)
    assert gradient == pytest.approx(sum(leaf[1] for leaf in leaves), abs=1e-12)
