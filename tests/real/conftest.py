"""A tiny random Qwen2 folder (no tokenizer) and an engine on it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from elpo_ray.config import ClusterConfig, EngineConfig, ModelConfig, Precision, Transfer
from elpo_ray.engine import Engine

VOCAB = 300
END_OF_TURN = 1
MAX_CONTEXT = 512


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


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs keep the models of their cold starts."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that ranks of a learner load."""
    from ranks import build_model  # with the learner, which most tests here do not need

    return build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ranks of a learner leave things."""
    return tmp_path_factory.mktemp("work")


def engine_on(folder: Path) -> Engine:
    """Not yet started."""
    model = ModelConfig(path=str(folder), max_context=MAX_CONTEXT, precision=Precision.fp32)
    config = EngineConfig(max_num_seqs=64, enforce_eager=True, transfer=Transfer.host)
    return Engine(folder, model, config, ClusterConfig(gpus=False, engine_threads=2), 0)


Running = Callable[[Path], AbstractAsyncContextManager[Engine]]


@pytest.fixture
def running() -> Running:
    """`async with running(folder) as engine`: a started engine, stopped afterwards."""

    @asynccontextmanager
    async def run(folder: Path) -> AsyncIterator[Engine]:
        engine = engine_on(folder)
        await engine.start()
        try:
            yield engine
        finally:
            await engine.stop()

    return run


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
