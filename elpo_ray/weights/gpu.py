"""Weights from the learner's GPUs to the engines': vLLM's trainer engines send over our handles.

* NCCL: rank 0 of the learner and all workers of all engines form one group, rank 0 first, then the
  workers engine by engine.
* IPC, where engine and rank share a GPU: every rank gathers a bucket and lends it to the engine on
  its GPU, which maps the memory; rank 0 collects the handles and sends them to the engines.

Written against vLLM 0.32; it has not run yet, for want of GPUs (docs/gpu.md).
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from elpo_ray.weights.protocol import Buckets, EngineHandles


class BucketSource(WeightSource):
    """The learner's buckets as vLLM's stream of weights."""

    def __init__(self, buckets: Buckets, max_bytes: int) -> None:
        self._buckets = buckets
        self._max_bytes = max_bytes
        self._metadata: list[ParamMeta] | None = None

    def metadata(self) -> list[ParamMeta]:
        """Names, dtypes and shapes; the first call gathers once, on all ranks in lockstep."""
        if self._metadata is None:
            self._metadata = [ParamMeta(n, t.dtype, tuple(t.shape)) for n, t in self]
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for bucket in self._buckets(self._max_bytes):
            yield from bucket.items()


class GpuPublisher:
    """A `Publisher` over NCCL or IPC. Rank 0 blocks in `__init__` until all engines agree."""

    def __init__(
        self, init_info: NCCLTrainerInitInfo | IPCTrainerInitInfo, source: WeightSource,
        client: HandlesClient,
    ) -> None:  # fmt: skip
        self._client = client
        self._trainer = WeightTransferTrainerFactory.trainer_init(
            init_info, client=client, source=source
        )

    @classmethod
    def nccl(
        cls, rank: int, engines: EngineHandles, source: WeightSource, workers: Sequence[int],
        rendezvous: tuple[str, int],
    ) -> GpuPublisher:  # fmt: skip
        """`workers[i]` counts the workers (tensor-parallel ranks) of engine i; `rendezvous` is an
        address and a free port of rank 0."""
        address, port = rendezvous
        info = NCCLTrainerInitInfo(
            rank=rank, master_address=address, master_port=port, world_size=1 + sum(workers)
        )
        return cls(info, source, HandlesClient(engines, workers))

    @classmethod
    def ipc(
        cls, rank: int, engines: EngineHandles, source: WeightSource, workers: Sequence[int],
        buffer_bytes: int,
    ) -> GpuPublisher:  # fmt: skip
        """`source` must give every rank the tensors, not rank 0 alone; `workers` as in `nccl`.
        `buffer_bytes` of the GPU are lent to the engines, tensors packed into them; the largest
        tensor must fit."""
        info = IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=buffer_bytes)
        return cls(info, source, HandlesClient(engines, workers))

    def publish(self, version: int) -> None:
        """See `Publisher`. A failure leaves the group unusable: restart learner and engines."""
        self._client.version = version
        self._trainer.send_weights()


class HandlesClient:
    """vLLM's `VLLMWeightSyncClient` over our engine handles.

    vLLM's own client gives all engines the same rank offset, which fits a single engine.
    """

    def __init__(self, engines: EngineHandles, workers: Sequence[int]) -> None:
        """`workers`: see `GpuPublisher.nccl`."""
        self._engines = engines
        self._workers = workers
        self.version = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        each = [dict(init_info) for _ in self._workers]
        if "rank_offset" in init_info:
            offsets = accumulate(self._workers, initial=init_info["rank_offset"])
            for info, offset in zip(each, offsets, strict=False):
                info["rank_offset"] = offset
        self._engines.join_transfer(each)

    def start_weight_update(self) -> None:
        self._engines.begin_update()

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """An IPC handle is no plain value: it crosses vLLM's processes as a pickle of our own."""
        assert isinstance(update_info, dict), "neither NCCL nor IPC sends several at once"
        handles = update_info.get("ipc_handles")
        if handles is not None:
            text = base64.b64encode(pickle.dumps(handles)).decode()
            update_info = {**update_info, "ipc_handles": None, "ipc_handles_pickled": text}
        self._engines.receive(update_info)()

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._engines.finish_update(self.version)
