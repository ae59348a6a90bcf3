"""Tree attention by FlexAttention, its block mask computed from `subtree_end` without a T x T mask.

A block of queries sees a block of earlier keys if any of the keys' subtrees reaches beyond the
first query, and sees it whole if all of them reach beyond the last: two numbers a block decide.
FlexAttention has no backward pass on CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from elpo_ray.forest.layout import PackedForest

BLOCK = 128


class FlexPlan:
    """The block masks of one pack, one for each width of sliding window."""

    def __init__(self, packed: PackedForest, device: torch.device) -> None:
        self._of = packed, device
        self._masks: dict[int | None, BlockMask] = {}

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        if window not in self._masks:
            self._masks[window] = block_mask(*self._of, window)
        function: Callable[..., Any] = flex_attention
        if query.device.type == "cuda":
            function = _compiled()
        out: Tensor = function(
            *(t.transpose(0, 1)[None].contiguous() for t in (query, key, value)),
            block_mask=self._masks[window],
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out[0].transpose(0, 1)


def block_mask(packed: PackedForest, device: torch.device, window: int | None = None) -> BlockMask:
    """The mask  k <= q < subtree_end[k]  of T tokens, in blocks of BLOCK; with a window also
    depth(q) - depth(k) < window."""
    count = len(packed.ids)
    blocks = -(-count // BLOCK)
    # Padding beyond T sees nothing and is seen by nothing.
    ends = np.zeros(blocks * BLOCK, dtype=np.int32)
    ends[:count] = packed.subtree_end
    by_block = ends.reshape(blocks, BLOCK)
    first = np.arange(blocks)[:, None] * BLOCK
    earlier = np.tri(blocks, k=-1, dtype=np.bool_)
    some = earlier & (by_block.max(axis=1) > first)
    last = np.minimum(first + BLOCK, count)
    whole = earlier & (by_block.min(axis=1) >= last)
    depths = np.zeros(blocks * BLOCK, dtype=np.int32)
    depths[:count] = packed.positions
    if window is not None:
        deepest = np.maximum.reduceat(packed.positions, first[:, 0])
        highest = np.minimum.reduceat(packed.positions, first[:, 0])
        some &= highest[:, None] - deepest < window
        whole &= deepest[:, None] - highest < window
    partial = (some & ~whole) | np.eye(blocks, dtype=np.bool_)
    subtree_end, depth = torch.from_numpy(ends).to(device), torch.from_numpy(depths).to(device)

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (key <= query) & (query < subtree_end[key])
        return seen if window is None else seen & (depth[query] - depth[key] < window)

    return BlockMask.from_kv_blocks(
        *_ordered(partial, device),
        *_ordered(whole, device),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(count, count),
    )


def _ordered(chosen: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Counts and, chosen first, indices of the key blocks of every query block."""
    indices = np.argsort(~chosen, axis=1, kind="stable").astype(np.int32)
    counts = chosen.sum(axis=1).astype(np.int32)
    return (
        torch.from_numpy(counts)[None, None].to(device),
        torch.from_numpy(indices)[None, None].to(device),
    )


@cache
def _compiled() -> Callable[..., Tensor]:
    # dynamic: every pack has another length, and a compilation takes many seconds.
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=True)
    return compiled
