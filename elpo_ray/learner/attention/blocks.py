"""Tree attention by scaled dot products: blocks of queries against the keys that they can see.

A block is a run of queries of one tree. Whatever any of them sees is either on the path of its
first token or in the block itself, so a block of B queries at depth d needs d + B keys: they are
gathered, and blocks of like size share one call. The run with which a tree begins (prompt and first
trajectory, or a whole flat sequence) is one block under plain causal masking; layers with a sliding
window have blocks of their own, whose keys end where the window does. Invariants: gathered
keys live for one call only and are gathered again in the backward pass; their gradients are summed
in fp32 or wider, always in the same order; a token's result depends on no token that it does not
see, to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from elpo_ray.forest.layout import PackedForest
from elpo_ray.forest.trees import IntArray

BLOCK_SIZES = (32, 64, 128, 256)
KEY_COST = 48
"""Work of gathering one key and scattering its gradient, in (query, key) pairs; measured."""
PADDING = (1.25, 16)
"""A group's longest key list may exceed its shortest by this factor and addend."""
GROUP_KEYS = 1 << 16
"""Most gathered keys of one call."""


@dataclass(frozen=True, eq=False)
class _Group:
    """G blocks that one call serves: B queries and K keys each, both padded."""

    count: int
    """G."""
    width: int
    """B."""
    keys: Tensor
    """Places of the keys, 0 for padding. Shape: [G * K]."""
    mask: Tensor | None
    """0 where the query sees the key, else -inf, [G, 1, B, K]; None = causal, K = B."""

    def gather(self, tokens: Tensor) -> Tensor:
        """keys or values [T, H, D] -> [G, H, K, D]."""
        gathered = tokens.index_select(0, self.keys)
        return gathered.view(self.count, -1, *tokens.shape[1:]).transpose(1, 2)

    def add(self, total: Tensor, grad: Tensor) -> None:
        """Add gradients of `gather`'s result to those of its argument."""
        total.index_add_(0, self.keys, grad.transpose(1, 2).flatten(0, 1).to(total.dtype))


class BlockPlan:
    """The blocks of one pack, for layers that see whole paths or, with a window, their ends."""

    def __init__(
        self,
        packed: PackedForest,
        device: torch.device,
        dtype: torch.dtype,
        window: int | None = None,
    ) -> None:
        """`window`: a query sees so many tokens of its path, itself the last of them."""
        self._of = packed, device, dtype
        self._windowed: dict[int, BlockPlan] = {}
        self.groups: list[_Group] = []
        starts, ends, causal = _divide(packed, window)
        first = _first_seen(packed, starts, window)
        sizes = packed.positions[starts] - first + (ends - starts)
        count = np.arange(len(packed.ids))
        runs = np.maximum.accumulate(np.where(packed.previous == count - 1, 0, count))
        places = np.empty(len(packed.ids), dtype=np.int64)
        at = 0
        for members in (*_alike(sizes, causal), *_alike(sizes, ~causal)):
            width = int((ends - starts)[members].max())
            keys = np.zeros((len(members), int(sizes[members].max())), dtype=np.int64)
            plain = bool(causal[members[0]])
            seen = np.zeros((len(members), 0 if plain else width, keys.shape[1]), dtype=np.bool_)
            for i, block in enumerate(members):
                own = np.arange(starts[block], ends[block])
                above = _above(packed, int(own[0]), runs)[first[block] :]
                visible = np.concatenate([above, own])
                keys[i, : len(visible)] = visible
                places[own] = np.arange(at, at + len(own))
                at += width
                if not plain:
                    seen[i, : len(own), : len(visible)] = _visible(packed, own, visible, window)
                    seen[i, len(own) :, 0] = True  # a softmax over nothing is not a number
            mask = None if plain else _additive(seen, dtype).to(device)
            where = torch.from_numpy(keys.ravel()).to(device)
            self.groups.append(_Group(len(members), width, where, mask))
        self.places = torch.from_numpy(places).to(device)
        """Place of each token in the padded blocks of all groups, one after the other.
        Shape: [T]."""
        self.padded = at
        self._longest = int(packed.positions.max()) + 1

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        plan = self
        if window is not None and window < self._longest:
            if window not in self._windowed:
                self._windowed[window] = BlockPlan(*self._of, window)
            plan = self._windowed[window]
        out: Tensor = _BlockAttention.apply(  # type: ignore[no-untyped-call]
            query, key, value, plan, scale
        )
        return out

    def blocks(self, tokens: Tensor) -> Iterator[Tensor]:
        """tokens [T, H, D] -> each group's [G, H, B, D], zero where padded."""
        padded = tokens.new_zeros((self.padded, *tokens.shape[1:]))
        padded.index_copy_(0, self.places, tokens)
        at = 0
        for group in self.groups:
            size = group.count * group.width
            part = padded[at : at + size].view(group.count, group.width, *tokens.shape[1:])
            yield part.transpose(1, 2)
            at += size

    def tokens(self, blocks: list[Tensor]) -> Tensor:
        """Back from `blocks`."""
        flat = [block.transpose(1, 2).flatten(0, 1) for block in blocks]
        return torch.cat(flat).index_select(0, self.places)


def _additive(seen: NDArray[np.bool_], dtype: torch.dtype) -> Tensor:
    """[G, B, K] -> [G, 1, B, K]."""
    mask = torch.zeros(seen.shape, dtype=dtype)
    return mask.masked_fill_(torch.from_numpy(~seen), float("-inf"))[:, None]


def _first_seen(packed: PackedForest, starts: IntArray, window: int | None) -> IntArray:
    """The least depth that any query of each block sees. Shape: [blocks]."""
    if window is None:
        return np.zeros(len(starts), dtype=np.int32)
    first: IntArray = np.minimum.reduceat(packed.positions, starts) - np.int32(window - 1)
    return np.maximum(first, np.int32(0))


def _visible(
    packed: PackedForest, queries: NDArray[Any], keys: NDArray[Any], window: int | None
) -> NDArray[np.bool_]:
    """Which key each query sees. Shape: [queries, keys]."""
    query = queries[:, None]
    seen: NDArray[np.bool_] = (keys <= query) & (query < packed.subtree_end[keys])
    if window is not None:
        seen &= packed.positions[query] - packed.positions[keys] < window
    return seen


def _divide(
    packed: PackedForest, window: int | None
) -> tuple[IntArray, IntArray, NDArray[np.bool_]]:
    """Starts and ends of the blocks, and which are causal: the first run of every tree, unless
    there is a window, then its other tokens in blocks of nearly equal length, of the size that
    costs least."""
    count = np.int32(len(packed.ids))
    breaks = np.append(np.flatnonzero(packed.previous != np.arange(-1, count - 1)), count)
    roots = np.flatnonzero(packed.previous < 0)
    after = breaks[np.searchsorted(breaks, roots, side="right")]  # where each first run ends
    if window is not None:
        after = roots
    rest = list(zip(after, np.append(roots[1:], count), strict=True))
    best: tuple[float, IntArray] | None = None
    for size in BLOCK_SIZES:
        cuts = [
            np.linspace(start, end, -(-(end - start) // size), endpoint=False).astype(np.int32)
            for start, end in rest
        ]
        starts = np.unique(np.concatenate([roots, *cuts])).astype(np.int32)
        width = np.append(starts[1:], count) - starts
        keys = packed.positions[starts] - _first_seen(packed, starts, window) + width
        work = ((width + KEY_COST) * keys.astype(np.float64)).sum()
        if best is None or work < best[0]:
            best = float(work), starts
    assert best is not None
    causal = (packed.previous[best[1]] < 0) & (window is None)
    return best[1], np.append(best[1][1:], count), causal


def _alike(sizes: IntArray, chosen: NDArray[np.bool_]) -> list[IntArray]:
    """The chosen blocks in groups of like key counts. Shape: [groups][...]."""
    groups: list[list[int]] = []
    for block in np.argsort(sizes, kind="stable").tolist():
        if not chosen[block]:
            continue
        if groups:
            least = int(sizes[groups[-1][0]])
            fits = sizes[block] <= PADDING[0] * least + PADDING[1]
            if fits and (len(groups[-1]) + 1) * int(sizes[block]) <= GROUP_KEYS:
                groups[-1].append(block)
                continue
        groups.append([block])
    return [np.array(group, dtype=np.int32) for group in groups]


def _above(packed: PackedForest, start: int, runs: IntArray) -> IntArray:
    """The path above a token, root first. `runs` = for each token the start of the unbroken run of
    places that ends with it. Shape: [positions[start]]."""
    parts: list[IntArray] = []
    place = int(packed.previous[start])
    while place >= 0:
        parts.append(np.arange(runs[place], place + 1, dtype=np.int32))
        place = int(packed.previous[runs[place]])
    return np.concatenate([np.empty(0, dtype=np.int32), *parts[::-1]])


class _BlockAttention(torch.autograd.Function):
    """query [T, H, D], key and value [T, H_kv, D] -> [T, H, D]."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, scale: float
    ) -> Tensor:
        outs: list[Tensor] = []
        norms: list[Tensor] = []
        for group, queries in zip(plan.groups, plan.blocks(query), strict=True):
            keys, values = group.gather(key), group.gather(value)
            out = torch.empty_like(queries)
            for heads in _head_sets(query, key):
                out[:, heads], norm = _attend(queries[:, heads], keys, values, group.mask, scale)
                norms.append(norm)
            outs.append(out)
        result = plan.tokens(outs)
        ctx.save_for_backward(query, key, value, result, *norms)
        ctx.plan, ctx.scale = plan, scale
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, result, *norms = ctx.saved_tensors
        plan: BlockPlan = ctx.plan
        left = iter(norms)
        wide = torch.promote_types(key.dtype, torch.float32)
        key_grad = torch.zeros(key.shape, dtype=wide, device=key.device)
        value_grad = torch.zeros_like(key_grad)
        query_grads: list[Tensor] = []
        blocks = zip(
            plan.groups, plan.blocks(query), plan.blocks(result), plan.blocks(grads[0]), strict=True
        )
        for group, queries, outs, out_grads in blocks:
            keys, values = group.gather(key), group.gather(value)
            query_grad = torch.empty_like(queries)
            for heads in _head_sets(query, key):
                saved = (queries[:, heads], keys, values, outs[:, heads], next(left))
                query_grad[:, heads], of_keys, of_values = _attend_backward(
                    out_grads[:, heads], saved, group.mask, ctx.scale
                )
                group.add(key_grad, of_keys)
                group.add(value_grad, of_values)
            query_grads.append(query_grad)
        return (
            plan.tokens(query_grads),
            key_grad.to(key.dtype),
            value_grad.to(value.dtype),
            None,
            None,
        )


def _head_sets(query: Tensor, key: Tensor) -> list[slice]:
    """Query heads in sets with one of each key head's queries, in the key heads' order."""
    ratio = query.shape[1] // key.shape[1]
    return [slice(first, None, ratio) for first in range(ratio)]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The output and, on CPU, the softmax's normaliser that its backward pass takes."""
    if query.device.type == "cpu":
        out, norm = torch._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, mask is None, attn_mask=mask, scale=scale
        )
        return out, norm
    out = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale
    )
    return out, query.new_empty(0)


def _attend_backward(
    grad: Tensor, saved: tuple[Tensor, ...], mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    query, key, value, out, norm = saved
    grads: tuple[Tensor, Tensor, Tensor]
    if query.device.type == "cpu":
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, norm, 0.0, mask is None, attn_mask=mask, scale=scale
        )
        return grads
    with torch.enable_grad():
        q, k, v = (t.detach().requires_grad_() for t in (query, key, value))
        again = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale
        )
        of_query, of_key, of_value = torch.autograd.grad(again, (q, k, v), grad)
    return of_query, of_key, of_value
