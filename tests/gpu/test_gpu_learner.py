"""The learner on a GPU: ZeRO stages, attention backends, adapters, memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from elpo_ray.config.algorithm import ClipConfig, LossConfig
from elpo_ray.config.compose import composed
from elpo_ray.config.learner import AttentionBackend, LoraConfig
from elpo_ray.config.memory import rank_peak
from elpo_ray.config.model import Precision
from elpo_ray.config.shapes import ModelShape
from elpo_ray.forest.planning import PlanRules, plan
from elpo_ray.forest.trees import TrainForest, TrainTree, demonstrations, leaf_weights
from elpo_ray.learner.attention import IMPLEMENTATION
from elpo_ray.learner.batching import BatchLayout, Pack, collate
from elpo_ray.learner.loss import Objective, TokenBatch, surrogate_loss
from elpo_ray.learner.masters import Masters
from elpo_ray.learner.policy import LogProbHead, PolicyModule
from elpo_ray.learner.rank import LearnerRank
from tests.gpu.conftest import Tell
from tests.gpu.devices import (
    DEVICE,
    DTYPES,
    LARGE,
    ON_CPU,
    SMALL,
    build,
    learner,
    learner_settings,
    on_gpu,
)
from tests.real.ranks import updated
from tests.train_trees import train_tree

FLASH, FLEX = "flash attention needs a GPU", "FlexAttention has no backward pass there"
BACKENDS = [
    AttentionBackend.blocks,
    pytest.param(AttentionBackend.paths, marks=on_gpu(FLASH)),
    pytest.param(AttentionBackend.flex, marks=on_gpu(FLEX)),
]


def trees(count: int, nodes: int, vocabulary: int) -> list[TrainTree]:
    """Trees of 8 leaves below one long path, weighted by Eq. 1."""
    parents = [-1, 0, 1, 2, 1, 2, 3, 3, 1, 1, 0, 2]
    rng = np.random.default_rng(0)
    made = [
        train_tree(rng, parents, rng.integers(nodes // 2, nodes, len(parents)).tolist(),
                   vocab=vocabulary)
        for _ in range(count)
    ]  # fmt: skip
    counts = [int(t.agent[s].sum()) for t in made for s in t.sequences()]
    ends = np.cumsum([len(tree.leaves) for tree in made])[:-1]
    weights = np.split(leaf_weights(counts, LossConfig()), ends)
    return [replace(tree, leaf_weight=w) for tree, w in zip(made, weights, strict=True)]


@contextmanager
def updates(
    folder: Path, precision: Precision, stage: int, **changes: object
) -> Iterator[tuple[LearnerRank, list[float]]]:
    """A rank after three supervised updates on one batch, and their losses."""
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 290, 60).tolist(), [False] * 20 + [True] * 40) for _ in range(4)]
    forest = demonstrations(rows, batch_size=4)
    with learner(folder, learner_settings(precision, stage, 4096, **changes)) as rank:
        yield rank, [updated(rank, forest, Objective.nll).loss for _ in range(3)]


def test_learner_zero_stages(tmp_path: Path, tell: Tell) -> None:
    """Stages 0, 2 and 3 on one rank in bf16, masters in fp32, take the same steps."""
    build(tmp_path, SMALL, Precision.bf16)
    found = {}
    for stage in (0, 2, 3):
        with updates(tmp_path, Precision.bf16, stage, lr=1e-4) as (rank, losses):
            found[stage] = losses
            masters = Masters(rank._engine)
            assert {masters.read(p).dtype for p in rank.model.parameters()} == {torch.float32}
    tell(**{f"losses_{stage}": [round(x, 6) for x in losses] for stage, losses in found.items()})
    for losses in found.values():
        assert losses[2] < losses[0], "it learns"
        assert losses == pytest.approx(found[2], rel=0.02, abs=0.01)


def test_learner_checkpointing_and_adapters(tmp_path: Path, tell: Tell) -> None:
    """Gradient checkpointing changes no loss; adapters learn, and their weights come out merged."""
    build(tmp_path, SMALL, Precision.bf16)
    with updates(tmp_path, Precision.bf16, 2, lr=1e-4) as (_, plain):
        pass
    with updates(tmp_path, Precision.bf16, 2, lr=1e-4, gradient_checkpointing=True) as (_, spared):
        pass
    lora = LoraConfig(rank=8, alpha=16)
    with updates(tmp_path, Precision.bf16, 2, lr=1e-2, lora=lora) as (rank, adapted):
        merged = {n for bucket in rank.weight_buckets(1 << 28) for n in bucket}
    tell(plain=plain, checkpointed=spared, adapters=adapted)
    assert spared == pytest.approx(plain, rel=0.01, abs=0.005)
    assert adapted[2] < adapted[0] and not [name for name in merged if "lora" in name]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", Precision)
def test_learner_attention(
    backend: AttentionBackend, precision: Precision, tmp_path: Path, tell: Tell
) -> None:
    """Trees by this backend against flat sequences in fp32 by the reference."""
    if backend is AttentionBackend.paths and precision is Precision.fp32:
        pytest.skip("flash attention has no fp32")
    made = trees(2, 60, 290)
    flat = passed(tmp_path, made, AttentionBackend.blocks, Precision.fp32, None)
    tree = passed(tmp_path, made, backend, precision, 0.0)
    error = abs(tree[0] - flat[0]) / max(abs(flat[0]), 1e-3)
    gradient = float((tree[1] - flat[1]).norm() / flat[1].norm())
    tell(likelihood_error=error, gradient_error=gradient, tokens=tree[2], flat_tokens=flat[2])
    # Triton multiplies fp32 in tf32 unless it is told otherwise.
    wide = 1e-4 if backend is AttentionBackend.blocks else 5e-3
    limit = wide if precision is Precision.fp32 else 0.05
    assert tree[2] < 0.8 * flat[2]
    assert error <= limit and gradient <= limit


def passed(
    folder: Path,
    made: list[TrainTree],
    backend: AttentionBackend,
    precision: Precision,
    share_gain: float | None,
) -> tuple[float, torch.Tensor, int]:
    """Weighted log-likelihood, gradient of the surrogate, and tokens of the passes."""
    policy = PolicyModule(build(folder, SMALL, precision, spread=0.05).train())
    policy.model.set_attn_implementation(IMPLEMENTATION)
    layout = BatchLayout(DEVICE, backend, DTYPES[precision])
    rules = PlanRules(
        max_tokens=4096, world_size=1, cost=policy.cost(), share_gain=share_gain, padded=False
    )
    planned, likelihood = plan(made, rules), 0.0
    for items in planned.ranks[0]:
        batch = collate(Pack(items), layout)
        logp, entropy = policy(batch.inputs, 1.0)
        tokens = TokenBatch(columns=batch.columns, old_logp=logp.detach(), entropy=entropy)
        surrogate_loss(logp, tokens, ClipConfig(), LossConfig())[0].backward()
        likelihood += float((batch.columns.weight * logp).sum().detach())
    grads = [p.grad.float().flatten() for p in policy.parameters() if p.grad is not None]
    return likelihood, torch.cat(grads).cpu(), planned.actual.tokens


def test_learner_head_of_150k_tokens(tell: Tell) -> None:
    """Log-probabilities of 8,192 tokens never need all of their logits at once."""
    rows, vocabulary, hidden = (512 if ON_CPU else 8192), 150_000, 256
    dtype = torch.float32 if ON_CPU else torch.bfloat16
    head = LogProbHead(torch.nn.Linear(hidden, vocabulary, bias=False, device=DEVICE, dtype=dtype))
    states = torch.randn(rows, hidden, device=DEVICE, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocabulary, (rows,), device=DEVICE)
    with peak_bytes() as peak:
        head(states, targets, 1.0)[0].sum().backward()
    logits = rows * vocabulary * 4
    tell(peak_mb=peak[0] / 1e6, logits_mb=logits / 1e6)
    assert head.weight.grad is not None and head.weight.grad.isfinite().all()
    assert peak[0] < (2.5 if ON_CPU else 0.4) * logits


def test_learner_memory_is_as_predicted(tmp_path: Path, tell: Tell) -> None:
    """The peak of an update and what `check_only` says of it, within 15 %."""
    build(tmp_path, LARGE, Precision.bf16, spread=0.02)
    tokens = 1024 if ON_CPU else 16384
    config = composed(
        ["+experiment=aime_1gpu", f"model.path={tmp_path}", f"model.max_context={tokens}",
         "learner.gradient_checkpointing=false", f"learner.max_tokens_per_pack={tokens}",
         f"cold_start.max_tokens={tokens}"]
    )  # fmt: skip
    settings = learner_settings(Precision.bf16, 2, tokens)
    made, full = trees(1, tokens // 10, LARGE["vocab_size"]), TrainForest(minibatches=[])
    full.minibatches.append(made)
    shape = ModelShape.of({**LARGE, "tie_word_embeddings": True, "model_type": "qwen2"})
    with peak_bytes(from_start=True) as peak, learner(tmp_path, settings) as rank:
        for _ in range(2):
            updated(rank, full)
    used = len(made[0].ids) / tokens
    predicted = rank_peak(config, shape)
    tell(peak_gib=peak[0] / 2**30, predicted_gib=predicted / 2**30, share_of_the_pack=used)
    assert peak[0] <= 1.15 * predicted
    if not ON_CPU:  # there the head's chunks are smaller and rule a small model's peak
        assert peak[0] >= 0.85 * predicted


@contextmanager
def peak_bytes(*, from_start: bool = False) -> Iterator[list[int]]:
    """Most bytes of tensors that the block held, beyond those before it unless `from_start`. On CPU
    they are counted by the profiler, from the block's beginning on."""
    found = [0]
    if ON_CPU:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            yield found
        events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        total = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                total += event.nbytes()
                found[0] = max(found[0], total)
        return
    gc.collect()  # a model that was built before and is no longer used
    torch.cuda.synchronize()
    before = 0 if from_start else torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield found
    torch.cuda.synchronize()
    found[0] = torch.cuda.max_memory_allocated() - before
