"""The policy."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from elpo_ray.config.rules import require


class Precision(Enum):
    """Number format of weights and activations."""

    fp32 = "fp32"
    bf16 = "bf16"


@dataclass(kw_only=True)
class ModelConfig:
    """The policy: a Hugging Face folder or hub name, or a small one built for the task."""

    path: str | None = None
    """Folder or hub name of a causal LM with tokenizer and chat template; null = build `tiny`."""
    max_context: int = 20480
    """Tokens of prompt and episode together; also the engine's context window."""
    precision: Precision = Precision.bf16
    num_parameters: float | None = None
    """Only for the memory lines of `check_only`; null = counted from `tiny`, else unknown."""
    tiny: TinyModelConfig = field(default_factory=lambda: TinyModelConfig())

    def __post_init__(self) -> None:
        require(self.max_context >= 16, "model.max_context", self.max_context, "use 16 or more")


@dataclass(kw_only=True)
class TinyModelConfig:
    """Shape of the Qwen2 model that is built, with its tokenizer, when `model.path` is null."""

    vocab_size: int = 512
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            require(value >= 1, f"model.tiny.{key}", value, "use 1 or more")
        require(
            self.hidden_size % (32 * self.num_heads) == 0,
            "model.tiny.hidden_size",
            self.hidden_size,
            f"must be a multiple of 32 * num_heads={32 * self.num_heads}: vLLM on CPU has no "
            "attention for smaller heads",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            "model.tiny.num_kv_heads",
            self.num_kv_heads,
            f"must divide num_heads={self.num_heads}",
        )
