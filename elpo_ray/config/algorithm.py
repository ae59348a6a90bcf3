"""An algorithm: growth x credit x clip x loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from elpo_ray.config.rules import require


class GrowthRule(Enum):
    """How the budget of one input is spent."""

    bel = "bel"
    independent = "independent"


class CreditRule(Enum):
    """How a finished tree becomes advantages."""

    hierarchical = "hierarchical"
    group = "group"


class ElcScope(Enum):
    """Which nodes get the looser lower clip bound (Eq. 11)."""

    none = "none"
    critical_subtree = "critical_subtree"
    """Every failed leaf through a confirmed critical node, from that step on."""
    searched_only = "searched_only"
    """Only the searched trajectory, from its critical step on."""
    first_wrong_all = "first_wrong_all"
    """Every failed leaf, from the shallowest node on its path with no success below."""


class Aggregation(Enum):
    """How token losses become one number; denominators are global over the mini-batch."""

    seq_mean_token_mean = "seq_mean_token_mean"
    token_mean = "token_mean"
    seq_mean_token_sum_norm = "seq_mean_token_sum_norm"


@dataclass(kw_only=True)
class BelConfig:
    """Binary-search error localization (Algorithm 1)."""

    b_max: int = 3
    """Failures collected before one of them is searched."""
    x_min: int = 1
    """Fewest completions a probe samples."""
    x_max: int = 3
    """Most completions a probe samples."""
    beta: float = 5.0
    """Steepness of the entropy gate (Eq. 5)."""
    entropy_tokens: int = 20
    """Tokens at a turn's start whose mean entropy is the segment's (Eq. 3); -1 = whole turn."""
    verify_final: bool = True
    """Probe the last candidate too, as Figure 4 does; false = Algorithm 1 literally."""

    def __post_init__(self) -> None:
        require(self.b_max >= 1, "algorithm.growth.bel.b_max", self.b_max, "use at least 1")
        require(self.x_min >= 1, "algorithm.growth.bel.x_min", self.x_min, "use at least 1")
        require(
            self.x_max >= self.x_min,
            "algorithm.growth.bel.x_max",
            self.x_max,
            f"use at least x_min={self.x_min}",
        )
        require(
            self.entropy_tokens == -1 or self.entropy_tokens >= 1,
            "algorithm.growth.bel.entropy_tokens",
            self.entropy_tokens,
            "use at least 1, or -1 for the whole turn",
        )


@dataclass(kw_only=True)
class GrowthConfig:
    """How one input's budget becomes a tree."""

    rule: GrowthRule = GrowthRule.bel
    n_total: int = 16
    """Completed trajectories per input: each one is a leaf, always exactly this many."""
    bel: BelConfig = field(default_factory=BelConfig)

    def __post_init__(self) -> None:
        require(
            self.n_total >= 2,
            "algorithm.growth.n_total",
            self.n_total,
            "an advantage needs at least 2 trajectories; use 2 or more",
        )


@dataclass(kw_only=True)
class CreditConfig:
    """How a finished tree becomes one advantage per node."""

    rule: CreditRule = CreditRule.hierarchical
    lam: float = 0.5
    """Weight of the branch level against the trajectory level (Eq. 10)."""
    eps: float = 1e-6
    """Added to the standard deviation."""
    ddof: int = 0
    """0 = population (the paper's), 1 = sample standard deviation."""

    def __post_init__(self) -> None:
        require(0 <= self.lam <= 1, "algorithm.credit.lam", self.lam, "use a value in [0, 1]")
        require(self.eps >= 0, "algorithm.credit.eps", self.eps, "use 0 or more")
        require(self.ddof in (0, 1), "algorithm.credit.ddof", self.ddof, "use 0 or 1")


@dataclass(kw_only=True)
class ClipConfig:
    """Clip bounds of the probability ratio (Eq. 11, 12)."""

    eps_low: float = 0.2
    eps_high: float = 0.315
    eps_elc: float = 0.115
    """Added to eps_low on the critical step and its suffix."""
    scope: ElcScope = ElcScope.critical_subtree
    keep_gradient: bool = False
    """Above 1 + eps_high keep the gradient (1 + eps_high) ∇log π, not 0 (AEPO)."""

    def __post_init__(self) -> None:
        for key in ("eps_low", "eps_high", "eps_elc"):
            value = getattr(self, key)
            require(value >= 0, f"algorithm.clip.{key}", value, "use 0 or more")
        require(
            self.eps_low + self.eps_elc < 1,
            "algorithm.clip.eps_elc",
            self.eps_elc,
            f"eps_low + eps_elc must stay below 1 (eps_low={self.eps_low})",
        )


@dataclass(kw_only=True)
class LossConfig:
    """The policy-gradient objective (Eq. 1, 12)."""

    aggregation: Aggregation = Aggregation.seq_mean_token_mean
    norm_tokens: int = 20480
    """Divisor C of seq_mean_token_sum_norm."""
    dual_clip: float | None = 10.0
    """Upper bound c on -ρ|A| for A < 0; null turns it off."""
    kl_coef: float = 0.0
    """Weight of the k3 divergence from the reference policy (the weights at the start of RL)."""
    tis_cap: float | None = None
    """Truncated importance sampling: weights min(π_old/π_rollout, cap); null turns it off."""
    entropy_advantage: float = 0.0
    """a of A·(1 + a·z(H_t)), H_t the current policy's token entropy, its z-score over all agent
    tokens of the mini-batch (AEPO); 0 turns it off."""

    def __post_init__(self) -> None:
        require(
            self.norm_tokens >= 1, "algorithm.loss.norm_tokens", self.norm_tokens, "use 1 or more"
        )
        require(
            self.dual_clip is None or self.dual_clip > 1,
            "algorithm.loss.dual_clip",
            self.dual_clip,
            "use a value above 1, or null to turn it off",
        )
        for key in ("kl_coef", "entropy_advantage"):
            value = getattr(self, key)
            require(value >= 0, f"algorithm.loss.{key}", value, "use 0 or more")
        require(
            self.tis_cap is None or self.tis_cap > 0,
            "algorithm.loss.tis_cap",
            self.tis_cap,
            "use a value above 0, or null to turn it off",
        )


@dataclass(kw_only=True)
class AlgorithmConfig:
    """An algorithm is these four choices; nothing else in the house knows its name."""

    name: str = "elpo"
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    credit: CreditConfig = field(default_factory=CreditConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    loss: LossConfig = field(default_factory=LossConfig)
