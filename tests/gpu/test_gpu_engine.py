"""vLLM on a GPU behind `Policy`: both model runners against transformers, ends of turns, speed."""

from __future__ import annotations

import asyncio
import itertools
import time
from pathlib import Path

import pytest
import torch
from transformers import Qwen2ForCausalLM

from elpo_ray.config.model import Precision
from elpo_ray.rollout.engine import Engine
from elpo_ray.types import FinishReason, Sampling
from tests.gpu.conftest import Tell
from tests.gpu.devices import (
    HALF_BILLION,
    ON_CPU,
    SMALL,
    build,
    exact,
    make_engine,
    on_gpu,
    started,
)
from tests.real.engines import END_OF_TURN

MEAN = {Precision.bf16: (0.02, 0.5), Precision.fp32: (1e-4, 2e-3)}
"""Mean and largest differences of log-probs and entropies, nats, from transformers in fp32."""

SPREAD = {Precision.bf16: 0.05, Precision.fp32: 0.15}
"""Spread of the random weights. In bf16 the same weights give log-probs that differ from those of
fp32 by a share of the logits' spread: counted on CPU, 0.007 nats with 0.05, and 0.05 with 0.15."""

SECOND = on_gpu("vLLM's second model runner needs Triton, which drives GPUs only")
CASES = [
    pytest.param("1", Precision.bf16, False, id="v2-bf16-graphs", marks=SECOND),
    pytest.param("0", Precision.bf16, True, id="v1-bf16-eager"),
    pytest.param("1", Precision.fp32, True, id="v2-fp32-eager", marks=SECOND),
]
if ON_CPU:  # on GPUs the second runner, which is vLLM's default there, shows fp32
    CASES.append(pytest.param("0", Precision.fp32, True, id="v1-fp32-eager"))


@pytest.mark.parametrize(("runner", "precision", "eager"), CASES)
async def test_engine(
    runner: str,
    precision: Precision,
    eager: bool,
    tmp_path: Path,
    tell: Tell,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    model = build(tmp_path, SMALL, precision, spread=SPREAD[precision]).float()
    began = time.perf_counter()
    async with started(make_engine(tmp_path, precision, eager=eager, share=0.1)) as engine:
        tell(start_s=time.perf_counter() - began)
        await check_distributions(engine, model, precision, tell)
        await check_prefix_cache(engine, model, precision, tell)
        await check_seeds(engine, precision, tell)
        await check_ends(engine)


def prefixes(count: int) -> list[list[int]]:
    return [[2 + (7 * i + 11 * j) % 290 for j in range(5 + 3 * i)] for i in range(count)]


async def check_distributions(
    engine: Engine, model: Qwen2ForCausalLM, precision: Precision, tell: Tell
) -> None:
    """Log-probs and entropies are those of the distribution that was sampled: in a mixed batch, and
    in one where no request needs its logits processed."""
    kinds = {
        "plain": [(1.0, 1.0)],
        "mixed": [(1.0, 1.0), (0.7, 1.0), (1.0, 0.5), (0.0, 1.0)],
    }
    for name, pairs in kinds.items():
        jobs = [
            (prefix, Sampling(temperature=t, top_p=p, max_tokens=24, seed=i))
            for i, (prefix, (t, p)) in enumerate(itertools.product(prefixes(16), pairs))
        ]
        turns = await asyncio.gather(*(engine.generate(*job) for job in jobs))
        logp, entropy, outside, tokens = [], [], 0, 0
        for (prefix, sampling), turn in zip(jobs, turns, strict=True):
            assert turn.weight_version == 0
            assert len(turn.token_ids) == len(turn.logprobs) == len(turn.entropies)
            wanted = exact(model, prefix, turn, sampling.temperature or 1.0, sampling.top_p)
            # Rounding moves tokens over the edge of a nucleus, and the nucleus with them.
            inside = wanted[0].isfinite()
            if sampling.top_p < 1:
                near = (wanted[1] - torch.tensor(turn.entropies)).abs() < 0.3
                outside, inside = outside + int((~(inside & near)).sum()), inside & near
            tokens += len(inside)
            logp.append((torch.tensor(turn.logprobs).double() - wanted[0])[inside].abs())
            entropy.append((torch.tensor(turn.entropies).double() - wanted[1])[inside].abs())
        errors = {"logp": torch.cat(logp), "entropy": torch.cat(entropy)}
        tell(
            kind=name, tokens=tokens, at_the_edge_of_a_nucleus=outside,
            **{f"{k}_mean": float(v.mean()) for k, v in errors.items()},
            **{f"{k}_max": float(v.max()) for k, v in errors.items()},
        )  # fmt: skip
        mean, largest = MEAN[precision]
        for values in errors.values():
            assert values.mean() <= mean and values.max() <= largest
        assert outside <= 0.02 * tokens
        assert len({turn.token_ids for turn in turns}) > len(turns) // 4


async def check_prefix_cache(
    engine: Engine, model: Qwen2ForCausalLM, precision: Precision, tell: Tell
) -> None:
    """A prefix that was seen is not computed again, and what follows it is the same."""
    prefix = [2 + (13 * j) % 290 for j in range(400)]
    first = await engine.generate(prefix, Sampling(max_tokens=8, seed=1))
    again = await engine.generate(prefix, Sampling(max_tokens=8, seed=1))
    tell(cached_before=first.cached_tokens, cached_after=again.cached_tokens)
    assert first.cached_tokens < 100 and again.cached_tokens >= 350
    wanted = exact(model, prefix, again, 1.0)[0]
    assert (torch.tensor(again.logprobs).double() - wanted).abs().mean() <= MEAN[precision][0]


async def check_seeds(engine: Engine, precision: Precision, tell: Tell) -> None:
    """A seed decides a turn. In a crowd other kernels may round otherwise, in bf16 visibly."""
    jobs = [(prefix, Sampling(max_tokens=12, seed=i)) for i, prefix in enumerate(prefixes(8))]
    alone = [(await engine.generate(*job)).token_ids for job in jobs]
    again = [(await engine.generate(*job)).token_ids for job in jobs]
    other = (await engine.generate(jobs[0][0], Sampling(max_tokens=12, seed=99))).token_ids
    crowd = [t.token_ids for t in await asyncio.gather(*(engine.generate(*job) for job in jobs))]
    same = sum(a == b for a, b in zip(alone, crowd, strict=True))
    tell(same_again=sum(a == b for a, b in zip(alone, again, strict=True)), same_in_a_crowd=same)
    assert other != alone[0]
    # Cached prefixes split attention otherwise than the first time.
    assert sum(a == b for a, b in zip(alone, again, strict=True)) >= 6
    assert same >= (8 if precision is Precision.fp32 and ON_CPU else 4)


async def check_ends(engine: Engine) -> None:
    """The end-of-turn token is the last id; token limit and context cut a turn short."""
    hot = Sampling(temperature=2.0, max_tokens=700, seed=1)
    jobs = [(prefix, Sampling(temperature=2.0, max_tokens=700, seed=i))
            for i, prefix in enumerate(prefixes(16))]  # fmt: skip
    turns = await asyncio.gather(*(engine.generate(*job) for job in jobs))
    stopped = [turn for turn in turns if turn.finish is FinishReason.STOP]
    assert stopped
    for turn in stopped:
        assert turn.token_ids.index(END_OF_TURN) == len(turn.token_ids) - 1
    cut = await engine.generate([5, 6], Sampling(temperature=2.0, max_tokens=3, seed=1))
    assert (cut.finish, len(cut.token_ids)) == (FinishReason.LENGTH, 3)
    full = await engine.generate([5] * 1022, hot)
    assert len(full.token_ids) <= 2
    first, *_ = (await engine.generate([5, 6], Sampling(temperature=0.0, max_tokens=5))).token_ids
    engine.end_turns_at([first])
    ended = await engine.generate([5, 6], Sampling(temperature=0.0, max_tokens=5))
    assert (ended.finish, ended.token_ids) == (FinishReason.STOP, (first,))


async def test_engine_speed(tmp_path: Path, tell: Tell) -> None:
    """Half a billion parameters: tokens a second, and the time to the first token."""
    shape = SMALL if ON_CPU else HALF_BILLION
    build(tmp_path, shape, Precision.bf16, spread=0.05)
    began = time.perf_counter()
    engine = make_engine(tmp_path, Precision.bf16, eager=False, share=0.5)
    async with started(engine):
        await engine.generate([5, 6, 7], Sampling(max_tokens=1, seed=0))
        first = time.perf_counter() - began
        count, length = (8, 16) if ON_CPU else (256, 256)
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
        tell(first_token_s=first, tokens=tokens, tokens_per_s=tokens / seconds)
        assert tokens > count
