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
from transformers import AttentionInterface

from elpo_ray.config.learner import AttentionBackend
from elpo_ray.config.rules import require
from elpo_ray.forest.layout import PackedForest
from elpo_ray.learner.attention.blocks import BlockPlan
from elpo_ray.learner.attention.flex import FlexPlan
from elpo_ray.learner.attention.paths import PathPlan

IMPLEMENTATION = "elpo_tree"
"""Name in transformers' registry. It has no mask function: the plan is the mask."""

_UNKNOWN = ("softcap", "s_aux", "position_bias", "cu_seq_lens_q")
"""Keyword arguments with which a model asks for another attention than the plain one."""

MAX_HEAD = 256
"""Widest head of flash attention."""


class AttentionPlan(Protocol):
    """The visibility of one pack, prepared for its backend."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """query [T, H, D], key and value [T, H_kv, D] -> [T, H, D]. With a `window` a query sees
        the last so many tokens of its path only, itself among them."""
        ...


def make_plan(
    backend: AttentionBackend, packed: PackedForest, device: torch.device, dtype: torch.dtype
) -> AttentionPlan:
    """Prepare a backend for one pack."""
    if backend is AttentionBackend.paths:
        return PathPlan.of(packed, device)
    if backend is AttentionBackend.flex:
        return FlexPlan(packed, device)
    return BlockPlan(packed, device, dtype)


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


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree_plan: AttentionPlan | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [1, H, T, D], key and value [1, H_kv, T, D] ->
    [1, T, H, D]. Raises ValueError on what the plan does not stand for, and where a layer that
    slides by the configuration does not say so: transformers would tell it by the mask."""
    if tree_plan is None:
        raise ValueError(f"attention {IMPLEMENTATION!r} needs a tree_plan; the model passed none")
    unknown = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if unknown or dropout or attention_mask is not None or hasattr(module, "sinks"):
        what = unknown or (["dropout"] if dropout else ["a mask or sinks"])
        raise ValueError(
            f"{type(module).__name__} asks for {', '.join(what)}, which tree attention does not "
            "have; choose another model"
        )
    window = _configured_window(module)
    if window != sliding_window:
        raise ValueError(
            f"{type(module).__name__} asks for a window of {sliding_window} tokens where its "
            f"configuration says {window}; choose another model"
        )
    out = tree_plan.attend(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window,
    )
    return out[None], None


def _configured_window(module: nn.Module) -> int | None:
    """Over how many tokens a layer slides, by its model's configuration."""
    config: Any = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[module.layer_idx] != "sliding_attention":
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


AttentionInterface.register(IMPLEMENTATION, tree_attention)
