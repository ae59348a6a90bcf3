"""Optimization: the learner, its optimizer, the cold start."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from elpo_ray.config.rules import require


class Schedule(Enum):
    """Learning-rate schedule after the warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Packing(Enum):
    """How the sequences of a tree go through the model."""

    tree = "tree"
    """Shared prefixes once, where that is faster and the model allows it."""
    flat = "flat"
    """Every leaf as a sequence of its own."""


class AttentionBackend(Enum):
    """What computes attention over packed sequences and trees."""

    auto = "auto"
    """paths on a GPU in bf16, else blocks."""
    blocks = "blocks"
    """Scaled dot products of query blocks with gathered keys; any device, the reference."""
    paths = "paths"
    """Variable-length flash attention, keys gathered along each path; GPU, bf16."""
    flex = "flex"
    """Compiled FlexAttention with a block mask; GPU."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    schedule: Schedule = Schedule.constant
    warmup_ratio: float = 0.0
    """Share of the optimizer steps over which the rate grows linearly from 0."""
    grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""

    def __post_init__(self) -> None:
        require(self.lr > 0, "learner.optimizer.lr", self.lr, "use a value above 0")
        require(
            all(0 <= b < 1 for b in self.betas),
            "learner.optimizer.betas",
            tuple(self.betas),
            "use values in [0, 1)",
        )
        require(
            0 <= self.warmup_ratio <= 1,
            "learner.optimizer.warmup_ratio",
            self.warmup_ratio,
            "use a value in [0, 1]",
        )
        require(
            self.grad_norm > 0, "learner.optimizer.grad_norm", self.grad_norm, "use a value above 0"
        )


@dataclass(kw_only=True)
class LoraConfig:
    """Low-rank adapters: W + alpha / rank * B A is trained with W frozen. No dropout: old and new
    log-probabilities must come from one function."""

    rank: int | None = None
    """null = no adapters, all weights are trained."""
    alpha: int = 32
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Ends of module names, such as q_proj; all-linear = every linear layer but the output head."""

    def __post_init__(self) -> None:
        require(
            self.rank is None or self.rank >= 1,
            "learner.lora.rank",
            self.rank,
            "use 1 or more, or null to train all weights",
        )
        require(self.alpha >= 1, "learner.lora.alpha", self.alpha, "use 1 or more")
        require(
            bool(self.target_modules)
            and (len(self.target_modules) == 1 or "all-linear" not in self.target_modules),
            "learner.lora.target_modules",
            self.target_modules,
            "name modules, such as [q_proj, v_proj], or use [all-linear]",
        )


@dataclass(kw_only=True)
class LearnerConfig:
    """How the policy is trained under DeepSpeed."""

    zero_stage: int = 3
    """ZeRO stage 0-3: what is sharded over the learner's ranks."""
    minibatch_inputs: int = 16
    """Inputs (trees) per optimizer step."""
    epochs: int = 1
    """Passes over the trees of one step."""
    max_tokens_per_pack: int = 32768
    """Token budget of one forward pass on one rank."""
    packing: Packing = Packing.tree
    attention: AttentionBackend = AttentionBackend.auto
    gradient_checkpointing: bool = False
    offload_optimizer: bool = False
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    @property
    def adapters(self) -> LoraConfig | None:
        """What is trained instead of all weights."""
        return None if self.lora.rank is None else self.lora

    def __post_init__(self) -> None:
        require(
            self.zero_stage in (0, 1, 2, 3),
            "learner.zero_stage",
            self.zero_stage,
            "use 0, 1, 2 or 3",
        )
        for key in ("minibatch_inputs", "epochs", "max_tokens_per_pack"):
            require(getattr(self, key) >= 1, f"learner.{key}", getattr(self, key), "use 1 or more")


@dataclass(kw_only=True)
class ColdStartConfig:
    """Supervised training on the task's demonstrations before RL, by the same learner."""

    enabled: bool = False
    epochs: int = 1
    batch_size: int = 32
    """Demonstrations per optimizer step."""
    max_tokens: int | None = None
    """Longest demonstration; null = model.max_context."""
    cut_longer: bool = False
    """Train on the first `max_tokens` of a longer one, as the paper's recipe does; else leave it
    out."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            lr=1e-5, betas=(0.9, 0.95), schedule=Schedule.cosine, warmup_ratio=0.1
        )
    )
    cache: str = "runs/cache/cold_start"
    """Folder of finished cold starts, keyed by everything that determines them."""

    def __post_init__(self) -> None:
        for key in ("epochs", "batch_size", "max_tokens"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"cold_start.{key}", value, "use 1 or more")
