"""New weights through host memory into a running vLLM: it then samples as the new model does."""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import Qwen2ForCausalLM

from elpo_ray.rollout.engine import Engine
from elpo_ray.types import InfrastructureError, Sampling
from elpo_ray.weights.host import HostPublisher, to_wire
from elpo_ray.weights.protocol import Part, WeightSyncError
from tests.real.engines import (
    GREEDY,
    PREFIX,
    Handles,
    assert_serves,
    build_qwen2,
    exact,
    publish,
    running,
)

pytestmark = pytest.mark.real


def perturbed(model: Qwen2ForCausalLM, seed: int) -> Qwen2ForCausalLM:
    """Another model of this shape: every weight moved."""
    torch.manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return other


@pytest.mark.asyncio(loop_scope="session")
async def test_an_engine_follows_the_learner(
    engine: Engine, qwen2: tuple[Path, Qwen2ForCausalLM]
) -> None:
    model = await check_updates(engine, qwen2[1])
    model = await check_one_version_a_turn(engine, model)
    await check_sleep(engine, perturbed(model, 5))


async def test_an_engine_of_an_untied_model_from_start_to_stop(tmp_path: Path) -> None:
    model = build_qwen2(tmp_path, tied=False)
    async with running(tmp_path) as engine:
        await assert_serves(engine, model, 0)
        await check_updates(engine, model)
        before = engine_processes()
        in_flight = asyncio.create_task(
            engine.generate([5, 6], Sampling(max_tokens=400, temperature=2.0, seed=0))
        )
        await asyncio.sleep(0.1)
    with pytest.raises(InfrastructureError):
        await in_flight
    with pytest.raises(InfrastructureError):
        await engine.generate([5], Sampling(max_tokens=4))
    assert len(before - engine_processes()) == 1


def engine_processes() -> set[int]:
    """vLLM's processes below this one; the engine that tests share may be among them."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= {process.pid} if "EngineCore" in " ".join(process.cmdline()) else set()
    return found


async def check_updates(engine: Engine, model: Qwen2ForCausalLM) -> Qwen2ForCausalLM:
    """In one bucket, a tensor a bucket, a few; the model that is served in the end."""
    for seed, max_bytes in ((1, 1 << 30), (2, 4096), (3, 50_000)):
        old, model = model, perturbed(model, seed)
        before = await engine.generate(PREFIX, GREEDY)
        version = await publish(engine, model, max_bytes)
        await assert_serves(engine, model, version)
        changed, _ = exact(model, PREFIX, before.token_ids, 1.0)
        assert max(abs(a - b) for a, b in zip(before.logprobs, changed, strict=True)) > 0.05
        await assert_refuses(engine, old)
        await assert_serves(engine, model, version)
    return model


async def assert_refuses(engine: Engine, model: Qwen2ForCausalLM) -> None:
    """Damaged, foreign, mis-shaped, repeated or missing tensors leave the engine as it was."""
    norm = model.model.norm.weight.detach()
    sent = to_wire({"model.norm.weight": norm})[0]
    damaged = sent.data.copy()
    damaged[5] ^= 1
    refused = {
        "model.norm.weight: the bytes": [replace(sent, data=damaged)],
        "model.nrom.weight: the engine's model has no": to_wire({"model.nrom.weight": norm}),
        r"model.norm.weight: shape \(63,\)": to_wire({"model.norm.weight": norm[1:].clone()}),
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


async def check_one_version_a_turn(engine: Engine, model: Qwen2ForCausalLM) -> Qwen2ForCausalLM:
    """An update waits for the turns in flight and holds back those that come meanwhile."""
    new, served = perturbed(model, 4), engine.version
    early = asyncio.create_task(engine.generate(PREFIX, Sampling(max_tokens=300, seed=3)))
    await asyncio.sleep(0.05)
    update = asyncio.create_task(publish(engine, new))
    await asyncio.sleep(0.02)
    late = asyncio.create_task(engine.generate(PREFIX, GREEDY))
    await update
    for task, source, version in ((early, model, served), (late, new, served + 1)):
        turn = await task
        logprobs, _ = exact(source, PREFIX, turn.token_ids, 1.0)
        assert turn.weight_version == version
        assert turn.logprobs == pytest.approx(logprobs, abs=2e-4)
    return new


async def check_sleep(engine: Engine, model: Qwen2ForCausalLM) -> None:
    """Asleep it holds turns back and takes weights, as on a GPU that it shares with a learner; on
    CPU its memory stays."""
    await engine.sleep()
    await engine.sleep()
    held_back = asyncio.create_task(engine.generate(PREFIX, GREEDY))
    version = await publish(engine, model)
    await asyncio.sleep(0.5)
    assert not held_back.done()
    await engine.wake()
    await engine.wake()
    assert (await held_back).weight_version == version
    await assert_serves(engine, model, version)


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


def test_handles_of_lent_memory_cross_as_a_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's worker reads from what the learner sends the handles that it was given."""
    from dataclasses import asdict

    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferUpdateInfo

    from elpo_ray.weights.gpu import HandlesClient

    class Taking(Recording):
        def receive(self, part: Part) -> Callable[[], None]:
            self.part = part
            return lambda: None

    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    rebuilt = (torch.Tensor, (4,), (1,), 0, torch.storage.TypedStorage, torch.uint8, 0, b"handle")
    sent = IPCWeightTransferUpdateInfo(
        names=["w"],
        dtype_names=["bfloat16"],
        shapes=[[2]],
        ipc_handles={"GPU-1": rebuilt},
        tensor_sizes=[4],
    )
    engines = Taking()
    HandlesClient(engines, [1]).update_weights(asdict(sent))
    assert isinstance(engines.part, dict) and engines.part["ipc_handles"] is None
    assert IPCWeightTransferUpdateInfo(**engines.part) == sent


def test_the_lent_memory_holds_the_largest_tensor(qwen2: tuple[Path, Qwen2ForCausalLM]) -> None:
    from elpo_ray.learner.export import largest_weight

    sizes = [parameter.nbytes for parameter in qwen2[1].parameters()]
    assert largest_weight(qwen2[1]) == max(sizes) == qwen2[1].model.embed_tokens.weight.nbytes
