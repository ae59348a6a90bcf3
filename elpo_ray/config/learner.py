"""Optimization: the learner, its optimizer, the cold start."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

from elpo_ray.config.rules import (
    Fraction,
    PositiveFloat,
    PositiveInt,
    Section,
    at_least,
    between,
)


class LrSchedule(Enum):
    """Learning-rate schedule after the warm-up."""

    constant = "constant"
    """The rate stays the same."""
    linear = "linear"
    """The rate falls on a straight line to 0 at the last step."""
    cosine = "cosine"
    """The rate falls on half a cosine wave to 0 at the last step."""


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


Decay = Annotated[float, between(0, 1, "use values in [0, 1)", ends="[)")]


@dataclass(kw_only=True)
class OptimizerConfig(Section):
    """AdamW and its schedule."""

    lr: PositiveFloat = 1e-6
    """Learning rate after the warm-up."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's decay rates of the two moments."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    schedule: LrSchedule = LrSchedule.constant
    warmup_ratio: Fraction = 0.0
    """Share of the optimizer steps over which the rate grows linearly from 0."""
    grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this norm."""


Rank = Annotated[int, at_least(1, "use 1 or more, or null to train all weights")]


@dataclass(kw_only=True)
class LoraConfig(Section, key="learner.lora"):
    """Low-rank adapters: W + alpha / rank * B A is trained with W frozen. No dropout: old and new
    log-probabilities must come from one function."""

    rank: Rank | None = None
    """null = no adapters, all weights are trained."""
    alpha: PositiveInt = 32
    """The adapters' product is multiplied by alpha / rank."""
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Ends of module names, such as q_proj; all-linear = every linear layer but the output head."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if not self.target_modules or (
            len(self.target_modules) > 1 and "all-linear" in self.target_modules
        ):
            yield "target_modules", "name modules, such as [q_proj, v_proj], or use [all-linear]"


@dataclass(kw_only=True)
class LearnerConfig(Section, key="learner"):
    """How the policy is trained under DeepSpeed."""

    zero_stage: Annotated[int, between(0, 3, "use 0, 1, 2 or 3")] = 3
    """ZeRO stage 0-3: what is sharded over the learner's ranks."""
    minibatch_inputs: PositiveInt = 16
    """Inputs (trees) per optimizer step."""
    epochs: PositiveInt = 1
    """Passes over the trees of one step."""
    max_tokens_per_pack: PositiveInt = 32768
    """Token budget of one forward pass on one rank."""
    packing: Packing = Packing.tree
    attention: AttentionBackend = AttentionBackend.auto
    gradient_checkpointing: bool | None = None
    """Activations are computed again in the backward pass, which saves memory and costs time.
    null = on GPUs, for a model that `model.path` names."""
    offload_optimizer: bool = False
    """The optimizer's states lie in host memory and the optimizer runs on the CPU."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    @property
    def adapters(self) -> LoraConfig | None:
        """What is trained instead of all weights."""
        return None if self.lora.rank is None else self.lora


@dataclass(kw_only=True)
class ColdStartConfig(Section, key="cold_start"):
    """Supervised training on the task's demonstrations before RL, by the same learner."""

    enabled: bool = False
    """A run begins with the cold start."""
    epochs: PositiveInt = 1
    """Passes over the demonstrations."""
    batch_size: PositiveInt = 32
    """Demonstrations per optimizer step."""
    steps: PositiveInt | None = None
    """It stops after so many optimizer steps, before its epochs are over; null: it does not. The
    rate's schedule ends there too."""
    max_tokens: PositiveInt | None = None
    """Longest demonstration; null = model.max_context."""
    cut_longer: bool = False
    """A longer demonstration is cut to its first `max_tokens`, as in the paper's recipe; else it is
    left out."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            lr=1e-5, betas=(0.9, 0.95), schedule=LrSchedule.cosine, warmup_ratio=0.1
        )
    )
    cache: str = "runs/cache/cold_start"
    """Folder of finished cold starts, keyed by everything that determines them."""
