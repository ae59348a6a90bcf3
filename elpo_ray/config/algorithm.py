"""An algorithm is a choice of growth, credit, clip bounds and loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Annotated, Any

from elpo_ray.config.dotted import is_path
from elpo_ray.config.growth import GrowthConfig
from elpo_ray.config.rules import (
    Fraction,
    Names,
    NonNegativeFloat,
    PositiveFraction,
    PositiveInt,
    Section,
    above,
    between,
)

OFF = "or null to turn it off"


class CreditRule(StrEnum):
    """The built-in rules by which finished trees become advantages (`elpo_ray.credit`)."""

    hierarchical = "hierarchical"
    """ELPO's branch and trajectory levels."""
    group = "group"
    """z-scores over an input's leaves."""
    whitened = "whitened"
    """z-scores over all tokens of the batch (Reinforce++)."""
    tree_group = "tree_group"
    """z-scores over an input's leaves plus those over its tree's (Tree-GRPO)."""
    step_group = "step_group"
    """z-scores over an input's leaves plus those over steps from equal states (GiGPO)."""
    group_each = "group_each"
    """z-scores within a leaf's own group: those from the prompt are one, those of each branching
    another (DEEP-GRPO, SRPO)."""
    contrast = "contrast"
    """z-scores of the beginnings of trajectories, and of their ends (BranPO)."""


class ElcScope(Enum):
    """Which nodes get the looser lower clip bound (Eq. 11)."""

    none = "none"
    """No node gets it."""
    critical_subtree = "critical_subtree"
    """Every failed leaf through a confirmed critical node, from that step on."""
    searched_only = "searched_only"
    """Only the searched trajectory's own terms, from its critical step on."""
    posterior = "posterior"
    """Only the searched trajectory's own terms, on each step as far as the search believes that the
    critical step lies there or before; also where it named no step (not in the paper)."""
    first_wrong_all = "first_wrong_all"
    """Every failed leaf, from the shallowest node on its path with no success below."""


class Aggregation(Enum):
    """How token losses become one number; denominators are global over the mini-batch."""

    seq_mean_token_mean = "seq_mean_token_mean"
    """Mean over the sequences of the mean over each one's tokens (Eq. 1)."""
    token_mean = "token_mean"
    """Mean over all tokens of the mini-batch, so longer sequences weigh more."""
    seq_mean_token_sum_norm = "seq_mean_token_sum_norm"
    """Mean over the sequences of each one's token sum, divided by `norm_tokens`."""


class Attribution(Enum):
    """What a step shared by several leaves gets of their advantages."""

    mean = "mean"
    """It gets their mean as its one advantage (Eq. 9; "hard" in ARPO)."""
    each = "each"
    """It gets each of them, as if every leaf were a sequence of its own ("soft" in ARPO): the
    gradient is the same where the ratio is 1 and differs where it is clipped."""


class Weighting(Enum):
    """How often a token shared by several leaves counts."""

    leaf = "leaf"
    """It counts once for each leaf (Eq. 1)."""
    node = "node"
    """It counts once; all weights are rescaled so that their sum stays the same."""


class Train(Enum):
    """Which steps a trajectory trains."""

    path = "path"
    """All steps from the prompt to its end."""
    own = "own"
    """Those that it sampled itself, not the prefix that it continues."""


class BranchParent(Enum):
    """What becomes of a trajectory whose prefix was continued."""

    keep = "keep"
    """It is trained on like any other."""
    drop = "drop"
    """It takes part in nothing: it is paid for and not trained on (SRPO)."""


class Norm(Enum):
    """Among which ends of trajectories an end is compared under `contrast`."""

    input = "input"
    """Those of all trajectories of the input."""
    pair = "pair"
    """Those of one trajectory and its kept completion."""


class AfterIrrecoverable(Enum):
    """Which advantage the steps after the last chance of success get."""

    paper = "paper"
    """They keep their advantage."""
    neutral = "neutral"
    """A step whose parent has no successful leaf below it gets 0, so that only the step which lost
    the last chance of success keeps a negative advantage."""


@dataclass(kw_only=True)
class StepGroupConfig(Section, key="algorithm.credit.step"):
    """Steps compared with steps taken in the same state (GiGPO)."""

    omega: NonNegativeFloat = 1.0
    """Weight of the step level."""
    gamma: PositiveFraction = 0.95
    """Discount per step back from the end."""


@dataclass(kw_only=True)
class CreditConfig(Section, key="algorithm.credit"):
    """How finished trees become one advantage per node."""

    rule: Annotated[str, Names(CreditRule)] = "hierarchical"
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of a rule of your own (docs/extending.md)."""
    lam: Fraction = 0.5
    """Weight of the branch level against the trajectory level (Eq. 10)."""
    eps: NonNegativeFloat = 1e-6
    """This is added to the standard deviation; under `whitened` to the variance."""
    ddof: Annotated[int, between(0, 1, "use 0 or 1")] = 0
    """0 = population (the paper's), 1 = sample standard deviation."""
    divide_by_std: bool = True
    """false: advantages are differences from the mean only."""
    baseline: bool = False
    """Under `whitened`: the input's mean reward is subtracted first (Reinforce++-baseline)."""
    step: StepGroupConfig = field(default_factory=StepGroupConfig)
    attribution: Attribution = Attribution.mean
    weighting: Weighting = Weighting.leaf
    after_irrecoverable: AfterIrrecoverable = AfterIrrecoverable.paper
    train: Train = Train.path
    skip_zero: bool = False
    """Trajectories with advantage 0 leave the batch, and so the denominators of the loss
    (DEEP-GRPO)."""
    parent: BranchParent = BranchParent.keep
    """Whether a trajectory whose prefix was continued is trained on."""
    norm: Norm = Norm.input

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.options and not is_path(self.rule):
            yield "options", f"rule={self.rule} has none; its settings are keys of their own"
        apart = self.rule in (CreditRule.group_each, CreditRule.contrast)
        if apart and self.train is not Train.own:
            yield "train", f"rule={self.rule} says nothing of steps that leaves share; use own"
        if self.train is Train.own and self.attribution is not Attribution.mean:
            yield "attribution", "under train=own no step is shared; use mean"
        if self.train is Train.own and self.weighting is not Weighting.leaf:
            yield "weighting", "under train=own no step is shared; use leaf"


@dataclass(kw_only=True)
class ClipConfig(Section, key="algorithm.clip"):
    """Clip bounds of the probability ratio (Eq. 11, 12)."""

    eps_low: NonNegativeFloat = 0.2
    """The ratio of probabilities is clipped below 1 - eps_low."""
    eps_high: NonNegativeFloat = 0.315
    """The ratio of probabilities is clipped above 1 + eps_high."""
    eps_elc: NonNegativeFloat = 0.115
    """This is added to eps_low on the critical step and its suffix."""
    scope: ElcScope = ElcScope.critical_subtree
    keep_gradient: bool = False
    """A ratio above 1 + eps_high keeps the gradient (1 + eps_high) ∇log π instead of 0 (AEPO)."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.eps_low + self.eps_elc >= 1:
            yield "eps_elc", f"eps_low + eps_elc must stay below 1 (eps_low={self.eps_low})"


class Surrogate(Enum):
    """What is multiplied by the advantage."""

    ratio = "ratio"
    """The probability ratio, clipped (Eq. 1)."""
    log = "log"
    """The log-probability: no ratio and no clipping (SRPO)."""


@dataclass(kw_only=True)
class StreamsConfig(Section, key="algorithm.loss.streams"):
    """Trajectories that continue a prefix may have a loss of their own (DEEP-GRPO)."""

    branch: NonNegativeFloat | None = None
    """Weight of that loss beside the one of the others, each with denominators of its own; null:
    all have one loss together."""


@dataclass(kw_only=True)
class LossConfig(Section, key="algorithm.loss"):
    """The policy-gradient objective (Eq. 1, 12)."""

    aggregation: Aggregation = Aggregation.seq_mean_token_mean
    surrogate: Surrogate = Surrogate.ratio
    streams: StreamsConfig = field(default_factory=StreamsConfig)
    norm_tokens: PositiveInt = 20480
    """Divisor C of seq_mean_token_sum_norm."""
    dual_clip: Annotated[float, above(1, f"use a value above 1, {OFF}")] | None = 10.0
    """Upper bound c on -ρ|A| for A < 0; null turns it off."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the k3 divergence from the reference policy (the weights at the start of RL)."""
    tis_cap: Annotated[float, above(0, f"use a value above 0, {OFF}")] | None = None
    """Truncated importance sampling: weights min(π_old/π_rollout, cap); null turns it off."""
    icepop: tuple[NonNegativeFloat, NonNegativeFloat] | None = None
    """IcePop: weights π_old/π_rollout, but 0 outside these bounds ([0.5, 5.0] in the original);
    null turns it off."""
    entropy_advantage: NonNegativeFloat = 0.0
    """Factor a in A·(1 + a·z(H_t)), where z(H_t) is the z-score of the current policy's token
    entropy over all agent tokens of the mini-batch (AEPO); 0 turns it off."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.icepop is None:
            return
        if not self.icepop[0] < 1 < self.icepop[1]:
            yield "icepop", f"use bounds around 1, such as [0.5, 5.0], {OFF}"
        if self.tis_cap is not None:
            remedy = f"its upper bound stands in for tis_cap={self.tis_cap}"
            yield "icepop", f"{remedy}; set one of them to null"


@dataclass(kw_only=True)
class AlgorithmConfig(Section, key="algorithm"):
    """An algorithm is these four choices; nothing else in the package knows its name."""

    name: str = "elpo"
    """Name of the algorithm, a part of the name of the run's folder; it changes nothing else."""
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    credit: CreditConfig = field(default_factory=CreditConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    loss: LossConfig = field(default_factory=LossConfig)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if (
            self.credit.attribution is Attribution.each
            and self.loss.aggregation is Aggregation.seq_mean_token_mean
        ):
            remedy = "leaves must weigh alike on the tokens they share"
            yield "credit.attribution", f"{remedy}; use loss.aggregation=token_mean"
