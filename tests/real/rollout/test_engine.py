"""vLLM on CPU behind `Policy`: ids, log-probs, entropies and ends of turns against transformers."""

from __future__ import annotations

import asyncio
import math
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest
import torch
from transformers import Qwen2ForCausalLM

from elpo_ray.rollout.engine import Engine
from elpo_ray.types import FinishReason, Sampling
from tests.processes import ended
from tests.real.engines import END_OF_TURN, MAX_CONTEXT, build_qwen2, engine_on, exact

pytestmark = pytest.mark.real


def prefixes(count: int) -> list[list[int]]:
    return [[2 + (7 * i + 11 * j) % 290 for j in range(5 + i)] for i in range(count)]


@pytest.mark.asyncio(loop_scope="session")
async def test_turns_match_the_model(engine: Engine, qwen2: tuple[Path, Qwen2ForCausalLM]) -> None:
    await check_distribution(engine, qwen2[1])
    await check_ends(engine)
    await check_seeds(engine)
    await check_further_ends(engine)


async def check_distribution(engine: Engine, model: Qwen2ForCausalLM) -> None:
    """Log-probs and full-vocabulary entropies are those of the sampling distribution."""
    jobs = [
        (prefix, Sampling(temperature=temperature, max_tokens=12, seed=i))
        for temperature in (1.0, 0.7)
        for i, prefix in enumerate(prefixes(8))
    ]
    turns = await asyncio.gather(*(engine.generate(*job) for job in jobs))
    assert len({turn.token_ids for turn in turns}) > 8
    for (prefix, sampling), turn in zip(jobs, turns, strict=True):
        assert len(turn.token_ids) == len(turn.logprobs) == len(turn.entropies)
        assert turn.weight_version == engine.version
        logprobs, entropies = exact(model, prefix, turn.token_ids, sampling.temperature)
        assert turn.logprobs == pytest.approx(logprobs, abs=1e-4)
        assert turn.entropies == pytest.approx(entropies, abs=1e-4)
    nucleus = await engine.generate(prefixes(1)[0], Sampling(top_p=0.5, max_tokens=5, seed=3))
    assert all(0 <= h < math.log(300) for h in nucleus.entropies)
    greedy = await engine.generate(prefixes(1)[0], Sampling(temperature=0.0, max_tokens=5))
    logprobs, entropies = exact(model, prefixes(1)[0], greedy.token_ids, 1.0)
    assert greedy.logprobs == pytest.approx(logprobs, abs=1e-4)
    assert greedy.entropies == pytest.approx(entropies, abs=1e-4)


async def check_ends(engine: Engine) -> None:
    """The end-of-turn token is the last id; token limit and context cut a turn short."""
    many = await asyncio.gather(
        *(
            engine.generate(prefix, Sampling(temperature=2.0, max_tokens=400, seed=i))
            for i, prefix in enumerate(prefixes(16))
        )
    )
    stopped = [turn for turn in many if turn.finish is FinishReason.STOP]
    assert stopped
    for turn in stopped:
        assert turn.token_ids[-1] == END_OF_TURN
        assert END_OF_TURN not in turn.token_ids[:-1]
    cut = await engine.generate([5, 6], Sampling(temperature=2.0, max_tokens=3, seed=1))
    assert (cut.finish, len(cut.token_ids)) == (FinishReason.LENGTH, 3)
    full = await engine.generate([5] * (MAX_CONTEXT - 2), Sampling(max_tokens=9, seed=1))
    assert (full.finish, len(full.token_ids)) == (FinishReason.LENGTH, 2)
    with pytest.raises(ValueError, match=f"model.max_context={MAX_CONTEXT}"):
        await engine.generate([5] * MAX_CONTEXT, Sampling(max_tokens=1))


async def check_further_ends(engine: Engine) -> None:
    """A turn also ends at the tokens that a chat template adds."""
    greedy = Sampling(temperature=0.0, max_tokens=5)
    first, *_ = (await engine.generate(prefixes(1)[0], greedy)).token_ids
    ends = engine._stop_ids
    engine.end_turns_at([first])
    turn = await engine.generate(prefixes(1)[0], greedy)
    engine._stop_ids = ends  # others share the engine
    assert (turn.finish, turn.token_ids) == (FinishReason.STOP, (first,))


async def check_seeds(engine: Engine) -> None:
    """A seeded turn is the same alone and in a crowd, prompts larger than a step included."""
    long = [2 + j % 290 for j in range(400)]
    alone = await engine.generate(long, Sampling(max_tokens=20, seed=7))
    crowd = [
        engine.generate([*prefix, *long], Sampling(max_tokens=20, seed=i))
        for i, prefix in enumerate(prefixes(24))
    ]
    again, *_ = await asyncio.gather(engine.generate(long, Sampling(max_tokens=20, seed=7)), *crowd)
    other = await engine.generate(long, Sampling(max_tokens=20, seed=8))
    assert again.token_ids == alone.token_ids != other.token_ids


async def test_vllms_process_is_a_clean_fork_and_ends_with_its_owner(tmp_path: Path) -> None:
    """The server that it is forked from has one thread, no connection and the environment that is
    read when a process begins; a killed owner leaves neither of them behind."""
    build_qwen2(tmp_path)
    ours, theirs = multiprocessing.Pipe()
    owner = multiprocessing.get_context("spawn").Process(target=own, args=(tmp_path, theirs))
    owner.start()
    assert ours.poll(120), "the engine does not start"
    turn = ours.recv()
    assert turn.entropies[0] > 0
    family = psutil.Process(owner.pid).children(recursive=True)
    (core,) = [process for process in family if "EngineCore" in " ".join(process.cmdline())]
    server = core.parent()
    assert server.pid != owner.pid
    assert server.num_threads() == 1
    assert not server.net_connections("inet")
    environment = server.environ()
    assert environment["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    assert environment["OMP_NUM_THREADS"] == "2"
    owner.kill()
    owner.join()
    await ended([process.pid for process in family])


def own(folder: Path, pipe: Connection) -> None:
    """Start an engine, send its first turn, and wait for the end."""

    async def run() -> None:
        engine = engine_on(folder)
        await engine.start()
        pipe.send(await engine.generate([5, 6, 7], Sampling(max_tokens=4, seed=0)))
        await asyncio.sleep(600)

    asyncio.run(run())


def test_entropy_of_the_v2_sampler() -> None:
    """The wrapper for vLLM's V2 model runner (GPU only), around a stand-in of its kernel."""
    from vllm.v1.outputs import LogprobsTensors

    from elpo_ray.rollout.vllm_plugin import ENTROPY_ID, with_entropy_v2

    def compute(logits, num_logprobs, sampled, cu_num_logits=None, **kwargs):
        chosen = logits.float().log_softmax(-1).gather(-1, sampled.unsqueeze(-1))
        assert num_logprobs == 0
        return LogprobsTensors(sampled.unsqueeze(-1), chosen, torch.zeros_like(sampled))

    logits = torch.randn(70, 50).bfloat16()
    logits[3, 10:] = -math.inf
    sampled = torch.arange(70) % 10
    scores = with_entropy_v2(compute)(logits, 1, sampled)
    exact_rows = torch.distributions.Categorical(logits=logits.double()).entropy()
    assert scores.logprob_token_ids.tolist() == [[i, ENTROPY_ID] for i in sampled.tolist()]
    assert scores.logprobs[:, 1].tolist() == pytest.approx(exact_rows.tolist(), abs=1e-4)
