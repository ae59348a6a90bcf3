"""Items as arrays in depth-first order: the tokens of one forward pass, as a forest.

Invariants: a token's ancestors stand before it and its descendants in one run after it, hence a
query sees exactly the keys  k <= query < subtree_end[k]; positions are depths, so that rotary and
learned positions equal those of the flat sequences; trees stand side by side, invisible to each
other without another mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from elpo_ray.forest.items import Item
from elpo_ray.forest.trees import FloatArray, IntArray

Column = TypeVar("Column")
OtherColumn = TypeVar("OtherColumn")


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenColumns(Generic[Column]):
    """What the objective reads of each of M scored tokens, in numpy arrays or torch tensors of
    shape [M]."""

    weight: Column
    """Weight in the objective; 0 on dummies."""
    advantage: Column
    negative_advantage: Column
    """Negative part of the advantage, >= 0; the positive part is their sum. Both are above 0 where
    leaves that share the token pull in opposite directions."""
    copies: Column
    """How many leaves the token stands for."""
    clip_low: Column
    """Lower bound of the probability ratio, 1 - ε_low^t (Eq. 11)."""
    rollout_logp: Column
    """Log-probability in nats under the engine that sampled the token."""

    def map(self, change: Callable[[Column], OtherColumn]) -> TokenColumns[OtherColumn]:
        """Every column changed alike: copied to a device, cut, ..."""
        return TokenColumns(**{name: change(column) for name, column in vars(self).items()})


@dataclass(frozen=True, eq=False, kw_only=True)
class PackedForest:
    """T tokens that are forwarded and M that are scored, of one or more trees."""

    ids: IntArray
    """Token ids. Shape: [T]."""
    positions: IntArray
    """Depth: tokens on the path before this one. Shape: [T]."""
    subtree_end: IntArray
    """End, exclusive, of the run of tokens that see this one. Shape: [T]."""
    previous: IntArray
    """Place of the token before it on the path, -1 at a root. Shape: [T]."""
    predicted_from: IntArray
    """Place of the token that predicts each scored one. Shape: [M]; repeats at branch points."""
    targets: IntArray
    """Ids of the scored tokens, each once for every clip bound that it has. Shape: [M]."""
    scored: IntArray
    """Their places in `TrainTree.ids`, of each item's tree in turn. Shape: [M]."""
    columns: TokenColumns[FloatArray]

    @cached_property
    def segments(self) -> tuple[IntArray, IntArray]:
        """Unbranched chains: their starts and T at the end, [S + 1]; their parents, [S], -1 at a
        root."""
        count = len(self.ids)
        follows = np.bincount(self.previous[self.previous >= 0], minlength=count)
        inside = self.previous[1:] == np.arange(count - 1)
        begins = np.concatenate([[True], ~inside | (follows[:-1] > 1)])
        starts = np.flatnonzero(begins).astype(np.int32)
        of_token = np.cumsum(begins, dtype=np.int32) - 1
        before = self.previous[starts]
        parents = np.where(before >= 0, of_token[before], -1).astype(np.int32)
        return np.append(starts, np.int32(count)), parents


def lay_out(items: Sequence[Item]) -> PackedForest:
    """The items side by side."""
    assert items, "a pack without items is a dummy"
    parts = [dict(vars(_lay_out(item))) for item in items]
    offsets = np.cumsum([0, *(len(part["ids"]) for part in parts)])[:-1]
    for part, offset in zip(parts, offsets, strict=True):
        for name in _PLACES:
            part[name] = np.where(part[name] >= 0, part[name] + offset, -1).astype(np.int32)
    columns = [vars(part.pop("columns")) for part in parts]
    return PackedForest(**_joined(parts), columns=TokenColumns(**_joined(columns)))


_PLACES = ("subtree_end", "previous", "predicted_from")
"""Fields that count from the first token of all items."""


def _joined(parts: Sequence[dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _lay_out(item: Item) -> PackedForest:
    """One item, its nodes in depth-first order."""
    tree, shape, take = item.tree, item.shape, item.take
    end = tree.num_nodes * [0]
    last = tree.num_nodes * [-1]  # place of the node's last token, or of the one before the node
    runs: list[NDArray[np.int64]] = []
    at = 0
    starts: list[tuple[int, int]] = []
    predicted_from: list[NDArray[np.int64]] = []
    scored: list[NDArray[np.int64]] = []
    agents = np.flatnonzero(tree.agent)
    for node in map(int, shape.order):
        parent, start, size = int(tree.node_parent[node]), int(tree.node_start[node]), take[node]
        before = last[parent] if parent >= 0 else -1
        last[node] = before
        if size:
            runs.append(np.arange(start, start + size))
            starts.append((at, before))
            last[node] = at + size - 1
        if item.scored[node] and shape.agents[node]:
            low, high = np.searchsorted(agents, [start, tree.node_start[node + 1]])
            tokens = agents[low:high]
            scored.append(tokens)
            predicted_from.append(np.where(tokens > start, at + tokens - start - 1, before))
        at += size
        end[node] = at
    for node in map(int, shape.order[:0:-1]):
        parent = int(tree.node_parent[node])
        end[parent] = max(end[parent], end[node])
    tokens = np.concatenate(runs)
    node_of = tree.token_node[tokens]
    previous = np.arange(-1, len(tokens) - 1, dtype=np.int32)
    for place, before in starts:
        previous[place] = before
    chosen, where, columns = _scored(item, np.concatenate(scored), np.concatenate(predicted_from))
    assert (where >= 0).all(), "a scored token needs a token before it"
    return PackedForest(
        ids=tree.ids[tokens],
        positions=(shape.depth[node_of] + tokens - tree.node_start[node_of]).astype(np.int32),
        subtree_end=np.array(end, dtype=np.int32)[node_of],
        previous=previous,
        predicted_from=where,
        targets=tree.ids[chosen],
        scored=chosen.astype(np.int32),
        columns=columns,
    )


def _scored(
    item: Item, tokens: NDArray[np.int64], places: NDArray[np.int64]
) -> tuple[NDArray[np.int64], IntArray, TokenColumns[FloatArray]]:
    """The scored tokens of an item, the places that predict them, and their columns. A token with
    several clip bounds stands there once for each of them."""
    owner = item.tree.token_node[tokens]
    chosen, where, columns = [], [], []
    for level, terms in enumerate(item.terms):
        here = (terms.weight[owner] > 0) | (level == 0)
        chosen.append(tokens[here])
        where.append(places[here])
        columns.append({name: of_node[owner[here]] for name, of_node in vars(terms).items()})
    all_tokens = np.concatenate(chosen)
    rollout_logp = item.tree.rollout_logp[all_tokens].astype(np.float64)
    return (
        all_tokens,
        np.concatenate(where).astype(np.int32),
        TokenColumns(**_joined(columns), rollout_logp=rollout_logp),
    )
