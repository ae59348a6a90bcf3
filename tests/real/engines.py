"""A tiny random Qwen2 folder (no tokenizer), engines on it, and what the model itself would say."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from elpo_ray.config.model import ModelConfig, Precision
from elpo_ray.config.rollout import EngineConfig, Transfer
from elpo_ray.config.run import ClusterConfig
from elpo_ray.rollout.engine import Engine
from elpo_ray.types import Sampling
from elpo_ray.weights.host import HostPublisher
from elpo_ray.weights.protocol import Part

VOCAB = 300
END_OF_TURN = 1
MAX_CONTEXT = 512
PREFIX = [2 + (13 * j) % 290 for j in range(100)]
"""Three cache blocks and a rest."""
GREEDY = Sampling(temperature=0.0, max_tokens=8)


def build_qwen2(folder: Path, *, tied: bool = True, seed: int = 0) -> Qwen2ForCausalLM:
    """A random 2-layer Qwen2 in float32, saved to `folder`; sharp enough that entropies vary."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=2 * MAX_CONTEXT,
            tie_word_embeddings=tied,
            bos_token_id=0,
            eos_token_id=END_OF_TURN,
            initializer_range=0.15,
        )
    )
    model = model.float().eval()
    model.save_pretrained(folder)
    return model


def engine_on(folder: Path, max_context: int = MAX_CONTEXT) -> Engine:
    """An engine that is not yet started."""
    model = ModelConfig(path=str(folder), max_context=max_context, precision=Precision.fp32)
    config = EngineConfig(max_num_seqs=64, enforce_eager=True, transfer=Transfer.host)
    return Engine(folder, model, config, ClusterConfig(gpus=False, engine_threads=2), 0)


@asynccontextmanager
async def running(folder: Path, max_context: int = MAX_CONTEXT) -> AsyncIterator[Engine]:
    """A started engine, stopped afterwards."""
    engine = engine_on(folder, max_context)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()
        gc.collect()  # what vLLM leaves must not be found when the interpreter ends


@torch.no_grad()
def exact(
    model: Qwen2ForCausalLM, prefix: list[int], token_ids: tuple[int, ...], temperature: float
) -> tuple[list[float], list[float]]:
    """Log-probs of `token_ids` after `prefix`, and the entropies of their distributions, nats."""
    ids = torch.tensor([[*prefix, *token_ids]])
    logits = model(ids).logits[0, len(prefix) - 1 : -1].double()
    logprobs = (logits / temperature).log_softmax(-1)
    chosen = logprobs.gather(-1, torch.tensor(token_ids).unsqueeze(-1)).squeeze(-1)
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    return chosen.tolist(), entropies.tolist()


class Handles:
    """One engine, called from another thread as the learner calls actors."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()

    def join_transfer(self, init_infos: Sequence[dict[str, Any]]) -> None:
        self._begin(self._engine.join_transfer(init_infos[0]))()

    def begin_update(self) -> None:
        self._begin(self._engine.begin_update())()

    def receive(self, part: Part) -> Callable[[], None]:
        return self._begin(self._engine.receive(part))

    def finish_update(self, version: int) -> None:
        self._begin(self._engine.finish_update(version))()

    def abandon_update(self) -> None:
        self._begin(self._engine.abandon_update())()

    def _begin(self, coroutine: Coroutine[Any, Any, None]) -> Callable[[], None]:
        sent = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        return lambda: sent.result(60)


def buckets(model: Qwen2ForCausalLM, max_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    bucket: dict[str, torch.Tensor] = {}
    for name, tensor in model.named_parameters():
        if sum(t.nbytes for t in bucket.values()) + tensor.nbytes > max_bytes and bucket:
            yield bucket
            bucket = {}
        bucket[name] = tensor.detach()
    yield bucket


async def publish(engine: Engine, model: Qwen2ForCausalLM, max_bytes: int = 1 << 30) -> int:
    """Have `engine` serve `model` as its next version, which is returned."""
    version = engine.version + 1
    publisher = HostPublisher(0, Handles(engine), lambda size: buckets(model, size), max_bytes)
    await asyncio.to_thread(publisher.publish, version)
    return version


async def assert_serves(engine: Engine, model: Qwen2ForCausalLM, version: int) -> None:
    turn = await engine.generate(PREFIX, GREEDY)
    logprobs, entropies = exact(model, PREFIX, turn.token_ids, 1.0)
    assert turn.logprobs == pytest.approx(logprobs, abs=1e-4)
    assert turn.entropies == pytest.approx(entropies, abs=1e-4)
    assert turn.weight_version == version
