"""The ranks' end of the learner's conversation; apart from the driver's end (`learner`), as it
brings transformers into every process that imports it."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import ray
from ray.actor import ActorHandle

from elpo_ray.cluster.gauges import Gauges
from elpo_ray.cluster.rollout_actor import RemoteEngines
from elpo_ray.config import Config
from elpo_ray.config.rollout import Transfer
from elpo_ray.forest import TrainForest
from elpo_ray.learner import LearnerRank, LearnerSettings, Objective, RankProcess, UpdateStats
from elpo_ray.models.folder import local_folder
from elpo_ray.types import Values
from elpo_ray.weights.host import HostPublisher
from elpo_ray.weights.protocol import Publisher

BUCKET_BYTES = 256 * 2**20
"""Most bytes of weights that are gathered at once; as many may still be on their way."""
PROGRESS_S = 0.2
"""Least time between two reports of an update."""


class LearnerActor(LearnerRank):
    """A learner rank in a process of its own, which also publishes its weights and shows gauges.

    The process is there before the rank, as all ranks need the address of rank 0: `start` makes it.
    """

    def __init__(self) -> None:
        pass

    def endpoint(self) -> tuple[str, int]:
        """Address and a free port of this node, for the ranks' rendezvous."""
        with socket.socket() as free:
            free.bind(("", 0))
            return str(ray.util.get_node_ip_address()), free.getsockname()[1]

    def start(
        self, config: Config, folder: str, rank: int, master: tuple[str, int], total_steps: int
    ) -> None:
        settings = LearnerSettings(
            model=config.model,
            learner=config.learner,
            clip=config.algorithm.clip,
            loss=config.loss,
            temperature=config.sampling.temperature,
        )
        process = RankProcess(
            rank=rank,
            world_size=config.cluster.learner_ranks,
            master_address=master[0],
            master_port=master[1],
            gpu=config.cluster.gpus,
            threads=config.cluster.learner_threads,
            timeout_s=config.cluster.call_timeout_s,
        )
        self.config = config
        self.gauges = Gauges("elpo_learner_")
        seed = config.trainer.seed
        super().__init__(
            local_folder(folder), settings, process, total_steps=total_steps, seed=seed
        )

    def update_reporting(
        self, forest: TrainForest, supervised: bool
    ) -> Iterator[tuple[int, int] | Values]:
        """`update`: rank 0's progress at times, and last of all the statistics of every rank."""
        reported = time.monotonic()
        for report in self.update(forest, Objective.nll if supervised else Objective.surrogate):
            if isinstance(report, UpdateStats):
                stats = asdict(report)
            elif self._process.rank == 0 and time.monotonic() - reported >= PROGRESS_S:
                reported = time.monotonic()
                yield report
        if self._process.rank == 0:
            self.gauges.set({"update_seconds": stats["seconds"], "loss": stats["loss"]})
        yield stats

    def connect(self, workers: list[ActorHandle[Any]]) -> None:
        """Prepare to publish weights to these rollout workers' engines. On GPUs both sides agree
        on it, again whenever the workers are others."""
        self._receivers = RemoteEngines(workers, self.config.cluster.call_timeout_s)
        self._connected = workers
        self.publisher = self._publisher(len(workers))

    def _publisher(self, engines: int) -> Publisher:
        rank, buckets, transfer = self._process.rank, self.weight_buckets, self.config.transfer
        if transfer is Transfer.host:
            return HostPublisher(rank, self._receivers, buckets, BUCKET_BYTES)
        from elpo_ray.weights.gpu import BucketSource, GpuPublisher

        workers = [self.config.engine.tensor_parallel_size] * engines
        if transfer is Transfer.ipc:
            everywhere = BucketSource(partial(buckets, everywhere=True), BUCKET_BYTES)
            return GpuPublisher.ipc(rank, self._receivers, everywhere, workers)
        source = BucketSource(buckets, BUCKET_BYTES)
        return GpuPublisher.nccl(rank, self._receivers, source, workers, self.endpoint())

    def publish(self, version: int, workers: list[ActorHandle[Any]]) -> None:
        """Send the weights to `workers`; one that dies meanwhile is passed over."""
        if workers != self._connected or self._receivers.lost:
            self.connect(workers)
        began = time.monotonic()
        self.publisher.publish(version)
        if self._process.rank == 0:
            self.gauges.set({"sync_seconds": time.monotonic() - began, "weight_version": version})
