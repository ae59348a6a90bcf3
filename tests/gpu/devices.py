"""The device that the tests of this folder run on, and models, engines and learners on it."""

from __future__ import annotations

import asyncio
import gc
import os
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from elpo_ray.config.learner import LearnerConfig, OptimizerConfig
from elpo_ray.config.model import ModelConfig, Precision
from elpo_ray.config.rollout import EngineConfig, Transfer
from elpo_ray.config.run import ClusterConfig
from elpo_ray.learner.backend import LearnerSettings, RankProcess
from elpo_ray.learner.rank import LearnerRank
from elpo_ray.rollout.engine import Engine
from elpo_ray.types import Turn
from tests.real.engines import END_OF_TURN
from tests.real.ranks import free_port

ON_CPU = os.environ.get("ELPO_GPU_TESTS") == "cpu"
"""Tried without a GPU."""
DEVICE = torch.device("cpu" if ON_CPU else "cuda")


def on_gpu(why: str) -> pytest.MarkDecorator:
    """A mark for what cannot be tried on CPU, with the reason."""
    return pytest.mark.skipif(ON_CPU, reason=f"not on CPU: {why}")


DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}

SMALL = {"vocab_size": 300, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
HALF_BILLION = {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
                "num_hidden_layers": 24, "num_attention_heads": 14,
                "num_key_value_heads": 2}  # fmt: skip
"""Qwen2.5-0.5B's."""
LARGE = {**SMALL, "vocab_size": 2000} if ON_CPU else HALF_BILLION
"""The model of the tests that look at memory."""


@cache
def gpu_count() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def build(
    folder: Path,
    shape: dict[str, int],
    precision: Precision,
    *,
    spread: float = 0.15,
    context: int = 4096,
) -> Qwen2ForCausalLM:
    """A random Qwen2 on the device, saved to `folder`; with this spread entropies vary."""
    torch.manual_seed(0)
    config = Qwen2Config(
        **shape, max_position_embeddings=context, tie_word_embeddings=True, bos_token_id=0,
        eos_token_id=END_OF_TURN, initializer_range=spread, dtype=DTYPES[precision],
    )  # fmt: skip
    with DEVICE:
        model = Qwen2ForCausalLM(config).to(DTYPES[precision]).eval()
    model.save_pretrained(folder)
    return model


def make_engine(
    folder: Path,
    precision: Precision,
    *,
    transfer: Transfer = Transfer.host,
    eager: bool = True,
    share: float = 0.3,
    context: int = 1024,
) -> Engine:
    """An engine that can sleep, not yet started. On CPU weights come through host memory."""
    return Engine(
        folder,
        ModelConfig(path=str(folder), max_context=context, precision=precision),
        EngineConfig(
            max_num_seqs=256,
            enforce_eager=eager or ON_CPU,
            transfer=Transfer.host if ON_CPU else transfer,
            gpu_memory_utilization=share,
        ),
        ClusterConfig(gpus=not ON_CPU, colocated=True, engine_threads=2),
        0,
    )


@asynccontextmanager
async def started(engine: Engine) -> AsyncIterator[Engine]:
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()
        gc.collect()


@torch.no_grad()
def exact(
    model: Qwen2ForCausalLM, prefix: list[int], turn: Turn, temperature: float, top_p: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of a turn's tokens and the entropies of their distributions by transformers, nats.
    With `top_p` those of the nucleus, -inf for what it does not hold."""
    ids = torch.tensor([[*prefix, *turn.token_ids]], device=DEVICE)
    logits = model(ids).logits[0, len(prefix) - 1 : -1].double() / temperature
    logprobs = logits.log_softmax(-1)
    if top_p < 1:
        ordered, order = logprobs.sort(-1, descending=True)
        out = ordered.exp().cumsum(-1) - ordered.exp() >= top_p
        logprobs = logprobs.masked_fill(out.gather(-1, order.argsort(-1)), -torch.inf)
        logprobs = logprobs.log_softmax(-1)
    chosen = logprobs.gather(-1, ids[0, len(prefix) :, None]).squeeze(-1)
    return chosen.cpu(), torch.special.entr(logprobs.exp()).sum(-1).cpu()


def learner_settings(
    precision: Precision, stage: int, tokens: int, **changes: Any
) -> LearnerSettings:
    learner = LearnerConfig(
        zero_stage=stage,
        max_tokens_per_pack=tokens,
        optimizer=OptimizerConfig(lr=changes.pop("lr", 1e-3), weight_decay=0.0),
        **changes,
    )
    model = ModelConfig(path="unused", max_context=min(tokens, 4096), precision=precision)
    return LearnerSettings(model=model, learner=learner)


@contextmanager
def learner(folder: Path, settings: LearnerSettings) -> Iterator[LearnerRank]:
    """One rank in this process. All of them share one process group, which stays."""
    process = RankProcess(master_port=free_port(), gpu=not ON_CPU, threads=2)
    rank = LearnerRank(folder, settings, process, total_steps=100)
    try:
        yield rank
    finally:
        rank._engine.destroy()
        del rank
        gc.collect()
        if not ON_CPU:
            torch.cuda.empty_cache()


def weights_of(rank: LearnerRank, shape: dict[str, int], precision: Precision) -> Qwen2ForCausalLM:
    """A plain transformers model with the learner's weights."""
    with tempfile.TemporaryDirectory() as scratch:
        model = build(Path(scratch), shape, precision)
    state: dict[str, torch.Tensor] = {}
    for bucket in rank.weight_buckets(1 << 28):
        state |= {name: tensor.clone() for name, tensor in bucket.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    model.tie_weights()
    return model


def free_gib() -> float:
    """GiB of the GPU that nobody uses; 0 on CPU."""
    if ON_CPU:
        return 0.0
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0] / 2**30


class Background:
    """An event loop in a thread: an engine lives there while a learner works in this one."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Any], timeout_s: float = 240) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_s)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()


@dataclass
class Timer:
    """Seconds by name."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began
