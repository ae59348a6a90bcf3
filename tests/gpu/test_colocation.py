"""An engine and a learner on one GPU: who sleeps gives its memory back, and weights get across."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import pytest
import torch

from elpo_ray.config.model import Precision
from elpo_ray.config.rollout import Transfer
from elpo_ray.learner.rank import LearnerRank
from elpo_ray.rollout.engine import Engine
from elpo_ray.types import Sampling, Turn
from elpo_ray.weights.host import HostPublisher
from elpo_ray.weights.protocol import Publisher
from tests.gpu.conftest import Tell
from tests.gpu.devices import (
    LARGE,
    ON_CPU,
    Background,
    Timer,
    build,
    exact,
    free_gib,
    learner,
    learner_settings,
    make_engine,
    on_gpu,
    weights_of,
)
from tests.real.engines import Handles
from tests.real.ranks import build_forest, updated

PRECISION = Precision.fp32 if ON_CPU else Precision.bf16
MEAN = 1e-4 if ON_CPU else 0.02
BUCKET = 256 << 20
PREFIXES = [[2 + (7 * i + 11 * j) % 290 for j in range(5 + 3 * i)] for i in range(16)]


async def sampled(engine: Engine) -> list[Turn]:
    jobs = [(prefix, Sampling(max_tokens=16, seed=i)) for i, prefix in enumerate(PREFIXES)]
    return list(await asyncio.gather(*(engine.generate(*job) for job in jobs)))


def disagreement(rank: LearnerRank, turns: list[Turn]) -> float:
    """Mean difference between the engine's log-probs and those of transformers in fp32 with the
    learner's weights, nats."""
    model = weights_of(rank, LARGE, Precision.fp32)
    errors = [
        (torch.tensor(turn.logprobs).double() - exact(model, prefix, turn, 1.0)[0]).abs()
        for prefix, turn in zip(PREFIXES, turns, strict=True)
    ]
    return float(torch.cat(errors).mean())


SHARED = on_gpu("memory of a GPU is what both sides share")


@pytest.mark.parametrize("transfer", [pytest.param(Transfer.ipc, marks=SHARED), Transfer.host])
def test_colocation(transfer: Transfer, tmp_path: Path, tell: Tell) -> None:
    build(tmp_path, LARGE, PRECISION, spread=0.02)
    watch, back = Timer(), Background()
    engine = make_engine(tmp_path, PRECISION, transfer=transfer, share=0.3)
    settings = learner_settings(PRECISION, 2, 4096, lr=1e-3)
    try:
        with learner(tmp_path, settings) as rank:
            rank.offload()
            with watch.of("start"):
                back.run(engine.start())
            publisher = back.run(connected(rank, engine, transfer))
            before = back.run(sampled(engine))
            awake = free_gib()
            with watch.of("sleep"):
                back.run(engine.sleep())
            asleep = free_gib()
            with watch.of("onload"):
                rank.onload()
            on_device = free_gib()
            agreed = disagreement(rank, before)
            updated(rank, build_forest(6, 3))
            for version in (1, 2):
                with watch.of(f"publish_{version}"):
                    publisher.publish(version)
            behind = disagreement(rank, before)
            size = sum(t.nbytes for b in rank.weight_buckets(BUCKET) for t in b.values())
            with watch.of("offload"):
                rank.offload()
            offloaded = free_gib()
            with watch.of("wake"):
                back.run(engine.wake())
            after = back.run(sampled(engine))
            rank.onload()
            agree_again = disagreement(rank, after)
            tell(
                before=agreed, learned=behind, after=agree_again,
                versions=sorted({turn.weight_version for turn in after}),
                sleep_freed_gib=asleep - awake, learner_gib=asleep - on_device,
                offload_freed_gib=offloaded - on_device, gb=size / 1e9,
                sync_gb_per_s=size / 1e9 / watch.seconds["publish_2"], **watch.seconds,
            )  # fmt: skip
            assert {turn.weight_version for turn in before} == {0}
            assert {turn.weight_version for turn in after} == {2}
            assert agreed <= MEAN and agree_again <= MEAN
            assert behind > 3 * agreed, "the learner has moved away from what was sampled"
            if not ON_CPU:
                assert asleep - awake > 5, "the cache at least is gone"
                assert offloaded > on_device
    finally:
        back.run(engine.stop())
        back.close()


async def connected(rank: LearnerRank, engine: Engine, transfer: Transfer) -> Publisher:
    """A publisher whose handles belong to the engine's loop. IPC agrees with the engine at once, so
    it is made in another thread."""
    handles = Handles(engine)  # it takes the running loop
    if transfer is Transfer.host:
        return HostPublisher(0, handles, rank.weight_buckets, BUCKET)
    from elpo_ray.weights.gpu import BucketSource, GpuPublisher

    source = BucketSource(partial(rank.weight_buckets, everywhere=True), BUCKET)
    lent = max(BUCKET, rank.largest_weight)
    return await asyncio.to_thread(GpuPublisher.ipc, 0, handles, source, [1], lent)
