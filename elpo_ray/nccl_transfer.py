"""Weights from the learner's GPUs to the engines' by NCCL: vLLM's own trainer engine, our handles.

Rank 0 of the learner and all workers of all engines form one NCCL group, rank 0 first, then the
workers engine by engine. Written against vLLM 0.32; it has not run yet, for want of GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from elpo_ray.weights import Buckets, EngineHandles


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


class NcclPublisher:
    """A `Publisher` over NCCL."""

    def __init__(
        self,
        rank: int,
        engines: EngineHandles,
        source: WeightSource,
        workers: Sequence[int],
        rendezvous: tuple[str, int],
    ) -> None:
        """`workers[i]` counts the workers (tensor-parallel ranks) of engine i; `rendezvous` is an
        address and a free port of rank 0. Rank 0 blocks until all workers have joined."""
        self._client = HandlesClient(engines, workers)
        self._trainer = WeightTransferTrainerFactory.trainer_init(
            NCCLTrainerInitInfo(
                rank=rank,
                master_address=rendezvous[0],
                master_port=rendezvous[1],
                world_size=1 + sum(workers),
            ),
            client=self._client,
            source=source,
        )

    def publish(self, version: int) -> None:
        """See `Publisher`. A failure leaves the group unusable: restart learner and engines."""
        self._client.version = version
        self._trainer.send_weights()


class HandlesClient:
    """vLLM's `VLLMWeightSyncClient` over our engine handles.

    vLLM's own client gives all engines the same rank offset, which fits a single engine.
    """

    def __init__(self, engines: EngineHandles, workers: Sequence[int]) -> None:
        self._engines = engines
        self._workers = workers
        self.version = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        offset, each = init_info["rank_offset"], []
        for count in self._workers:
            each.append({**init_info, "rank_offset": offset})
            offset += count
        self._engines.call_each("join_transfer", each)

    def start_weight_update(self) -> None:
        self._engines.call("begin_update")

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        self._engines.call("receive", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._engines.call("finish_update", self.version)
