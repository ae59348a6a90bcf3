"""The actors: each one a process that holds a plain class and forwards to it."""

from __future__ import annotations

import asyncio
import resource
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle

from elpo_ray.cluster.gauges import Gauges
from elpo_ray.collector import importing, relax
from elpo_ray.config import Config, OptimizerConfig, Transfer
from elpo_ray.dispatch import Job, JobRunner, Report
from elpo_ray.forest import TrainForest
from elpo_ray.model_folder import local_folder
from elpo_ray.trackers import Values
from elpo_ray.types import InfrastructureError

if TYPE_CHECKING:
    from elpo_ray.engine import Engine
    from elpo_ray.weights import Publisher

BUCKET_BYTES = 256 * 2**20
"""Most bytes of weights that are gathered at once; as many may still be on their way."""
RESTART_S = 30.0
"""So long a trajectory waits for a sandbox actor that Ray restarts before it tries another one."""
PROGRESS_S = 0.2
"""Least time between two reports of an update."""
TELL_S = 5.0
"""Between looks of the dashboard at a sandbox."""
OVERCOMMIT = 2
"""Trajectories under way for each that the engine decodes at once: some wait for tools, and
searches leave gaps."""


class LearnerActor:
    """A learner rank's process."""

    def endpoint(self) -> tuple[str, int]:
        """Address and a free port of this node, for the ranks' rendezvous."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return str(ray.util.get_node_ip_address()), probe.getsockname()[1]

    def start(
        self, config: Config, folder: str, rank: int, master: tuple[str, int], total_steps: int
    ) -> None:
        with importing():
            from elpo_ray.learner import LearnerRank, LearnerSettings, RankProcess

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
        seed = config.trainer.seed
        self.config, self.index = config, rank
        self.gauges = Gauges("elpo_learner_")
        self.rank = LearnerRank(
            local_folder(folder), settings, process, total_steps=total_steps, seed=seed
        )

    def update(self, forest: TrainForest, supervised: bool) -> Iterator[tuple[int, int] | Values]:
        """Rank 0's progress at times, and last of all the statistics."""
        from elpo_ray.learner import Objective

        objective = Objective.nll if supervised else Objective.surrogate
        going = self.rank.updating(forest, objective)
        told = time.monotonic()
        while True:
            try:
                progress = next(going)
            except StopIteration as end:
                stats = asdict(end.value)
                break
            if self.index == 0 and time.monotonic() - told >= PROGRESS_S:
                told = time.monotonic()
                yield progress
        if self.index == 0:
            self.gauges.set({"update_seconds": stats["seconds"], "loss": stats["loss"]})
        yield stats

    def connect(self, workers: list[ActorHandle[Any]]) -> None:
        """Prepare to publish weights to these rollout workers' engines. On GPUs both sides agree
        on it, again whenever the workers are others."""
        self._engines = RemoteEngines(workers, self.config.cluster.call_timeout_s)
        self._connected = workers
        self.publisher = self._publisher(len(workers))

    def _publisher(self, engines: int) -> Publisher:
        rank, buckets, transfer = self.index, self.rank.weight_buckets, self.config.transfer
        if transfer is Transfer.host:
            from elpo_ray.weights import HostPublisher

            return HostPublisher(rank, self._engines, buckets, BUCKET_BYTES)
        from elpo_ray.gpu_transfer import BucketSource, GpuPublisher

        if transfer is Transfer.ipc:
            everywhere = BucketSource(partial(buckets, everywhere=True), BUCKET_BYTES)
            return GpuPublisher.ipc(rank, self._engines, everywhere)
        source = BucketSource(buckets, BUCKET_BYTES)
        workers = [self.config.engine.tensor_parallel_size] * engines
        return GpuPublisher.nccl(rank, self._engines, source, workers, self.endpoint())

    def publish(self, version: int, workers: list[ActorHandle[Any]]) -> None:
        """To `workers`; one that dies meanwhile is passed over."""
        if workers != self._connected or self._engines.lost:
            self.connect(workers)
        began = time.monotonic()
        self.publisher.publish(version)
        if self.index == 0:
            self.gauges.set({"sync_seconds": time.monotonic() - began, "weight_version": version})

    def reset_optimizer(self, config: OptimizerConfig, total_steps: int, reference: str) -> None:
        self.rank.reset_optimizer(config, total_steps, reference)

    def rest(self) -> None:
        self.rank.rest()

    def work(self) -> None:
        self.rank.work()

    def save(self, path: str, background: bool) -> None:
        self.rank.save(path, background=background)

    def finish_save(self) -> None:
        self.rank.finish_save()

    def load(self, path: str) -> None:
        self.rank.load(path)

    def export(self, path: str) -> None:
        self.rank.export(path)


class RemoteEngines:
    """`weights.EngineHandles` over the rollout workers. One that is lost is left out from then on:
    it gets the weights when it is back."""

    def __init__(self, workers: list[ActorHandle[Any]], timeout_s: float) -> None:
        self._workers = list(workers)
        self._timeout_s = timeout_s
        self.lost: list[ActorHandle[Any]] = []

    def send(self, method: str, *args: Any) -> Callable[[], None]:
        shared = [ray.put(arg) for arg in args]
        asked = [(w, w.engine_call.remote(method, *shared)) for w in self._workers]
        return partial(self._answers, asked, time.monotonic() + self._timeout_s)

    def call(self, method: str, *args: Any) -> None:
        self.send(method, *args)()

    def call_each(self, method: str, args: Sequence[Any]) -> None:
        pairs = zip(self._workers, args, strict=True)
        asked = [(worker, worker.engine_call.remote(method, arg)) for worker, arg in pairs]
        self._answers(asked, time.monotonic() + self._timeout_s)

    def _answers(self, asked: list[tuple[ActorHandle[Any], Any]], deadline: float) -> None:
        for worker, ref in asked:
            if worker in self.lost:
                continue
            try:
                ray.get(ref, timeout=max(0.0, deadline - time.monotonic()))
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
                self.lost.append(worker)
            except ray.exceptions.RayTaskError as error:
                if not isinstance(error.cause, InfrastructureError):
                    raise (error.cause if error.cause is not None else error) from error
                self.lost.append(worker)
        self._workers = [worker for worker in self._workers if worker not in self.lost]


class SandboxActor:
    """A sandbox host's process. Ray makes it anew, empty, when it dies."""

    def __init__(self, config: Config) -> None:
        from elpo_ray.sandbox_host import SandboxHost, sandbox_of

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # each snapshot takes some
        self.host = SandboxHost(sandbox_of(config.sandbox, config.cluster))
        self.telling: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Raises SandboxUnavailable where the machine cannot isolate."""
        opened = await self.host.open()
        await self.host.close(opened.session)
        relax()

    async def _tell(self) -> None:
        gauges = Gauges("elpo_sandbox_")
        while True:
            gauges.set(self.host.metrics())
            await asyncio.sleep(TELL_S)

    async def open(self, setup: str, at: Any, tree: str | None, keep: Any) -> Any:
        if self.telling is None:  # Ray starts no actor again that it made anew
            self.telling = asyncio.create_task(self._tell())
        return await self.host.open(setup, at, tree, keep)

    async def call(self, session_id: str, code: str) -> Any:
        return await self.host.call(session_id, code)

    async def close(self, session_id: str) -> None:
        await self.host.close(session_id)

    async def release(self, tree: str) -> None:
        await self.host.release(tree)

    async def metrics(self) -> Values:
        return self.host.metrics()

    async def stop(self) -> None:
        if self.telling is not None:
            self.telling.cancel()
        await self.host.shutdown()


class RemoteHost:
    """A sandbox actor as `tools.PooledTools` sees it: the same methods, awaited over Ray."""

    def __init__(self, actor: ActorHandle[Any], config: Config) -> None:
        self._actor = actor
        self._timeout_s = config.cluster.call_timeout_s
        """Of everything that may wait for a free session."""
        self._call_s = config.sandbox.wall_s + config.cluster.stuck_s

    async def open(self, setup: str, at: Any, tree: str | None, keep: Any) -> Any:
        """Waits for an actor that Ray restarts: until it is up, calls fail after two seconds."""
        patient_until = time.monotonic() + RESTART_S
        while True:
            try:
                return await self._within(self._actor.open.remote(setup, at, tree, keep))
            except ray.exceptions.ActorUnavailableError:
                if time.monotonic() > patient_until:
                    raise
                await asyncio.sleep(0.2)

    async def call(self, session_id: str, code: str) -> Any:
        return await asyncio.wait_for(self._actor.call.remote(session_id, code), self._call_s)

    async def close(self, session_id: str) -> None:
        await self._within(self._actor.close.remote(session_id))

    async def release(self, tree: str) -> None:
        await self._within(self._actor.release.remote(tree))

    async def _within(self, ref: Any) -> Any:
        return await asyncio.wait_for(ref, self._timeout_s)


class RolloutActor:
    """A rollout worker's process: one engine, and the trees that grow next to it."""

    runner: JobRunner | None = None
    gauges: Gauges | None = None

    async def start(self, config: Config, folder: str, sandboxes: list[ActorHandle[Any]]) -> None:
        """With `engine.endpoint` there is no engine: the model is behind that URL."""
        from elpo_ray.tools import PooledTools

        hosts = [RemoteHost(actor, config) for actor in sandboxes]
        faults = (ray.exceptions.RayError, TimeoutError)
        self.tools = PooledTools(hosts, config.sandbox, faults=faults)
        self.engine = None if config.engine.endpoint else make_engine(config, folder)
        self.folder = folder
        if self.engine is not None:
            await self.engine.start()
        await self.use(config)
        relax()

    async def use(self, config: Config) -> None:
        """Work on `config.task` from now on, with the same model."""
        from elpo_ray.chat import Chat
        from elpo_ray.endpoint import Endpoint
        from elpo_ray.rollout import RolloutWorker
        from elpo_ray.tasks import make_task

        task = make_task(config.task, config.trainer.seed)
        if self.engine is not None:
            chat = Chat.from_folder(str(local_folder(self.folder)), task.tools)
            self.worker = RolloutWorker(self.engine, self.tools, chat, task, config)
        else:
            url, model = config.engine.endpoint, config.engine.served_model
            assert url is not None and model is not None
            endpoint = Endpoint(url, model, task.tools)
            self.worker = RolloutWorker(endpoint, self.tools, endpoint, task, config)
        if self.runner is None:
            # An endpoint is somebody else's: never more requests than were asked for.
            room = (OVERCOMMIT if self.engine is not None else 1) * config.engine.max_num_seqs
            self.runner = JobRunner(self.worker, room, self.tools.check)
        self.runner.use(self.worker)

    async def exchange(self, jobs: list[Job], patience_s: float) -> Report:
        """Begin jobs, take the news (`dispatch.JobRunner`). InfrastructureError once the engine is
        lost: this process is then of no use."""
        report = await self._running.exchange(jobs, patience_s)
        if self.engine is not None:
            self.engine.check()
        self.gauges = self.gauges or Gauges("elpo_worker_")
        report.version = await self.engine_version()
        self.gauges.set(report.load | {"weight_version": report.version})
        return report

    async def wake(self) -> None:
        self._running.wake()

    @property
    def _running(self) -> JobRunner:
        assert self.runner is not None, "start() comes first"
        return self.runner

    async def engine_version(self) -> int:
        return 0 if self.engine is None else self.engine.version

    async def engine_call(self, method: str, *args: Any) -> None:
        """Raises InfrastructureError if the engine is lost."""
        assert self.engine is not None, "an endpoint takes no weights"
        try:
            await getattr(self.engine, method)(*args)
        finally:
            self.engine.check()

    async def stop(self) -> None:
        if self.engine is not None:
            await self.engine.stop()


def make_engine(config: Config, folder: str) -> Engine:
    """A rollout worker's engine, not yet started."""
    from elpo_ray.engine import Engine

    return Engine(
        local_folder(folder),
        config.model,
        replace(config.engine, transfer=config.transfer),
        config.cluster,
        seed=config.trainer.seed,
    )
