"""Tree attention by variable-length flash attention: each chain of the tree with its whole path.

An unbranched chain of tokens (a segment) is one sequence of queries whose keys are the segments on
its path and itself, so that causal masking aligned to the last key is exact. Keys and values are
gathered along the paths; their gradients come back by `_Gather`, which sums the copies of a token
in fp32 and in a fixed order, where plain indexing would add them in bf16 by atomics in any order.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from elpo_ray.forest.layout import PackedForest
from elpo_ray.forest.trees import IntArray


class PathPlan:
    """The segments of one pack and the gathered keys of each."""

    def __init__(self, query_starts: IntArray, keys: IntArray, key_starts: IntArray) -> None:
        self.query_starts = torch.from_numpy(query_starts)
        """First query of each segment, and T. Shape: [S + 1], int32."""
        self.key_starts = torch.from_numpy(key_starts)
        """First gathered key of each segment, and K. Shape: [S + 1], int32."""
        self.longest_query = int(np.diff(query_starts).max())
        self.longest_key = int(np.diff(key_starts).max())
        alone = len(keys) == query_starts[-1]
        self.keys = None if alone else torch.from_numpy(keys.astype(np.int64))
        """Places of the gathered keys, [K]; None if every segment is a whole sequence."""
        self.rounds = [] if alone else _rounds(keys)

    @classmethod
    def of(cls, packed: PackedForest, device: torch.device) -> PathPlan:
        starts, parents = packed.segments
        paths: list[IntArray] = []
        for segment, parent in enumerate(parents):
            own = np.arange(starts[segment], starts[segment + 1], dtype=np.int32)
            paths.append(own if parent < 0 else np.concatenate([paths[parent], own]))
        key_starts = np.cumsum([0, *map(len, paths)]).astype(np.int32)
        plan = cls(starts, np.concatenate(paths), key_starts)
        plan.query_starts = plan.query_starts.to(device)
        plan.key_starts = plan.key_starts.to(device)
        plan.keys = None if plan.keys is None else plan.keys.to(device)
        plan.rounds = [(rows.to(device), copies.to(device)) for rows, copies in plan.rounds]
        return plan

    def gather(self, tokens: Tensor) -> Tensor:
        """Keys or values [T, H, D] along the paths: [K, H, D]."""
        if self.keys is None:
            return tokens
        out: Tensor = _Gather.apply(tokens, self)  # type: ignore[no-untyped-call]
        return out

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        out = varlen_attn(
            query.contiguous(),
            self.gather(key.contiguous()),
            self.gather(value.contiguous()),
            self.query_starts,
            self.key_starts,
            self.longest_query,
            self.longest_key,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),
            **_sharing_of_heads(varlen_attn, query.shape[1] != key.shape[1]),
        )
        assert isinstance(out, Tensor)
        return out


@cache
def _sharing_of_heads(function: Callable[..., Any], wanted: bool) -> dict[str, Any]:
    """The argument that lets several query heads share a key head. torch 2.11 has none: there the
    kernel groups heads by itself."""
    known = "enable_gqa" in inspect.signature(function).parameters
    return {"enable_gqa": wanted} if known else {}


def _rounds(keys: IntArray) -> list[tuple[Tensor, Tensor]]:
    """Round r holds the tokens with more than r copies and the place of each one's r-th copy."""
    order = np.argsort(keys, kind="stable")
    counts = np.bincount(keys)
    firsts = np.cumsum(counts) - counts
    rounds: list[tuple[Tensor, Tensor]] = []
    for number in range(int(counts.max())):
        rows = np.flatnonzero(counts > number)
        copies = order[firsts[rows] + number]
        rounds.append((torch.from_numpy(rows), torch.from_numpy(copies)))
    return rounds


class _Gather(torch.autograd.Function):
    """tokens [T, H, D] -> [K, H, D]."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, plan: PathPlan) -> Tensor:
        assert plan.keys is not None
        ctx.plan, ctx.shape = plan, tokens.shape
        return tokens.index_select(0, plan.keys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        wide = torch.promote_types(grads[0].dtype, torch.float32)
        total = torch.zeros(ctx.shape, dtype=wide, device=grads[0].device)
        for rows, copies in ctx.plan.rounds:
            # A round's rows differ from each other: no order of additions is left open.
            total.index_add_(0, rows, grads[0].index_select(0, copies).to(wide))
        return total.to(grads[0].dtype), None
