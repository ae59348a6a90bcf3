"""Packs on the device: the items of one forward pass as tensors.

There are two layouts. A forest: all items one after the other in one row, with an attention plan.
Rows: items of one leaf each, right-padded, for models whose attention cannot be replaced; causal
attention without a mask never looks right, where the padding is.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elpo_ray.config.learner import AttentionBackend
from elpo_ray.forest.items import Item
from elpo_ray.forest.layout import PackedForest, TokenColumns, lay_out
from elpo_ray.learner.attention import AttentionPlan, make_plan


@dataclass(eq=False)
class Pack:
    """One forward pass; no items = a dummy that keeps the ranks in step."""

    items: list[Item] = field(default_factory=list)
    old_logp: Tensor | None = None
    """Log-probabilities of the scored tokens before the first optimizer step. Shape: [M]."""
    ref_logp: Tensor | None = None
    """The reference policy's. Shape: [M]."""


@dataclass(frozen=True)
class Inputs:
    """What the policy reads: B rows of S tokens, M scored tokens over all rows."""

    ids: Tensor
    """Shape: [B, S]."""
    predicted_from: Tensor
    """Place in the flattened [B * S] of the token that predicts each scored one. Shape: [M]."""
    targets: Tensor
    """The scored token ids. Shape: [M]."""
    positions: Tensor | None = None
    """Depths in the trees, [1, S]; None for rows, which count from 0."""
    plan: AttentionPlan | None = None
    """The attention over a forest; None for rows."""


@dataclass(frozen=True)
class PackTensors:
    """A pack on the device."""

    inputs: Inputs
    columns: TokenColumns[Tensor]


@dataclass(frozen=True)
class BatchLayout:
    """How packs are laid out for a model."""

    device: torch.device
    backend: AttentionBackend | None
    """None = rows."""
    dtype: torch.dtype = torch.float32
    """The precision of queries and keys."""

    @property
    def wide(self) -> torch.dtype:
        """The precision of weights and log-probabilities."""
        return torch.promote_types(self.dtype, torch.float32)


def collate(pack: Pack, layout: BatchLayout) -> PackTensors:
    """A pack's tensors. A dummy is one token that predicts itself with weight 0."""
    packed = lay_out(pack.items) if pack.items else DUMMY
    if layout.backend is None:
        inputs = _rows([lay_out([item]) for item in pack.items] or [DUMMY], layout.device)
    else:
        inputs = Inputs(
            ids=_whole(packed.ids, layout.device)[None],
            predicted_from=_whole(packed.predicted_from, layout.device),
            targets=_whole(packed.targets, layout.device),
            positions=_whole(packed.positions, layout.device)[None],
            plan=make_plan(layout.backend, packed, layout.device, layout.dtype),
        )

    device, wide = layout.device, layout.wide
    return PackTensors(inputs, packed.columns.map(lambda c: torch.from_numpy(c).to(device, wide)))


def _rows(parts: list[PackedForest], device: torch.device) -> Inputs:
    """Sequences below each other, each an unbranched path."""
    width = max(len(part.ids) for part in parts)
    ids = np.zeros((len(parts), width), dtype=np.int64)
    for i, part in enumerate(parts):
        ids[i, : len(part.ids)] = part.ids
    places = np.concatenate([part.predicted_from + i * width for i, part in enumerate(parts)])
    return Inputs(
        ids=torch.from_numpy(ids).to(device),
        predicted_from=_whole(places, device),
        targets=_whole(np.concatenate([part.targets for part in parts]), device),
    )


def _whole(values: NDArray[np.integer[Any]], device: torch.device) -> Tensor:
    return torch.from_numpy(values.astype(np.int64)).to(device)


def _dummy() -> PackedForest:
    zero = np.zeros(1, dtype=np.int32)
    return PackedForest(
        ids=zero,
        positions=zero,
        subtree_end=zero + 1,
        previous=zero - 1,
        predicted_from=zero,
        targets=zero,
        scored=zero,
        columns=TokenColumns(**{field.name: np.zeros(1) for field in fields(TokenColumns)}),
    )


DUMMY = _dummy()
