"""How the budget of one input is spent, and which inputs are trained on."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from elpo_ray.config.rules import require


class GrowthRule(Enum):
    """How one input's budget becomes a tree (`elpo_ray.growth`, one file a rule)."""

    bel = "bel"
    independent = "independent"
    entropy_branch = "entropy_branch"
    random_branch = "random_branch"


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
class EntropyBranchConfig:
    """Branching where the entropy after a tool response rises (ARPO, AEPO)."""

    initial: int = 8
    """Trajectories from the prompt before anything branches."""
    monitor: bool = False
    """The first trajectory decides instead of `initial` how many start at the prompt: one plus
    n_total * sigmoid(monitor_beta * (H_root - H_tool)), rounded down (AEPO)."""
    monitor_beta: float = 0.5
    beam: int = 2
    """A trajectory may be copied beam - 1 times after each tool response."""
    branch_probability: float = 0.5
    """Of one copy where the entropy is that of the trajectory's first turn."""
    entropy_weight: float = 0.2
    """Added to the probability per unit of the entropy's rise."""
    penalty: float = 0.0
    """Share of the draw that is lost per branching in a row of the same input (AEPO)."""
    threshold: float | None = None
    """Branch exactly where branch_probability + entropy_weight * rise is above it, without a draw
    (the paper of ARPO); null = draw at random (its code)."""
    entropy_tokens: int = 20
    """Tokens at a turn's start whose entropies are summed."""
    vocab_size: int = 151643
    """The entropy's unit is the logarithm of this; Qwen2.5's vocabulary."""

    def __post_init__(self) -> None:
        key = "algorithm.growth.entropy."
        for name in ("initial", "beam", "entropy_tokens"):
            require(getattr(self, name) >= 1, key + name, getattr(self, name), "use at least 1")
        require(self.vocab_size >= 2, key + "vocab_size", self.vocab_size, "use at least 2")
        for name in ("branch_probability", "penalty"):
            value = getattr(self, name)
            require(0 <= value <= 1, key + name, value, "use a value in [0, 1]")


@dataclass(kw_only=True)
class RandomBranchConfig:
    """Branching at prefixes drawn at random (Tree-GRPO); the budget left after the chains is dealt
    out evenly over rounds and trees."""

    trees: int = 4
    """Trees per input, M: branching prefixes and one term of the advantage stay within a tree."""
    chains: int = 1
    """Trajectories from the prompt with which each tree starts."""
    rounds: int = 1
    """Rounds of expansions, L; one round draws from the nodes that it found."""

    def __post_init__(self) -> None:
        for name in ("trees", "chains", "rounds"):
            value = getattr(self, name)
            require(value >= 1, f"algorithm.growth.random.{name}", value, "use at least 1")


@dataclass(kw_only=True)
class DynamicSamplingConfig:
    """Inputs without contrast are replaced by further inputs (DAPO): an input is trained on only if
    some of its trajectories succeed and some fail. Every grown input spends its whole budget."""

    max_batches: int = 0
    """Generation batches a step at most; 0 turns the filter off."""
    batch_factor: int = 1
    """Inputs of a generation batch, in units of trainer.inputs_per_step."""

    def __post_init__(self) -> None:
        key = "algorithm.growth.dynamic."
        require(self.max_batches >= 0, key + "max_batches", self.max_batches, "use 0 or more")
        require(self.batch_factor >= 1, key + "batch_factor", self.batch_factor, "use 1 or more")


@dataclass(kw_only=True)
class GrowthConfig:
    """How one input's budget becomes a tree."""

    rule: GrowthRule = GrowthRule.bel
    n_total: int = 16
    """Completed trajectories per input: each one is a leaf, always exactly this many."""
    bel: BelConfig = field(default_factory=BelConfig)
    entropy: EntropyBranchConfig = field(default_factory=EntropyBranchConfig)
    random: RandomBranchConfig = field(default_factory=RandomBranchConfig)
    dynamic: DynamicSamplingConfig = field(default_factory=DynamicSamplingConfig)
    max_tool_calls: list[int] = field(default_factory=list)
    """Tool calls that a training episode may make, one number for each of equal stages of the run
    (ToRL, CIR); empty: task.max_turns alone decides. A task that cannot be solved with so few
    gets the fewest that it needs."""

    def __post_init__(self) -> None:
        require(
            self.n_total >= 2,
            "algorithm.growth.n_total",
            self.n_total,
            "an advantage needs at least 2 trajectories; use 2 or more",
        )
        roots = {
            GrowthRule.entropy_branch: ("entropy.initial", self.entropy.initial),
            GrowthRule.random_branch: ("random.trees", self.random.trees * self.random.chains),
        }
        key, started = roots.get(self.rule, ("", 0))
        require(
            started <= self.n_total,
            f"algorithm.growth.{key}",
            started,
            f"start at most n_total={self.n_total} trajectories at the prompt",
        )
        require(
            all(limit >= 0 for limit in self.max_tool_calls),
            "algorithm.growth.max_tool_calls",
            list(self.max_tool_calls),
            "use 0 or more for each stage",
        )
