"""Items as arrays in depth-first order: the tokens of one forward pass, as a forest.

Invariants: a token's ancestors stand before it and its descendants in one run after it, hence a
query sees exactly the keys  k <= query < sub_end[k]; positions are depths, so that rotary and
learned positions equal those of the flat sequences; trees stand side by side, invisible to each
other without another mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elpo_ray.forest.items import Item
from elpo_ray.forest.trees import FloatArray, IntArray


@dataclass(frozen=True, eq=False, kw_only=True)
class TreeBatch:
    """T tokens that are forwarded and M that are scored, of one or more trees."""

    ids: IntArray
    """Shape: [T]."""
    pos: IntArray
    """Depth: tokens on the path before this one. Shape: [T]."""
    sub_end: IntArray
    """End, exclusive, of the run of tokens that see this one. Shape: [T]."""
    pred: IntArray
    """Place of the token before it on the path, -1 at a root. Shape: [T]."""
    sel: IntArray
    """Where each scored token is predicted from. Shape: [M]; repeats at branch points."""
    targets: IntArray
    """Their ids. Shape: [M]."""
    scored: IntArray
    """Their places in `TrainTree.ids`, of each item's tree in turn. Shape: [M]."""
    weight: FloatArray
    """Shape: [M], as all that follow."""
    advantage: FloatArray
    negative_advantage: FloatArray
    clip_low: FloatArray
    rollout_logp: FloatArray
    copies: FloatArray
    """How many leaves each scored token stands for."""

    @cached_property
    def segments(self) -> tuple[IntArray, IntArray]:
        """Unbranched chains: their starts and T at the end, [S + 1]; their parents, [S], -1 at a
        root."""
        count = len(self.ids)
        follows = np.bincount(self.pred[self.pred >= 0], minlength=count)
        inside = self.pred[1:] == np.arange(count - 1)
        begins = np.concatenate([[True], ~inside | (follows[:-1] > 1)])
        starts = np.flatnonzero(begins).astype(np.int32)
        of_token = np.cumsum(begins, dtype=np.int32) - 1
        before = self.pred[starts]
        parents = np.where(before >= 0, of_token[before], -1).astype(np.int32)
        return np.append(starts, np.int32(count)), parents


def lay_out(items: Sequence[Item]) -> TreeBatch:
    """The items side by side."""
    assert items, "a pack without items is a dummy"
    parts = [_lay_out(item) for item in items]
    offsets = np.cumsum([0, *(len(part.ids) for part in parts)])[:-1]

    def joined(name: str) -> NDArray[Any]:
        values = [getattr(part, name) for part in parts]
        if name in _PLACES:
            moved = [np.where(v >= 0, v + by, -1) for v, by in zip(values, offsets, strict=True)]
            values = [of_part.astype(np.int32) for of_part in moved]
        return np.concatenate(values)

    return TreeBatch(**{name: joined(name) for name in TreeBatch.__dataclass_fields__})


_PLACES = ("sub_end", "pred", "sel")
"""Fields that count from the first token of all items."""


def _lay_out(item: Item) -> TreeBatch:
    """One item, its nodes in depth-first order."""
    tree, shape, take = item.tree, item.shape, item.take
    end = tree.num_nodes * [0]
    last = tree.num_nodes * [-1]  # place of the node's last token, or of the one before the node
    runs: list[NDArray[np.int64]] = []
    at = 0
    first_pred: list[tuple[int, int]] = []
    sel: list[NDArray[np.int64]] = []
    scored: list[NDArray[np.int64]] = []
    agents = np.flatnonzero(tree.agent)
    for node in map(int, shape.order):
        parent, start, size = int(tree.node_parent[node]), int(tree.node_start[node]), take[node]
        before = last[parent] if parent >= 0 else -1
        last[node] = before
        if size:
            runs.append(np.arange(start, start + size))
            first_pred.append((at, before))
            last[node] = at + size - 1
        if item.scored[node] and shape.agents[node]:
            low, high = np.searchsorted(agents, [start, tree.node_start[node + 1]])
            tokens = agents[low:high]
            scored.append(tokens)
            sel.append(np.where(tokens > start, at + tokens - start - 1, before))
        at += size
        end[node] = at
    for node in map(int, shape.order[:0:-1]):
        parent = int(tree.node_parent[node])
        end[parent] = max(end[parent], end[node])
    tokens = np.concatenate(runs)
    node_of = tree.token_node[tokens]
    pred = np.arange(-1, len(tokens) - 1, dtype=np.int32)
    for place, before in first_pred:
        pred[place] = before
    chosen = np.concatenate(scored)
    owner = tree.token_node[chosen]
    terms = item.terms
    where = np.concatenate(sel).astype(np.int32)
    assert (where >= 0).all(), "a scored token needs a token before it"
    return TreeBatch(
        ids=tree.ids[tokens],
        pos=(shape.depth[node_of] + tokens - tree.node_start[node_of]).astype(np.int32),
        sub_end=np.array(end, dtype=np.int32)[node_of],
        pred=pred,
        sel=where,
        targets=tree.ids[chosen],
        scored=chosen.astype(np.int32),
        weight=terms.weight[owner],
        advantage=terms.advantage[owner],
        negative_advantage=terms.negative_advantage[owner],
        clip_low=tree.clip_low[owner],
        rollout_logp=tree.rollout_logp[chosen].astype(np.float64),
        copies=terms.copies[owner],
    )
