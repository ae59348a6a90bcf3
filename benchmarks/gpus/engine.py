"""One engine: how fast it starts and decodes, and how it shares a GPU with a learner's weights."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from transformers import Qwen2ForCausalLM

from benchmarks.learner import MODELS
from elpo_ray.config.model import Precision
from elpo_ray.config.rollout import Transfer
from elpo_ray.types import Sampling
from elpo_ray.weights.host import HostPublisher
from elpo_ray.weights.protocol import Publisher
from tests.gpu.devices import SMALL, build, free_gib, make_engine, started
from tests.real.engines import Handles, buckets

BUCKET = 256 << 20
ROUNDS = 4


def shape_of(tiny: bool) -> dict[str, int]:
    return SMALL if tiny else MODELS["Qwen2.5-1.5B"]


def speed(*, tiny: bool, graphs: bool) -> dict[str, Any]:
    """Start to first token, and tokens a second of 256 requests at once."""
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), shape_of(tiny), Precision.bf16, spread=0.02)
        return asyncio.run(_speed(Path(folder), tiny, graphs))


async def _speed(folder: Path, tiny: bool, graphs: bool) -> dict[str, Any]:
    began = time.perf_counter()
    async with started(make_engine(folder, Precision.bf16, eager=not graphs, share=0.5)) as engine:
        start = time.perf_counter() - began
        await engine.generate([5, 6, 7], Sampling(max_tokens=1, seed=0))
        first = time.perf_counter() - began
        count, length = (4, 8) if tiny else (256, 256)
        prompts = [[2 + (i * j) % 290 for j in range(200)] for i in range(count)]
        began = time.perf_counter()
        turns = await asyncio.gather(
            *(
                engine.generate(p, Sampling(max_tokens=length, seed=i))
                for i, p in enumerate(prompts)
            )
        )
        seconds = time.perf_counter() - began
    tokens = sum(len(turn.token_ids) for turn in turns)
    return {
        "graphs": graphs, "start_s": start, "first_token_s": first, "tokens": tokens,
        "tokens_per_s": tokens / seconds,
    }  # fmt: skip


def share(*, tiny: bool) -> dict[str, Any]:
    """Sleep, weights from this process while it sleeps, wake; the best of some rounds."""
    with tempfile.TemporaryDirectory() as folder:
        model = build(Path(folder), shape_of(tiny), Precision.bf16, spread=0.02)
        return asyncio.run(_share(Path(folder), model, tiny))


async def _share(folder: Path, model: Qwen2ForCausalLM, tiny: bool) -> dict[str, Any]:
    engine = make_engine(folder, Precision.bf16, transfer=Transfer.ipc, share=0.5)
    size = sum(tensor.nbytes for tensor in model.parameters())
    rows: list[dict[str, float]] = []
    async with started(engine):
        publisher = await asyncio.to_thread(_publisher, model, Handles(engine), tiny)
        for version in range(1, ROUNDS + 1):
            awake = free_gib()
            row = {"sleep_s": await _timed(engine.sleep())}
            row["sleep_freed_gib"] = free_gib() - awake
            row["sync_s"] = await _timed(asyncio.to_thread(publisher.publish, version))
            row["wake_s"] = await _timed(engine.wake())
            turn = await engine.generate([5, 6, 7], Sampling(max_tokens=4, seed=0))
            assert turn.weight_version == version
            rows.append(row)
            print(json.dumps({"round": version, **row}), file=sys.stderr, flush=True)
    best = {key: min(row[key] for row in rows) for key in rows[0]}
    return {"transfer": "host" if tiny else "ipc", "gb": size / 1e9, **best,
            "sync_gb_per_s": size / 1e9 / best["sync_s"]}  # fmt: skip


async def _timed(work: Any) -> float:
    began = time.perf_counter()
    await work
    return time.perf_counter() - began


def _publisher(model: Qwen2ForCausalLM, handles: Handles, tiny: bool) -> Publisher:
    if tiny:
        return HostPublisher(0, handles, partial(buckets, model), BUCKET)
    from elpo_ray.weights.gpu import BucketSource, GpuPublisher

    lent = max(BUCKET, *(tensor.nbytes for tensor in model.parameters()))
    return GpuPublisher.ipc(0, handles, BucketSource(partial(buckets, model), BUCKET), [1], lent)
