"""From the forest to packs: flat leaf sequences, balanced over ranks, right-padded.

Invariants: every rank computes the same plan of all ranks from the forest alone, so that all agree
on the number of packs without talking; a pack has right padding only, hence causal attention
without a mask is exact; weights come with the forest and are never renormalised here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elpo_ray.forest import IntArray, TrainTree


@dataclass(frozen=True, eq=False)
class Row:
    """One leaf's sequence, cut after the last token that is trained."""

    tree: TrainTree
    tokens: IntArray
    """Indices into the tree's tokens. Shape: [length + 1]; the last one is only predicted."""
    weight: float
    """Of each of its agent tokens, before the node's share."""

    @property
    def length(self) -> int:
        """Tokens that go through the model."""
        return len(self.tokens) - 1

    @property
    def trained(self) -> NDArray[np.int64]:
        """Positions in `tokens` that are trained; all above 0."""
        return np.flatnonzero(self.tree.agent[self.tokens])


@dataclass(eq=False)
class Pack:
    """The rows of one forward pass; no rows = a dummy that keeps the ranks in step."""

    rows: list[Row] = field(default_factory=list)
    old_logp: Tensor | None = None
    """Log-probabilities of the trained tokens before the first optimizer step. Shape: [M]."""
    ref_logp: Tensor | None = None
    """The reference policy's. Shape: [M]."""


@dataclass(frozen=True)
class PackTensors:
    """A pack on the device: B rows of S tokens, M trained tokens over all rows."""

    input_ids: Tensor
    """Shape: [B, S]."""
    select: Tensor
    """Where, in the flattened [B * S], the trained tokens are predicted. Shape: [M]."""
    targets: Tensor
    """The trained token ids. Shape: [M]."""
    weight: Tensor
    advantage: Tensor
    blame: Tensor
    clip_low: Tensor
    rollout_logp: Tensor


def rows_of(trees: list[TrainTree], *, needs_advantage: bool) -> list[Row]:
    """The leaf sequences that can move the weights.

    Left out are leaves without weight and, if `needs_advantage`, those whose every trained token
    has advantage 0: their gradient is exactly 0, and denominators are fixed in the weights.
    """
    rows: list[Row] = []
    for tree in trees:
        active = tree.agent
        if needs_advantage:
            moves = (tree.advantage != 0) | (tree.blame != 0)
            active = active & moves[tree.token_node]
        for tokens, weight in zip(tree.sequences(), tree.leaf_weight, strict=True):
            if weight > 0 and active[tokens].any():
                end = int(np.flatnonzero(tree.agent[tokens])[-1]) + 1
                rows.append(Row(tree, tokens[:end], float(weight)))
    return rows


def plan(rows: list[Row], world_size: int, max_tokens: int) -> list[list[Pack]]:
    """Packs of every rank, equally many each. Shape: [world_size][packs].

    Rows go to the least loaded rank, longest first; a rank's rows fill packs of at most
    `max_tokens` padded tokens in order of length. Raises ValueError on a row over the budget.
    """
    ordered = sorted(rows, key=lambda row: row.length, reverse=True)
    if ordered and ordered[0].length > max_tokens:
        raise ValueError(
            f"learner.max_tokens_per_pack={max_tokens}: a sequence has {ordered[0].length} tokens; "
            "use at least model.max_context"
        )
    load = [0] * world_size
    packs: list[list[Pack]] = [[] for _ in range(world_size)]
    for row in ordered:
        rank = load.index(min(load))
        load[rank] += row.length
        if packs[rank]:
            last = packs[rank][-1].rows
            if (len(last) + 1) * last[0].length <= max_tokens:
                last.append(row)
                continue
        packs[rank].append(Pack([row]))
    count = max(len(of_rank) for of_rank in packs)
    return [of_rank + [Pack() for _ in range(count - len(of_rank))] for of_rank in packs]


def collate(pack: Pack, device: torch.device) -> PackTensors:
    """Right-padded tensors of a pack. A dummy is two tokens, the second trained with weight 0."""
    if not pack.rows:
        zero = torch.zeros(1, device=device)
        index = torch.zeros(1, dtype=torch.int64, device=device)
        pair = torch.stack((index, index), 1)
        return PackTensors(pair, index, index, zero, zero, zero, zero, zero)
    width = max(row.length for row in pack.rows)
    ids = np.zeros((len(pack.rows), width), dtype=np.int64)
    select: list[NDArray[np.int64]] = []
    trained: list[IntArray] = []
    for i, row in enumerate(pack.rows):
        ids[i, : row.length] = row.tree.ids[row.tokens[:-1]]
        positions = row.trained
        select.append(positions - 1 + i * width)
        trained.append(row.tokens[positions])
    of_row = list(zip(pack.rows, trained, strict=True))

    def floats(parts: list[NDArray[np.floating[Any]]]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.float32)).to(device)

    return PackTensors(
        input_ids=torch.from_numpy(ids).to(device),
        select=torch.from_numpy(np.concatenate(select)).to(device),
        targets=torch.from_numpy(
            np.concatenate([row.tree.ids[t] for row, t in of_row]).astype(np.int64)
        ).to(device),
        weight=floats([row.weight * row.tree.share[row.tree.token_node[t]] for row, t in of_row]),
        advantage=floats([row.tree.advantage[row.tree.token_node[t]] for row, t in of_row]),
        blame=floats([row.tree.blame[row.tree.token_node[t]] for row, t in of_row]),
        clip_low=floats([row.tree.clip_low[row.tree.token_node[t]] for row, t in of_row]),
        rollout_logp=floats([row.tree.rollout_logp[t] for row, t in of_row]),
    )
