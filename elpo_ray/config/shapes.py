"""The shape of a model and its number of parameters, without its weights and without torch.

A folder's `config.json` is read, and the hub names below are known; else the shape is guessed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elpo_ray.config.model import ModelConfig, TinyArchitecture, TinyModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of a decoder-only transformer with a gated MLP."""

    hidden: int
    intermediate: int
    """Neurons of the MLP that a token goes through: in a mixture, of its active experts."""
    layers: int
    query: int
    """Query heads times their width."""
    key: int
    """Key heads times their width; values have as much."""
    vocabulary: int
    parameters: float
    active: float
    """Parameters that a token is multiplied with, output head included, embedding not."""
    heads: int = 0
    """Query heads; 0 where the shape was guessed."""
    key_heads: int = 0
    """Heads of keys and values; 0 where the shape was guessed."""
    exact: bool = True
    """False where the shape was guessed from the number of parameters."""

    @classmethod
    def of(cls, raw: dict[str, Any]) -> ModelShape:
        """From the keys of a `config.json`. Raises KeyError where one of them is missing."""
        raw = raw.get("text_config", raw)
        hidden, layers = int(raw["hidden_size"]), int(raw["num_hidden_layers"])
        heads, vocabulary = int(raw["num_attention_heads"]), int(raw["vocab_size"])
        width = int(raw.get("head_dim") or hidden // heads)
        query, key = heads * width, int(raw.get("num_key_value_heads") or heads) * width
        experts = next((raw[k] for k in _EXPERTS if raw.get(k)), 0)
        inner = int(raw.get("moe_intermediate_size") or raw["intermediate_size"])
        chosen = int(raw.get("num_experts_per_tok") or 1) if experts else 1
        attention = hidden * (2 * query + 2 * key) + 2 * hidden
        if raw.get("model_type") == "qwen2":
            attention += query + 2 * key  # biases
        expert, router = 3 * hidden * inner, hidden * int(experts)
        blocks = layers * (attention + router + max(1, int(experts)) * expert) + hidden
        tied = bool(raw.get("tie_word_embeddings", False))
        table = vocabulary * hidden
        return cls(
            hidden=hidden,
            intermediate=chosen * inner,
            layers=layers,
            query=query,
            key=key,
            vocabulary=vocabulary,
            parameters=blocks + table * (1 if tied else 2),
            active=layers * (attention + router + chosen * expert) + hidden + table,
            heads=heads,
            key_heads=key // width,
        )

    @classmethod
    def guess(cls, parameters: float) -> ModelShape:
        """A transformer of 12 * width**2 parameters a layer, as many layers as width / 128, and a
        key head for every query head."""
        width = max(128, round(math.cbrt(parameters * 128 / 12)))
        return cls(
            hidden=width,
            intermediate=8 * width // 3,
            layers=max(1, width // 128),
            query=width,
            key=width,
            vocabulary=150_000,
            parameters=parameters,
            active=parameters,
            exact=False,
        )

    def divides(self, tensor: int) -> bool:
        """Whether vLLM can spread the heads over so many GPUs: evenly, or the heads of keys and
        values as equal copies where there are fewer of them. True where the heads are not known."""
        if not self.exact:
            return True
        spread = self.key_heads % tensor == 0 or tensor % self.key_heads == 0
        return self.heads % tensor == 0 and spread

    def cache_bytes(self, width: int) -> int:
        """Bytes of one token's keys and values in numbers of `width` bytes."""
        return 2 * self.layers * self.key * width


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")

_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings", "model_type",
)  # fmt: skip
PUBLISHED = {
    "Qwen2.5-0.5B": (896, 4864, 24, 14, 2, 64, 151936, True, "qwen2"),
    "Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, 128, 151936, True, "qwen2"),
    "Qwen2.5-3B": (2048, 11008, 36, 16, 2, 128, 151936, True, "qwen2"),
    "Qwen2.5-7B": (3584, 18944, 28, 28, 4, 128, 152064, False, "qwen2"),
    "Qwen2.5-14B": (5120, 13824, 48, 40, 8, 128, 152064, False, "qwen2"),
    "Qwen2.5-32B": (5120, 27648, 64, 40, 8, 128, 152064, False, "qwen2"),
    "Qwen3-1.7B": (2048, 6144, 28, 16, 8, 128, 151936, True, "qwen3"),
    "Qwen3-4B": (2560, 9728, 36, 32, 8, 128, 151936, True, "qwen3"),
    "Qwen3-8B": (4096, 12288, 36, 32, 8, 128, 151936, False, "qwen3"),
    "Llama-3.1-8B": (4096, 14336, 32, 32, 8, 128, 128256, False, "llama"),
}
"""Published sizes by the model's name, without the owner and what follows the number of
parameters."""


def published(name: str) -> ModelShape:
    """The shape of a model of `PUBLISHED`."""
    return ModelShape.of(dict(zip(_KEYS, PUBLISHED[name], strict=True)))


def shape_of(model: ModelConfig) -> ModelShape | None:
    """The shape of the policy; None where nothing is known of it. A given `num_parameters` counts
    where there is no `config.json`."""
    if model.path is None:
        return tiny_shape(model.tiny)
    file = Path(model.path) / "config.json"
    if file.is_file():
        try:
            return ModelShape.of(json.loads(file.read_text(encoding="utf-8")))
        except (KeyError, TypeError, ValueError):  # `check_model` says what is wrong with it
            return None if model.num_parameters is None else ModelShape.guess(model.num_parameters)
    name = model.path.rpartition("/")[2]
    known = [key for key in PUBLISHED if name == key or name.startswith(f"{key}-")]
    if known:
        return published(max(known, key=len))
    return None if model.num_parameters is None else ModelShape.guess(model.num_parameters)


def tensor_conflicts(model: ModelConfig, tensor: int) -> Iterator[tuple[str, str]]:
    """(key, remedy) where the heads of a model that is known cannot be spread over so many GPUs."""
    shape = None if tensor == 1 else shape_of(model)
    if shape is not None and not shape.divides(tensor):
        heads = f"{shape.heads} heads and {shape.key_heads} of keys and values"
        fitting = ", ".join(str(n) for n in range(1, 17) if shape.divides(n))
        yield "engine.tensor_parallel_size", f"the model has {heads}; use one of {fitting}"


def tiny_shape(tiny: TinyModelConfig) -> ModelShape:
    """The shape of the model that is built, as a Qwen2 unless it is a mixture of experts."""
    raw: dict[str, Any] = {
        "hidden_size": tiny.hidden_size,
        "intermediate_size": tiny.intermediate_size,
        "num_hidden_layers": tiny.num_layers,
        "num_attention_heads": tiny.num_heads,
        "num_key_value_heads": tiny.num_kv_heads,
        "vocab_size": tiny.padded_vocab or tiny.vocab_size,
        "tie_word_embeddings": True,
        "model_type": "qwen2",
    }
    if tiny.architecture is TinyArchitecture.qwen3_moe:
        raw |= {"num_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}
        raw["moe_intermediate_size"] = tiny.intermediate_size // 2
    return ModelShape.of(raw)
