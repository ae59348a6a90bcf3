"""Attention over tokens laid out as a forest (`forest.layout`), inside any Hugging Face model.

The model is loaded with the attention implementation `IMPLEMENTATION`, which hands queries, keys
and values, rotated already, to the `AttentionPlan` that came with the call. Invariants: a query
sees the keys k <= query < subtree_end[k] and no others, whatever the backend; without a plan the
implementation raises, and tree positions under a stock implementation are refused by the policy:
that would read them as packed documents and silently mask wrongly.

Backends: `blocks` (SDPA; CPU, any precision, the reference), `paths` (variable-length flash
attention; CUDA, half precision), `flex` (FlexAttention; CUDA, on request).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from elpo_ray.config.learner import AttentionBackend
from elpo_ray.config.rules import require
from elpo_ray.forest.layout import PackedForest
from elpo_ray.learner.attention.blocks import BlockPlan
from elpo_ray.learner.attention.flex import FlexPlan
from elpo_ray.learner.attention.paths import PathPlan

IMPLEMENTATION = "elpo_tree"
"""Name in transformers' registry. It has no mask function: the plan is the mask."""

_UNKNOWN = ("softcap", "s_aux", "sliding_window", "position_bias", "cu_seq_lens_q")
"""Keyword arguments with which a model asks for another attention than the plain one."""

MAX_HEAD = 256
"""Widest head of flash attention."""


class AttentionPlan(Protocol):
    """The visibility of one pack, prepared for its backend."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [T, H, D], key and value [T, H_kv, D] -> [T, H, D]."""
        ...


def make_plan(
    backend: AttentionBackend, packed: PackedForest, device: torch.device, dtype: torch.dtype
) -> AttentionPlan:
    """Prepare a backend for one pack."""
    if backend is AttentionBackend.paths:
        return PathPlan.of(packed, device)
    if backend is AttentionBackend.flex:
        return FlexPlan.of(packed, device)
    return BlockPlan.of(packed, device, dtype)


def choose_backend(
    asked: AttentionBackend, head_dim: int, device: torch.device, dtype: torch.dtype
) -> AttentionBackend:
    """The backend that `asked` means here. Raises ValueError where it cannot run."""
    flash = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    if asked is AttentionBackend.auto:
        narrow = flash and head_dim <= MAX_HEAD
        return AttentionBackend.paths if narrow else AttentionBackend.blocks
    require(
        flash or asked is not AttentionBackend.paths,
        "learner.attention",
        asked.value,
        f"flash attention needs a GPU and bf16, not {device.type} and {dtype}; use auto",
    )
    require(
        device.type == "cuda" or asked is not AttentionBackend.flex,
        "learner.attention",
        asked.value,
        "FlexAttention has no backward pass on CPU; use auto",
    )
    return asked


def why_not(model_class: type[PreTrainedModel], config: PretrainedConfig) -> str | None:
    """Why a model cannot be trained on trees, in words, or None if it can."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    window = getattr(text, "sliding_window", None)
    reasons = {
        f"it has {', '.join(sorted(kinds))} layers": bool(kinds),
        "its attention cannot be replaced": not model_class._supports_attention_backend,
        "it carries a recurrent state": model_class._is_stateful,
        f"its attention slides over {window} tokens": (
            window is not None and not getattr(text, "layer_types", None)
        ),
        "it uses ALiBi": bool(getattr(text, "alibi", False)),
        "its attention logits are capped": bool(getattr(text, "attn_logit_softcapping", None)),
        "its rotary embedding depends on the longest sequence of a batch": (
            rope.get("rope_type") in ("dynamic", "longrope")
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree_plan: AttentionPlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [1, H, T, D], key and value [1, H_kv, T, D] ->
    [1, T, H, D]. Raises ValueError on what the plan does not stand for."""
    if tree_plan is None:
        raise ValueError(f"attention {IMPLEMENTATION!r} needs a tree_plan; the model passed none")
    unknown = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if unknown or dropout or attention_mask is not None or hasattr(module, "sinks"):
        what = unknown or (["dropout"] if dropout else ["a mask or sinks"])
        raise ValueError(
            f"{type(module).__name__} asks for {', '.join(what)}, which tree attention does not "
            "have; use learner.packing=flat"
        )
    out = tree_plan.attend(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        query.shape[-1] ** -0.5 if scaling is None else scaling,
    )
    return out[None], None


AttentionInterface.register(IMPLEMENTATION, tree_attention)
