"""How the budget of one input is spent, and which inputs are trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Annotated, Any

from elpo_ray.config.dotted import is_path
from elpo_ray.config.rules import (
    Fraction,
    Names,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Section,
    at_least,
)


class GrowthRule(StrEnum):
    """The built-in rules by which one input's budget becomes a tree (`elpo_ray.growth`, one file a
    rule)."""

    bel = "bel"
    """The binary search of ELPO (Algorithm 1)."""
    posterior = "posterior"
    """The search by evidence (docs/localization.md)."""
    independent = "independent"
    """Every trajectory starts at the prompt (GRPO)."""
    entropy_branch = "entropy_branch"
    """A trajectory branches where the entropy rises after a tool's response (ARPO, AEPO)."""
    random_branch = "random_branch"
    """Trees branch at nodes that are drawn at random (Tree-GRPO)."""
    pivot = "pivot"
    """The first failure branches once, at a drawn prefix (DEEP-GRPO)."""
    contrast = "contrast"
    """Trajectories are completed anew from near their ends (BranPO)."""
    reset = "reset"
    """The first failure goes on from before its wrong step (SRPO, RRPO)."""


Trajectories = Annotated[
    int, at_least(2, "an advantage needs at least 2 trajectories; use 2 or more")
]


@dataclass(kw_only=True)
class BelConfig(Section, key="algorithm.growth.bel"):
    """Binary-search error localization (Algorithm 1)."""

    b_max: PositiveInt = 3
    """How many failures are collected before one of them is searched."""
    x_min: PositiveInt = 1
    """Fewest completions that a probe samples."""
    x_max: PositiveInt = 3
    """Most completions that a probe samples."""
    beta: float = 5.0
    """Steepness of the entropy gate (Eq. 5)."""
    entropy_tokens: int = 20
    """Tokens at a turn's start whose mean entropy is the segment's (Eq. 3); -1 = whole turn."""
    verify_final: bool = True
    """true: the last candidate is probed too, as in Figure 4; false: as Algorithm 1 is written."""
    use_tree: bool = False
    """true: a successful trajectory of the tree that shares its first m steps, token for token,
    with the searched one shows without a probe that step m was recoverable (not in the paper)."""
    early_stop: bool = False
    """true: a probe samples one completion after the other and ends with its first success (not in
    the paper)."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.x_max < self.x_min:
            yield "x_max", f"use at least x_min={self.x_min}"
        if self.entropy_tokens != -1 and self.entropy_tokens < 1:
            yield "entropy_tokens", "use 1 or more, or -1 for the whole turn"


class Prior(Enum):
    """What a search by evidence believes of the steps before it has seen any completion."""

    surprise = "surprise"
    """A step is as suspect as its least likely tokens were improbable."""
    entropy = "entropy"
    """A step is as suspect as the entropy of its first tokens is high (Eq. 3)."""
    uniform = "uniform"
    """All steps are equally suspect."""


class FreeEvidence(Enum):
    """Which trajectories of the tree count as completions of the searched one's prefixes."""

    none = "none"
    """No trajectory but the probes' own completions."""
    tokens = "tokens"
    """Those from the prompt that have the same tokens up to the anchor."""
    state = "state"
    """Those from the prompt whose tools gave the same results up to the anchor: as good as equal
    tokens only where a result tells the whole state of the tools."""


@dataclass(kw_only=True)
class PosteriorConfig(Section, key="algorithm.growth.posterior"):
    """Search for the critical step by the posterior over all steps; failures are collected and
    chosen as `algorithm.growth.bel` says."""

    prior: Prior = Prior.surprise
    least_likely: PositiveInt = 1
    """Tokens of a step whose mean probability is its surprise; more than 1 for long turns."""
    doubt: Fraction = 0.0
    """Share of the prior that is spread evenly over the steps: a policy also errs where it is sure.
    """
    beta: tuple[PositiveFloat, PositiveFloat] = (0.6, 1.0)
    """A recoverable prefix succeeds with a chance drawn from Beta(a, b)."""
    fit_beta: bool = False
    """true: `beta` is where it starts; it is fitted to the probes of the finished steps."""
    threshold: PositiveFraction = 0.8
    """A step is named when its posterior reaches this."""
    free_evidence: FreeEvidence = FreeEvidence.tokens
    max_probes: NonNegativeInt = 4
    """Most completions that one search may ask for; then it names no step."""


@dataclass(kw_only=True)
class EntropyBranchConfig(Section, key="algorithm.growth.entropy"):
    """Branching where the entropy after a tool response rises (ARPO, AEPO)."""

    initial: PositiveInt = 8
    """Trajectories from the prompt before anything branches."""
    monitor: bool = False
    """The first trajectory decides instead of `initial` how many start at the prompt: one plus
    n_total * sigmoid(monitor_beta * (H_root - H_tool)), rounded down (AEPO)."""
    monitor_beta: float = 0.5
    """Factor of the difference of entropies in `monitor`."""
    beam: PositiveInt = 2
    """A trajectory may be copied beam - 1 times after each tool response."""
    branch_probability: Fraction = 0.5
    """Probability of one copy where the entropy is that of the trajectory's first turn."""
    entropy_weight: float = 0.2
    """How much a rise of the entropy by one unit adds to the probability."""
    penalty: Fraction = 0.0
    """Share of the draw that is lost per branching in a row of the same input (AEPO)."""
    threshold: float | None = None
    """A trajectory branches where branch_probability + entropy_weight * rise is above this, without
    a draw (the paper of ARPO); null = the branch is drawn at random (its code)."""
    entropy_tokens: PositiveInt = 20
    """Tokens at a turn's start whose entropies are summed."""
    vocab_size: Annotated[int, at_least(2)] = 151643
    """The entropy's unit is the logarithm of this; Qwen2.5's vocabulary."""


@dataclass(kw_only=True)
class RandomBranchConfig(Section, key="algorithm.growth.random"):
    """Branching at prefixes drawn at random (Tree-GRPO); the budget left after the chains is dealt
    out evenly over rounds and trees."""

    trees: PositiveInt = 4
    """Trees per input, M: branching prefixes and one term of the advantage stay within a tree."""
    chains: PositiveInt = 1
    """Trajectories from the prompt with which each tree starts."""
    rounds: PositiveInt = 1
    """Rounds of expansions, L; one round draws from the nodes that it found."""


class PivotModel(Enum):
    """How the prefix that a failed trajectory is continued from is drawn (DEEP-GRPO)."""

    logistic = "logistic"
    """In proportion to (its place in the chain)^gamma and to the chance that one of its branches
    succeeds, by a logistic regression on the place."""
    uniform = "uniform"
    """In proportion to (its place in the chain)^gamma."""
    random = "random"
    """All prefixes are equally likely."""


@dataclass(kw_only=True)
class PivotConfig(Section, key="algorithm.growth.pivot"):
    """Many branches at one prefix of a failed trajectory (DEEP-GRPO); the budget left goes to
    further trajectories from the prompt."""

    roots: PositiveInt = 8
    """Trajectories from the prompt before anything branches."""
    chains: PositiveInt = 1
    """Failed ones of them that are branched at most, in the order asked."""
    branches: PositiveInt = 8
    """Completions from the prefix of each."""
    gamma: float = 2.0
    """How strongly late prefixes are preferred."""
    model: PivotModel = PivotModel.logistic
    window: PositiveInt = 10_000
    """Newest branchings that the regression is fitted to, between steps."""
    min_feedback: PositiveInt = 11
    """Branchings before the regression is used; every prefix has the chance 1 until then."""
    coefficients: tuple[float, float] | None = None
    """(w, b) of the regression σ(w r + b), r = place over length; null: fitted during the run."""


@dataclass(kw_only=True)
class ContrastConfig(Section, key="algorithm.growth.contrast"):
    """Completions of the ends of trajectories until one turns out otherwise (BranPO)."""

    bases: PositiveInt = 8
    """Trajectories from the prompt whose ends are completed anew."""
    tries: PositiveInt = 2
    """Completions of a base at each depth."""
    depth: PositiveInt = 2
    """Most steps before its end where a base is continued."""
    hard_depth: PositiveInt = 3
    """The same for failures of an input most of whose bases fail."""
    solved_tries: NonNegativeInt = 1
    """Completions of a base, one step before its end, where all bases succeed."""
    long_tries: NonNegativeInt = 5
    """Completions of a successful base that is longer than others, `depth` steps before its end."""
    long_by: NonNegativeFloat = 0.1
    """Steps by which it must be longer than the mean of the successful ones."""


class Locate(Enum):
    """Who names the step before which a failed trajectory is resumed."""

    self = "self"
    """The current policy, asked once (SRPO)."""
    random = "random"
    """Every step is equally likely (RRPO)."""


@dataclass(kw_only=True)
class ResetConfig(Section, key="algorithm.growth.reset"):
    """Completions from before the first wrong step of one failed trajectory (SRPO, RRPO)."""

    roots: PositiveInt = 8
    """Trajectories from the prompt; the first failed one is resumed."""
    resets: PositiveInt = 8
    """Completions from before its wrong step."""
    locate: Locate = Locate.self
    """Who says which step was wrong."""
    temperature: PositiveFloat = 0.3
    """Temperature of the policy's answer when it is asked for its wrong step."""
    top_p: PositiveFraction = 0.95
    """Share of probability that this answer is sampled from."""
    max_tokens: PositiveInt = 4096
    """Most tokens of this answer."""


@dataclass(kw_only=True)
class DynamicSamplingConfig(Section, key="algorithm.growth.dynamic"):
    """Inputs without contrast are replaced by further inputs (DAPO): an input is trained on only if
    some of its trajectories succeed and some fail. Every grown input spends its whole budget."""

    max_batches: NonNegativeInt = 0
    """Most generation batches of a step; 0 turns the filter off."""
    batch_factor: PositiveInt = 1
    """Number of inputs of a generation batch, in units of trainer.inputs_per_step."""


@dataclass(kw_only=True)
class GrowthConfig(Section, key="algorithm.growth"):
    """How one input's budget becomes a tree."""

    rule: Annotated[str, Names(GrowthRule)] = "bel"
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of a rule of your own (docs/extending.md)."""
    n_total: Trajectories = 16
    """Completed trajectories per input: each one is a leaf, always exactly this many."""
    bel: BelConfig = field(default_factory=BelConfig)
    posterior: PosteriorConfig = field(default_factory=PosteriorConfig)
    entropy: EntropyBranchConfig = field(default_factory=EntropyBranchConfig)
    random: RandomBranchConfig = field(default_factory=RandomBranchConfig)
    pivot: PivotConfig = field(default_factory=PivotConfig)
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    reset: ResetConfig = field(default_factory=ResetConfig)
    dynamic: DynamicSamplingConfig = field(default_factory=DynamicSamplingConfig)
    max_tool_calls: list[NonNegativeInt] = field(default_factory=list)
    """Tool calls that a training episode may make, one number for each of equal stages of the run
    (ToRL, CIR); empty: task.max_turns alone decides. A task that cannot be solved with so few
    gets the fewest that it needs."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.options and not is_path(self.rule):
            yield "options", f"rule={self.rule} has none; its settings are keys of their own"
        remedy = f"start at most n_total={self.n_total} trajectories at the prompt"
        if self.rule == GrowthRule.entropy_branch and self.entropy.initial > self.n_total:
            yield "entropy.initial", remedy
        chains = self.random.chains
        if self.rule == GrowthRule.random_branch and self.random.trees * chains > self.n_total:
            yield "random.trees", f"{remedy}; each tree starts chains={chains} of them"
        starts = {
            GrowthRule.pivot: ("pivot.roots", self.pivot.roots),
            GrowthRule.contrast: ("contrast.bases", self.contrast.bases),
            GrowthRule.reset: ("reset.roots", self.reset.roots),
        }
        key, count = starts.get(self.rule, ("", 0))  # type: ignore[call-overload]
        if count > self.n_total:
            yield key, remedy
