"""The conversation with the learner: a rank's process, and the driver's view of all ranks."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle

from elpo_ray.cluster.garbage import importing
from elpo_ray.cluster.gauges import Gauges
from elpo_ray.cluster.rollout_actor import RemoteEngines
from elpo_ray.cluster.rollouts import RolloutGroup
from elpo_ray.cluster.sharing import DeviceSharing
from elpo_ray.cluster.waits import LearnerLost, learner_losses, wait_for
from elpo_ray.config import Config
from elpo_ray.config.learner import OptimizerConfig
from elpo_ray.config.rollout import Transfer
from elpo_ray.forest.trees import TrainForest
from elpo_ray.models.folder import local_folder
from elpo_ray.types import Values
from elpo_ray.weights.protocol import Publisher

if TYPE_CHECKING:  # with torch and transformers, which only a rank's process needs
    from elpo_ray.learner.rank import LearnerRank

    Act = Callable[[LearnerRank], None]

BUCKET_BYTES = 256 * 2**20
"""Most bytes of weights that are gathered at once; as many may still be on their way."""
PROGRESS_S = 0.2
"""Least time between two reports of an update."""


class LearnerActor:
    """A learner rank's process: the rank, and the publisher of its weights."""

    def rendezvous(self) -> tuple[str, int]:
        """Address and a free port of this node, where the ranks find each other."""
        with socket.socket() as free:
            free.bind(("", 0))
            return str(ray.util.get_node_ip_address()), free.getsockname()[1]

    def start(
        self, config: Config, folder: str, rank: int, master: tuple[str, int], total_steps: int
    ) -> None:
        """Make the rank and join the others. The process exists before the rank, since all ranks
        need the address of rank 0."""
        with importing():
            from elpo_ray.learner.backend import LearnerSettings, RankProcess
            from elpo_ray.learner.rank import LearnerRank

            settings = LearnerSettings(
                model=config.model,
                learner=replace(
                    config.learner, gradient_checkpointing=config.gradient_checkpointing
                ),
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
            seed = config.trainer.seed
            self.config, self.number = config, rank
            self.gauges = Gauges("elpo_learner_")
            self.rank = LearnerRank(
                local_folder(folder), settings, process, total_steps=total_steps, seed=seed
            )

    def on_rank(self, act: Act) -> None:
        """Call `act` on the rank."""
        act(self.rank)

    def update(self, forest: TrainForest, supervised: bool) -> Iterator[tuple[int, int] | Values]:
        """`LearnerRank.update`: rank 0's progress at times, last of all every rank's statistics."""
        from elpo_ray.learner.loss import Objective
        from elpo_ray.learner.stats import UpdateStats

        objective = Objective.nll if supervised else Objective.surrogate
        reported = time.monotonic()
        for report in self.rank.update(forest, objective):
            if isinstance(report, UpdateStats):
                stats = asdict(report)
            elif self.number == 0 and time.monotonic() - reported >= PROGRESS_S:
                reported = time.monotonic()
                yield report
        if self.number == 0:
            self.gauges.set({"update_seconds": stats["learner_seconds"], "loss": stats["loss"]})
        yield stats

    def connect(self, workers: list[ActorHandle[Any]]) -> None:
        """Prepare to publish weights to these rollout workers' engines. On GPUs both sides agree
        on it, again whenever the workers are others."""
        self._receivers = RemoteEngines(workers, self.config.cluster.call_timeout_s)
        self._connected = workers
        self.publisher = self._publisher(len(workers))

    def _publisher(self, engines: int) -> Publisher:
        rank, buckets, transfer = self.number, self.rank.weight_buckets, self.config.transfer
        if transfer is Transfer.host:
            from elpo_ray.weights.host import HostPublisher

            return HostPublisher(rank, self._receivers, buckets, BUCKET_BYTES)
        from elpo_ray.weights.gpu import BucketSource, GpuPublisher

        workers = [self.config.engine.tensor_parallel_size] * engines
        if transfer is Transfer.ipc:
            everywhere = BucketSource(partial(buckets, everywhere=True), BUCKET_BYTES)
            lent = max(BUCKET_BYTES, self.rank.largest_weight)
            return GpuPublisher.ipc(rank, self._receivers, everywhere, workers, lent)
        source = BucketSource(buckets, BUCKET_BYTES)
        return GpuPublisher.nccl(rank, self._receivers, source, workers, self.rendezvous())

    def publish(self, version: int, workers: list[ActorHandle[Any]]) -> None:
        """Send the weights to `workers`; one that dies meanwhile is passed over."""
        if workers != self._connected or self._receivers.lost:
            self.connect(workers)
        began = time.monotonic()
        self.publisher.publish(version)
        if self.number == 0:
            self.gauges.set({"sync_seconds": time.monotonic() - began, "weight_version": version})


class LearnerGroup:
    """The learner's ranks as one: every call goes to all of them at once."""

    def __init__(
        self, ranks: list[ActorHandle[Any]], timeout_s: float, sharing: DeviceSharing
    ) -> None:
        self.ranks = ranks
        self._timeout_s = timeout_s
        self._sharing = sharing
        self._rollouts: RolloutGroup | None = None
        sharing.learner.onload = lambda: self._on_ranks("onload", lambda rank: rank.onload())
        sharing.learner.offload = lambda: self._on_ranks("offload", lambda rank: rank.offload())

    def update(
        self,
        forest: TrainForest,
        *,
        supervised: bool = False,
        advance: Callable[[int, int], None] = lambda done, total: None,
    ) -> Values:
        """Optimizer steps over `forest`; statistics over all ranks (`learner.UpdateStats`).
        `advance` is called at times with the number of packs that are done and of all."""
        shared = ray.put(forest)
        stats: Values = {}
        with self._sharing.for_learner():
            streams: list[Any] = [
                rank.update.options(num_returns="streaming").remote(shared, supervised)
                for rank in self.ranks
            ]
            for report in self._reports(streams, "update"):
                if isinstance(report, tuple):
                    advance(*report)
                else:
                    stats = report
        return stats

    def connect(self, rollouts: RolloutGroup) -> None:
        """Publish to these workers' engines, and to each that is restarted. Must come before
        `publish`."""
        self._rollouts = rollouts
        rollouts.bring_up_to_date = self._send
        with self.changing_weights():
            self._all([r.connect.remote(rollouts.members) for r in self.ranks], "connect")

    def changing_weights(self) -> AbstractContextManager[object]:
        """Hold this while the weights change and until they are published: a worker that restarts
        meanwhile waits, and then gets the new ones."""
        return self._sharing.weights_lock

    def publish(self, version: int) -> None:
        """Every engine serves the learner's weights as `version` when this returns; one that is
        down will when it is up again."""
        assert self._rollouts is not None, "connect() comes first"
        with self.changing_weights():
            self._rollouts.version = min(version, self._rollouts.version)
            self._send(version, self._rollouts.members)
            self._rollouts.version = version

    def _send(self, version: int, workers: list[ActorHandle[Any]]) -> None:
        with self._sharing.for_learner():
            self._all([r.publish.remote(version, workers) for r in self.ranks], "publish")

    def reset_optimizer(self, config: OptimizerConfig, total_steps: int, reference: Path) -> None:
        with self._sharing.for_learner():
            self._on_ranks(
                "reset_optimizer",
                lambda rank: rank.reset_optimizer(config, total_steps, reference),
            )

    def save(self, path: Path, *, background: bool = False) -> None:
        """Raises OSError if the disk refuses; then nothing of the checkpoint is left. `background`:
        `finish_save` must follow."""
        with self._sharing.for_learner():
            self._on_ranks("save", lambda rank: rank.save(path, background=background))

    def finish_save(self) -> None:
        """Wait for what `save` left to the background. Raises OSError if the disk refused."""
        self._on_ranks("finish_save", lambda rank: rank.finish_save())

    def load(self, path: Path) -> None:
        """Raises ValueError on a checkpoint of another model."""
        with self._sharing.for_learner():
            self._on_ranks("load", lambda rank: rank.load(path))

    def export(self, path: Path) -> None:
        """Write a plain Hugging Face folder."""
        with self._sharing.for_learner():
            self._on_ranks("export", lambda rank: rank.export(path))

    def _on_ranks(self, phase: str, act: Act) -> None:
        """Call `act` on every rank, and wait."""
        self._all([actor.on_rank.remote(act) for actor in self.ranks], phase)

    def _reports(self, streams: list[Any], phase: str) -> Iterator[Any]:
        """What the ranks yield, as it comes. Raises as `_all`; the deadline is for each report."""
        while streams:
            ready: list[Any] = ray.wait(streams, timeout=self._timeout_s)[0]
            if not ready:
                raise LearnerLost(f"{phase} of the learner: nothing in {self._timeout_s:.0f} s")
            for stream in ready:
                report = next(stream, None)
                if report is None:
                    streams.remove(stream)
                else:
                    yield self._all(report, phase)

    def _all(self, refs: Any, phase: str) -> Any:
        """Raises LearnerLost, naming the phase, when a rank dies or does not answer in time."""
        with learner_losses(phase):
            return wait_for(refs, self._timeout_s, f"{phase} of the learner")
