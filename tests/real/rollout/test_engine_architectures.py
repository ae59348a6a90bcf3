"""vLLM and the learner say the same of every architecture, before and after a sync of weights.

The engine samples two turns after one prompt. The learner, with its weights loaded from the same
folder, puts them through the model as one tree and hands its weights out as in a run.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

from elpo_ray.config.algorithm import LossConfig
from elpo_ray.config.learner import AttentionBackend
from elpo_ray.config.model import Precision, TinyArchitecture
from elpo_ray.forest.items import CostModel
from elpo_ray.forest.layout import lay_out
from elpo_ray.forest.planning import PlanRules, plan
from elpo_ray.forest.trees import TrainTree, leaf_weights
from elpo_ray.learner.batching import BatchLayout, Pack, collate
from elpo_ray.learner.export import weight_buckets
from elpo_ray.learner.policy import PolicyModule, load_policy
from elpo_ray.rollout.engine import Engine
from elpo_ray.types import Sampling, Turn
from elpo_ray.weights.host import HostPublisher
from tests.architectures import move, write_tiny
from tests.real.engines import MAX_CONTEXT, Handles, running

pytestmark = pytest.mark.real

PROMPT = [2 + (13 * j) % 290 for j in range(200)]
"""Longer than the sliding windows, a quarter of the context."""
RULES = PlanRules(
    max_tokens=MAX_CONTEXT, world_size=1, cost=CostModel(token=1, pair=1, scored=1), share_gain=0.0
)
LAYOUT = BatchLayout(torch.device("cpu"), AttentionBackend.blocks)


def tree_of(turns: list[Turn]) -> TrainTree:
    """The prompt with the turns below it, each trained."""
    sizes = [len(PROMPT), *(len(turn.token_ids) for turn in turns)]
    start = np.cumsum([0, *sizes]).astype(np.int32)
    ones = np.ones(len(sizes))
    return TrainTree(
        ids=np.array([*PROMPT, *(t for turn in turns for t in turn.token_ids)], dtype=np.int32),
        agent=np.arange(start[-1]) >= len(PROMPT),
        rollout_logp=np.array([*(0.0 for _ in PROMPT), *(p for t in turns for p in t.logprobs)]),
        node_start=start,
        node_parent=np.array([-1, *(0 for _ in turns)], dtype=np.int32),
        advantage=ones,
        negative_advantage=0 * ones,
        share=ones,
        clip_low=0.8 * ones,
        leaves=np.arange(1, len(sizes), dtype=np.int32),
        leaf_weight=leaf_weights(sizes[1:], LossConfig()),
    )


async def compare(engine: Engine, policy: PolicyModule, version: int) -> None:
    jobs = [Sampling(temperature=1.0, max_tokens=40, seed=seed) for seed in (1, 2)]
    turns = await asyncio.gather(*(engine.generate(PROMPT, job) for job in jobs))
    assert turns[0].token_ids != turns[1].token_ids
    assert {turn.weight_version for turn in turns} == {version}
    ((items,),) = plan([tree_of(turns)], RULES).ranks
    assert len(items) == 1, "the turns share their prompt"
    packed = lay_out(items)
    with torch.no_grad():
        logp, entropy = policy(collate(Pack(items), LAYOUT).inputs, 1.0)
    sampled = packed.columns.rollout_logp
    assert len(sampled) == sum(len(turn.token_ids) for turn in turns)
    np.testing.assert_allclose(logp.numpy(), sampled, rtol=0, atol=1e-4)
    entropies = [value for turn in turns for value in turn.entropies]
    np.testing.assert_allclose(entropy.numpy(), entropies, rtol=0, atol=1e-4)


COMMON = (TinyArchitecture.gemma3, TinyArchitecture.qwen3_moe)
"""The ones with the most of their own: windows and another rotary embedding in some layers; experts
in another layout than in the files."""


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(each, marks=() if each in COMMON else pytest.mark.long, id=each.value)
        for each in TinyArchitecture
    ],
)
async def test_engine_and_learner_agree(architecture: TinyArchitecture, tmp_path: Path) -> None:
    folder = write_tiny(architecture, tmp_path, MAX_CONTEXT)
    policy = load_policy(folder, Precision.fp32, max_context=MAX_CONTEXT, checkpointing=False)
    assert policy.takes_trees
    async with running(folder) as engine:
        await compare(engine, policy, 0)
        for version, max_bytes in ((1, 1 << 30), (2, 20_000)):
            move(policy.model, 0.05, seed=version)
            publisher = HostPublisher(
                0,
                Handles(engine),
                lambda size: weight_buckets(policy.model, size, 0.0, materialize=True),
                max_bytes,
            )
            await asyncio.to_thread(publisher.publish, version)
            await compare(engine, policy, version)
