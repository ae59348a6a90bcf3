"""What of a tree goes through the model together, and what that costs.

An item is some leaves of one tree whose shared prefixes are forwarded once; an item of one leaf is
an ordinary sequence. Invariants: a token is scored in exactly one of the items that share it
(`scored` nodes), and repeated in others only as context; nothing is forwarded that no scored token
looks at (the last token of a path is only predicted); leaves stand in depth-first order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from elpo_ray.forest.trees import IntArray, Terms, TrainTree, terms

BoolArray = NDArray[np.bool_]
LeafArray = NDArray[np.int64]


@dataclass(frozen=True)
class PassSize:
    """Sizes of a forward pass."""

    tokens: int = 0
    """Tokens through the model."""
    pairs: int = 0
    """(query, key) pairs with the key visible to the query, per head and layer."""
    scored: int = 0
    """Tokens whose log-probability is computed, each counted once."""

    def __add__(self, other: PassSize) -> PassSize:
        return PassSize(
            self.tokens + other.tokens, self.pairs + other.pairs, self.scored + other.scored
        )


@dataclass(frozen=True)
class CostModel:
    """FLOPs of a forward pass by what causes them; a training pass costs three times as much."""

    token: float
    """FLOPs of a forwarded token: 2 * parameters of the blocks."""
    pair: float
    """FLOPs of a visible pair: 4 * attention width * layers."""
    scored: float
    """FLOPs of a scored token: 2 * hidden size * vocabulary."""

    def __call__(self, size: PassSize) -> float:
        return self.token * size.tokens + self.pair * size.pairs + self.scored * size.scored


@dataclass(frozen=True, eq=False)
class Shape:
    """What items need of a tree, node by node; N nodes, L leaves."""

    tree: TrainTree
    depth: IntArray
    """Tokens above the node. Shape: [N]."""
    agents: IntArray
    """Agent tokens in it. Shape: [N]."""
    last: IntArray
    """Where in the node its last agent token stands; -1 without any. Shape: [N]."""
    order: IntArray
    """Nodes depth-first, children in id order. Shape: [N]."""
    kept: LeafArray
    """Places in `tree.leaves` of the leaves that can move the weights, depth-first."""

    @classmethod
    def of(cls, tree: TrainTree, *, needs_advantage: bool) -> Shape:
        """Leaves without weight are left out and, if `needs_advantage`, those whose every agent
        token has advantage 0: their gradient is exactly 0, and denominators are in the weights."""
        sizes = np.diff(tree.node_start)
        depth = np.zeros(tree.num_nodes, dtype=np.int32)
        agents = np.zeros(tree.num_nodes, dtype=np.int32)
        last = np.full(tree.num_nodes, -1, dtype=np.int32)
        where = np.flatnonzero(tree.agent)
        owner = tree.token_node[where]
        np.add.at(agents, owner, 1)
        last[owner] = where - tree.node_start[owner]  # ascending: the last one stays
        for node in range(1, tree.num_nodes):
            parent = tree.node_parent[node]
            depth[node] = depth[parent] + sizes[parent]
        order = np.fromiter(_depth_first(tree.node_parent), dtype=np.int32)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        active = np.broadcast_to(agents > 0, tree.on_path.shape) & tree.trains
        if needs_advantage:
            active = active & ((tree.advantage != 0) | (tree.negative_advantage != 0))
        kept = np.flatnonzero(active.any(axis=1) & (tree.leaf_weight > 0))
        return cls(tree, depth, agents, last, order, kept[np.argsort(rank[tree.leaves[kept]])])

    def flat_size(self) -> PassSize:
        """The size of passes with every kept leaf as a sequence of its own."""
        trains = self.tree.trains[self.kept]
        ends = np.where(trains & (self.last >= 0), self.depth + self.last, 0).max(axis=1)
        lengths = ends.astype(np.int64)
        scored = int((trains * self.agents).sum())
        return PassSize(int(lengths.sum()), int((lengths * (lengths + 1) // 2).sum()), scored)

    def flat(self) -> list[Item]:
        """Each kept leaf as an item of its own."""
        return [
            Item(self, self.kept[i : i + 1], self.tree.trains[leaf], self.kept[i : i + 1])
            for i, leaf in enumerate(self.kept)
        ]

    def shared(self, max_tokens: int) -> list[Item]:
        """Items of contiguous leaves with at most `max_tokens` tokens each, divided so that as few
        tokens as possible are repeated. A single path may exceed it; `plan` refuses that.
        """
        taken = np.zeros(self.tree.num_nodes, dtype=np.bool_)
        items: list[Item] = []
        for first, end in self._ranges(max_tokens):
            leaves = self.kept[first:end]
            here = self.tree.trains[leaves].any(axis=0)
            items.append(Item(self, leaves, here & ~taken, self.kept))
            taken |= here
        return [item for item in items if item.size.scored]

    def _ranges(self, max_tokens: int) -> list[tuple[int, int]]:
        """Ranges of `kept`, by dynamic programming over the last cut.

        Leaves i..j take len(i) + sum over k in (i, j] of len(k) - shared(k - 1, k) tokens, and a
        cut before k repeats the shared(k - 1, k) tokens of the common path.
        """
        on_path = self.tree.on_path[self.kept]
        sizes = np.diff(self.tree.node_start)
        lengths = (on_path * sizes).sum(axis=1)
        own = lengths.copy()
        own[1:] -= ((on_path[1:] & on_path[:-1]) * sizes).sum(axis=1)
        if not len(own):
            return []
        best = [0.0] + [np.inf] * len(own)
        cut = [0] * (len(own) + 1)
        for end in range(1, len(own) + 1):
            size = 0
            for first in range(end - 1, -1, -1):
                whole = size + int(lengths[first])
                if whole > max_tokens and first < end - 1:
                    break
                if best[first] + whole < best[end]:
                    best[end], cut[end] = best[first] + whole, first
                size += int(own[first])
        ranges: list[tuple[int, int]] = []
        end = len(own)
        while end:
            ranges.append((cut[end], end))
            end = cut[end]
        return ranges[::-1]


@dataclass(frozen=True, eq=False)
class Item:
    """Leaves of one tree that are forwarded together."""

    shape: Shape
    leaves: LeafArray
    """Places in `tree.leaves`, depth-first."""
    scored: BoolArray
    """Nodes whose agent tokens are scored here. Shape: [N]."""
    counted: LeafArray
    """Places in `tree.leaves` of the leaves whose terms the scored tokens carry."""

    @property
    def tree(self) -> TrainTree:
        return self.shape.tree

    @cached_property
    def take(self) -> IntArray:
        """How many of each node's first tokens are forwarded. Shape: [N]."""
        tree, shape = self.tree, self.shape
        take = np.zeros(tree.num_nodes, dtype=np.int32)
        inside: BoolArray = np.asarray(tree.on_path[self.leaves].any(axis=0))
        below = np.zeros(tree.num_nodes, dtype=np.bool_)
        for node in range(tree.num_nodes - 1, -1, -1):
            if not inside[node]:
                continue
            scored = self.scored[node] and shape.agents[node] > 0
            if below[node]:
                take[node] = tree.node_start[node + 1] - tree.node_start[node]
            elif scored:
                take[node] = shape.last[node]
            if node and (below[node] or scored):
                below[tree.node_parent[node]] = True
        return take

    @cached_property
    def size(self) -> PassSize:
        """The size of a pass with this item alone."""
        take = self.take.astype(np.int64)
        pairs = take * self.shape.depth + take * (take + 1) // 2
        scored = int(self.shape.agents[self.scored].sum())
        return PassSize(int(take.sum()), int(pairs.sum()), scored)

    @cached_property
    def terms(self) -> list[Terms]:
        """What a token of each node adds to the objective; see `trees.terms`."""
        return terms(self.tree, self.counted)


def _depth_first(parents: IntArray) -> Iterator[int]:
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(parents):
        children.setdefault(int(parent), []).append(node)
    stack = [0]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(reversed(children.get(node, [])))
