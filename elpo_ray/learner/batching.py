"""Packs on the device: the items of one forward pass as tensors.

Two forms. A forest: all items one after the other in one row, with an attention plan. Rows: items
of one leaf each, right-padded, for models whose attention cannot be replaced; causal attention
without a mask never looks right, where the padding is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elpo_ray.config.learner import AttentionBackend
from elpo_ray.forest import Item, TreeBatch, lay_out
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
    select: Tensor
    """Where, in the flattened [B * S], the scored tokens are predicted. Shape: [M]."""
    targets: Tensor
    """The scored token ids. Shape: [M]."""
    positions: Tensor | None = None
    """Depths in the trees, [1, S]; None for rows, which count from 0."""
    plan: AttentionPlan | None = None
    """Of a forest; None for rows."""


@dataclass(frozen=True)
class PackTensors:
    """A pack on the device; all but `inputs` of shape [M]."""

    inputs: Inputs
    weight: Tensor
    advantage: Tensor
    negative_advantage: Tensor
    clip_low: Tensor
    rollout_logp: Tensor
    copies: Tensor
    """How many leaves each scored token stands for."""


@dataclass(frozen=True)
class BatchLayout:
    """How packs are laid out for a model."""

    device: torch.device
    backend: AttentionBackend | None
    """None = rows."""
    dtype: torch.dtype = torch.float32
    """Of queries and keys."""

    @property
    def wide(self) -> torch.dtype:
        """Of weights and log-probabilities."""
        return torch.promote_types(self.dtype, torch.float32)


def collate(pack: Pack, form: BatchLayout) -> PackTensors:
    """A pack's tensors. A dummy is one token that predicts itself with weight 0."""
    batch = lay_out(pack.items) if pack.items else DUMMY
    if form.backend is None:
        inputs = _rows([lay_out([item]) for item in pack.items] or [DUMMY], form.device)
    else:
        inputs = Inputs(
            ids=_whole(batch.ids, form.device)[None],
            select=_whole(batch.sel, form.device),
            targets=_whole(batch.targets, form.device),
            positions=_whole(batch.pos, form.device)[None],
            plan=make_plan(form.backend, batch, form.device, form.dtype),
        )

    def floats(values: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(values).to(form.device, form.wide)

    return PackTensors(
        inputs=inputs,
        weight=floats(batch.weight),
        advantage=floats(batch.advantage),
        negative_advantage=floats(batch.negative_advantage),
        clip_low=floats(batch.clip_low),
        rollout_logp=floats(batch.rollout_logp),
        copies=floats(batch.copies),
    )


def _rows(parts: list[TreeBatch], device: torch.device) -> Inputs:
    """Sequences below each other, each an unbranched path."""
    width = max(len(part.ids) for part in parts)
    ids = np.zeros((len(parts), width), dtype=np.int64)
    for i, part in enumerate(parts):
        ids[i, : len(part.ids)] = part.ids
    return Inputs(
        ids=torch.from_numpy(ids).to(device),
        select=_whole(np.concatenate([p.sel + i * width for i, p in enumerate(parts)]), device),
        targets=_whole(np.concatenate([part.targets for part in parts]), device),
    )


def _whole(values: NDArray[np.integer[Any]], device: torch.device) -> Tensor:
    return torch.from_numpy(values.astype(np.int64)).to(device)


def _dummy() -> TreeBatch:
    zero, none = np.zeros(1, dtype=np.int32), np.zeros(1)
    return TreeBatch(
        ids=zero,
        pos=zero,
        sub_end=zero + 1,
        pred=zero - 1,
        sel=zero,
        targets=zero,
        scored=zero,
        weight=none,
        advantage=none,
        negative_advantage=none,
        clip_low=none,
        rollout_logp=none,
        copies=none,
    )


DUMMY = _dummy()
