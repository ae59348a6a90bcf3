"""Weights of a 0.5 B-parameter model from a publisher into a serving engine."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from statistics import median
from typing import Any

import ray

from benchmarks.rollouts.setup import Values, local_ray, quickstart
from elpo_ray.cluster.rollout_actor import RemoteEngines, RolloutActor, make_engine
from elpo_ray.config import Config
from elpo_ray.weights.host import HostPublisher


def measure(args: argparse.Namespace) -> Values:
    """Random weights in the shape of Qwen2.5-0.5B, bfloat16."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
        max_position_embeddings=2048, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(shape).to(torch.bfloat16)
        model.save_pretrained(folder)
        config = quickstart(
            "model.precision=bf16", "model.max_context=1024", "task.max_turn_tokens=64", *args.set
        )
        tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
        size = sum(tensor.nbytes for tensor in tensors.values())

        def buckets(max_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
            bucket: dict[str, torch.Tensor] = {}
            for name, tensor in tensors.items():
                if bucket and sum(t.nbytes for t in bucket.values()) + tensor.nbytes > max_bytes:
                    yield bucket
                    bucket = {}
                bucket[name] = tensor
            yield bucket

        with local_ray():
            actor: Any = ray.remote(BareEngineActor).options(max_concurrency=8).remote()
            ray.get(actor.start.remote(config, folder, []))
            publisher = HostPublisher(0, RemoteEngines([actor], 600), buckets, 256 << 20)
            seconds = []
            for version in range(1, args.pairs + 3):
                began = time.perf_counter()
                publisher.publish(version)
                seconds.append(time.perf_counter() - began)
            phases = ray.get(actor.phases.remote())
    warm = median(seconds[2:])  # until then memory is new: its first touch costs more than the copy
    return {
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "gb": size / 1e9,
        "seconds_each": seconds,
        "seconds": warm,
        "gb_per_s": size / 1e9 / warm,
        "seconds_by_call": phases,
    }


class BareEngineActor(RolloutActor):
    """An engine without task and tools, its calls timed."""

    async def start(self, config: Config, folder: str, sandboxes: list[Any]) -> None:
        self.engine = make_engine(config, folder)
        self.timed: dict[str, float] = {}
        for method in (self.engine.begin_update, self.engine.receive, self.engine.finish_update):
            setattr(self.engine, method.__name__, self.timing(method))
        await self.engine.start()

    def timing(self, method: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        async def timed(*args: Any) -> None:
            began = time.perf_counter()
            await method(*args)
            spent = time.perf_counter() - began
            self.timed[method.__name__] = self.timed.get(method.__name__, 0.0) + spent

        return timed

    async def phases(self) -> dict[str, float]:
        return self.timed
