"""New weights through host memory into a running vLLM: it then samples as the new model does."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2ForCausalLM

from elpo_ray.rollout.engine import Engine
from elpo_ray.types import Sampling
from elpo_ray.weights.host import HostPublisher, pack
from elpo_ray.weights.protocol import Part, WeightSyncError
from tests.real.conftest import Running, build_qwen2, exact

pytestmark = pytest.mark.real

PREFIX = [2 + (13 * j) % 290 for j in range(100)]
"""Three cache blocks and a rest."""
GREEDY = Sampling(temperature=0.0, max_tokens=8)


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


def perturbed(model: Qwen2ForCausalLM, seed: int) -> Qwen2ForCausalLM:
    """Another model of this shape: every weight moved."""
    torch.manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return other


async def publish(engine: Engine, model: Qwen2ForCausalLM, version: int, max_bytes: int) -> None:
    publisher = HostPublisher(0, Handles(engine), lambda size: buckets(model, size), max_bytes)
    await asyncio.to_thread(publisher.publish, version)


async def assert_serves(engine: Engine, model: Qwen2ForCausalLM, version: int) -> None:
    turn = await engine.generate(PREFIX, GREEDY)
    logprobs, entropies = exact(model, PREFIX, turn.token_ids, 1.0)
    assert turn.logprobs == pytest.approx(logprobs, abs=1e-4)
    assert turn.entropies == pytest.approx(entropies, abs=1e-4)
    assert turn.weight_version == version


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
async def test_an_engine_follows_the_learner(tmp_path: Path, running: Running, tied: bool) -> None:
    model = build_qwen2(tmp_path, tied=tied)
    async with running(tmp_path) as engine:
        await assert_serves(engine, model, 0)
        for version, max_bytes in ((1, 1 << 30), (2, 4096), (3, 50_000)):
            old, model = model, perturbed(model, version)
            before = await engine.generate(PREFIX, GREEDY)
            await publish(engine, model, version, max_bytes)
            await assert_serves(engine, model, version)
            changed, _ = exact(model, PREFIX, before.token_ids, 1.0)
            assert max(abs(a - b) for a, b in zip(before.logprobs, changed, strict=True)) > 0.05
            await assert_refuses(engine, old)
            await assert_serves(engine, model, version)
        await check_one_version_a_turn(engine, model)
        await check_sleep(engine, perturbed(model, 5))


async def assert_refuses(engine: Engine, model: Qwen2ForCausalLM) -> None:
    """Damaged, foreign, mis-shaped, repeated or missing tensors leave the engine as it was."""
    norm = model.model.norm.weight.detach()
    sent = pack({"model.norm.weight": norm})[0]
    damaged = sent.data.copy()
    damaged[5] ^= 1
    refused = {
        "model.norm.weight: the bytes": [replace(sent, data=damaged)],
        "model.nrom.weight: the engine's model has no": pack({"model.nrom.weight": norm}),
        r"model.norm.weight: shape \(63,\)": pack({"model.norm.weight": norm[1:].clone()}),
        "model.norm.weight: sent twice": [sent, sent],
    }
    for message, bucket in refused.items():
        await engine.begin_update()
        with pytest.raises(WeightSyncError, match=message):
            await engine.receive(bucket)
        await engine.abandon_update()
    half, foreign = {"model.norm.weight": norm}, {"model.nrom.weight": norm}
    for message, parts in (("never sent", [half]), ("has no such tensor", [foreign, half])):
        publisher = HostPublisher(0, Handles(engine), lambda size, p=parts: iter(p), 1)
        with pytest.raises(WeightSyncError, match=message):
            await asyncio.to_thread(publisher.publish, 99)


async def check_one_version_a_turn(engine: Engine, model: Qwen2ForCausalLM) -> None:
    """An update waits for the turns in flight and holds back those that come meanwhile."""
    new = perturbed(model, 4)
    early = asyncio.create_task(engine.generate(PREFIX, Sampling(max_tokens=300, seed=3)))
    await asyncio.sleep(0.05)
    update = asyncio.create_task(publish(engine, new, 4, 1 << 30))
    await asyncio.sleep(0.02)
    late = asyncio.create_task(engine.generate(PREFIX, GREEDY))
    await update
    for task, source, version in ((early, model, 3), (late, new, 4)):
        turn = await task
        logprobs, _ = exact(source, PREFIX, turn.token_ids, 1.0)
        assert turn.weight_version == version
        assert turn.logprobs == pytest.approx(logprobs, abs=2e-4)


async def check_sleep(engine: Engine, model: Qwen2ForCausalLM) -> None:
    """Asleep it holds turns back and takes weights, as on a GPU that it shares with a learner; on
    CPU its memory stays."""
    await engine.sleep()
    await engine.sleep()
    held_back = asyncio.create_task(engine.generate(PREFIX, GREEDY))
    await publish(engine, model, 5, 1 << 30)
    await asyncio.sleep(0.5)
    assert not held_back.done()
    await engine.wake()
    await engine.wake()
    assert (await held_back).weight_version == 5
    await assert_serves(engine, model, 5)


class Recording:
    """Engine handles that write down what they are asked for."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.joined: list[dict[str, Any]] = []

    def join_transfer(self, init_infos: Sequence[dict[str, Any]]) -> None:
        self.joined += init_infos

    def begin_update(self) -> None:
        self.seen.append("begin_update")

    def receive(self, part: Part) -> Callable[[], None]:
        assert not isinstance(part, dict)
        name = part[0].name
        self.seen.append(f"send {name}")
        return lambda: self.seen.append(f"took {name}")

    def finish_update(self, version: int) -> None:
        self.seen.append(f"finish_update {version}")

    def abandon_update(self) -> None:
        self.seen.append("abandon_update")


def test_a_failed_publish_still_leaves_the_collective() -> None:
    """Rank 0 goes through the remaining gathers with the other ranks before it raises."""
    gathered = []

    class Refusing(Recording):
        def receive(self, part: Part) -> Callable[[], None]:
            def refuse() -> None:
                raise WeightSyncError("no")

            return refuse

    engines = Refusing()

    def gather(max_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
        for i in range(4):
            gathered.append(i)
            yield {"w": torch.zeros(2)}

    with pytest.raises(WeightSyncError):
        HostPublisher(0, engines, gather, 1).publish(1)
    assert gathered == [0, 1, 2, 3]
    assert engines.seen == ["begin_update", "abandon_update"]


def test_a_bucket_is_gathered_while_the_one_before_arrives() -> None:
    """Only one is sent ahead: no more than two are in memory at once."""
    engines, parts = Recording(), [{name: torch.zeros(2)} for name in "abc"]
    HostPublisher(0, engines, lambda size: iter(parts), 1).publish(7)
    sent = ["send a", "send b", "took a", "send c", "took b", "took c"]
    assert engines.seen == ["begin_update", *sent, "finish_update 7"]


def test_nccl_ranks_are_given_out_engine_by_engine() -> None:
    from elpo_ray.weights.gpu import HandlesClient

    engines = Recording()
    client = HandlesClient(engines, [2, 1, 4])
    client.init_weight_transfer_engine({"rank_offset": 1, "world_size": 8})
    assert engines.joined == [{"rank_offset": offset, "world_size": 8} for offset in (1, 3, 4)]
    client.version = 7
    client.finish_weight_update()
    assert engines.seen == ["finish_update 7"]
