"""Settings of the policy's model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any

from elpo_ray.config.rules import PositiveFloat, PositiveInt, Section, at_least


class Precision(Enum):
    """Number format of weights and activations."""

    fp32 = "fp32"
    """32 bits: on CPU, and where results must agree closely."""
    bf16 = "bf16"
    """16 bits with the range of fp32: on GPUs."""


class TinyArchitecture(Enum):
    """What a tiny model may be: the architectures on which engine and learner are compared."""

    qwen2 = "qwen2"
    """Qwen2 and Qwen2.5."""
    qwen3 = "qwen3"
    """Qwen3, with normalized queries and keys."""
    llama = "llama"
    """Llama 2 and 3."""
    mistral = "mistral"
    """Mistral, with a sliding window."""
    gemma3 = "gemma3"
    """Gemma 3, with sliding windows in most layers."""
    phi3 = "phi3"
    """Phi-3 and Phi-4."""
    glm4 = "glm4"
    """GLM-4."""
    olmo2 = "olmo2"
    """OLMo 2."""
    qwen3_moe = "qwen3_moe"
    """A mixture of four experts, of which a token takes two."""


ContextTokens = Annotated[int, at_least(16)]


@dataclass(kw_only=True)
class ModelConfig(Section, key="model"):
    """The policy: a Hugging Face folder or hub name, or a small one built for the task."""

    path: str | None = None
    """Folder or hub name of a causal LM with tokenizer and chat template; null = build `tiny`."""
    tool_parser: str | None = None
    """Reads the model's tool calls: hermes, harmony or the name of one of vLLM's tool parsers;
    null = the one that the chat template shows (docs/models.md)."""
    template_options: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template, as in {enable_thinking: false} or {reasoning_effort: low}."""
    max_context: ContextTokens = 20480
    """Tokens of prompt and episode together; also the engine's context window."""
    precision: Precision = Precision.bf16
    num_parameters: PositiveFloat | None = None
    """Used only for the memory that `check_only` prints, where the model's sizes are not known from
    a folder or its name; null = unknown then."""
    tiny: TinyModelConfig = field(default_factory=lambda: TinyModelConfig())


@dataclass(kw_only=True)
class TinyModelConfig(Section, key="model.tiny"):
    """The model that is built, with its tokenizer, when `model.path` is null."""

    architecture: TinyArchitecture = TinyArchitecture.qwen2
    vocab_size: PositiveInt = 512
    """Tokens of the vocabulary that the tokenizer learns from the task's demonstrations."""
    hidden_size: PositiveInt = 128
    """Width of a layer; a multiple of 32 times `num_heads`."""
    intermediate_size: PositiveInt = 384
    """Width inside the feed-forward part of a layer."""
    num_layers: PositiveInt = 4
    """Number of layers."""
    num_heads: PositiveInt = 4
    """Attention heads of a layer."""
    num_kv_heads: PositiveInt = 2
    """Heads of keys and values; must divide `num_heads`."""
    padded_vocab: PositiveInt | None = None
    """Rows of the embedding; those beyond the tokenizer's are never trained, as in large models
    whose shape is tried. null = as many as the tokenizer has tokens."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        unit = 32 * self.num_heads
        if self.hidden_size % unit:
            remedy = f"must be a multiple of 32 * num_heads={unit}"
            yield "hidden_size", f"{remedy}: vLLM on CPU has no attention for smaller heads"
        if self.padded_vocab is not None and self.padded_vocab < self.vocab_size:
            yield "padded_vocab", f"use vocab_size={self.vocab_size} or more, or null"
        if self.num_heads % self.num_kv_heads:
            yield "num_kv_heads", f"must divide num_heads={self.num_heads}"
        if self.architecture is TinyArchitecture.qwen3_moe and self.intermediate_size % 64:
            remedy = "must be a multiple of 64: an expert has half of it, and vLLM on CPU takes 32"
            yield "intermediate_size", f"{remedy} channels at once"
