"""Random trees as the learner gets them, and token columns without a tree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from elpo_ray.forest.layout import TokenColumns
from elpo_ray.forest.trees import TrainTree


def train_tree(
    rng: np.random.Generator,
    parents: Sequence[int],
    sizes: Sequence[int],
    *,
    vocab: int,
    by_leaf: bool = False,
) -> TrainTree:
    """Nodes of `sizes` tokens, the first two thirds of each sampled by the policy; node 0, whose
    parent is -1, is the prompt. `by_leaf` gives every leaf advantages and clip bounds
    of its own."""
    start = np.cumsum([0, *sizes]).astype(np.int32)
    agent = np.zeros(start[-1], dtype=np.bool_)
    for node in range(1, len(parents)):
        agent[start[node] : start[node] + max(1, sizes[node] * 2 // 3)] = True
    leaves = [node for node in range(len(parents)) if node not in parents]
    shape = (len(leaves), len(parents)) if by_leaf else (len(parents),)
    advantage = rng.normal(size=shape)
    advantage[..., 0] = 0
    return TrainTree(
        ids=rng.integers(0, vocab, start[-1]).astype(np.int32),
        agent=agent,
        rollout_logp=np.where(agent, rng.normal(-4, 0.1, start[-1]), 0).astype(np.float32),
        node_start=start,
        node_parent=np.array(parents, dtype=np.int32),
        advantage=advantage,
        negative_advantage=np.maximum(-advantage, 0),
        share=np.ones(len(parents)),
        clip_low=rng.choice([0.8, 0.742, 0.685], shape),
        leaves=np.array(leaves, dtype=np.int32),
        leaf_weight=np.zeros(len(leaves)),
    )


def token_columns(
    *,
    weight: torch.Tensor,
    advantage: torch.Tensor,
    clip_low: torch.Tensor,
    rollout_logp: torch.Tensor,
    negative_advantage: torch.Tensor | None = None,
) -> TokenColumns[torch.Tensor]:
    """Columns of tokens; without `negative_advantage`, all leaves of a token pull one way."""
    if negative_advantage is None:
        negative_advantage = (-advantage).clamp(min=0)
    return TokenColumns(
        weight=weight,
        advantage=advantage,
        negative_advantage=negative_advantage,
        copies=torch.ones_like(weight),
        clip_low=clip_low,
        rollout_logp=rollout_logp,
    )
