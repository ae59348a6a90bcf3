"""The actors: each one a process that holds a plain class and forwards to it."""

from __future__ import annotations

import resource
import socket
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle

from elpo_ray.config import Config, OptimizerConfig, SamplingConfig
from elpo_ray.config.measure import AnalyzeConfig
from elpo_ray.forest import TrainForest
from elpo_ray.metrics import Values
from elpo_ray.model_folder import local_folder
from elpo_ray.samples import Sample
from elpo_ray.tree import RolloutTree
from elpo_ray.types import Problem
from elpo_ray.weights import HostPublisher, Publisher

if TYPE_CHECKING:
    from elpo_ray.engine import Engine

BUCKET_BYTES = 256 * 2**20
"""Most bytes of weights that are gathered and in flight at once."""


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
        from elpo_ray.learner import LearnerRank, LearnerSettings, RankProcess

        settings = LearnerSettings(
            model=config.model,
            learner=config.learner,
            clip=config.algorithm.clip,
            loss=config.algorithm.loss,
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
        self.rank = LearnerRank(
            local_folder(folder), settings, process, total_steps=total_steps, seed=seed
        )

    def update(self, forest: TrainForest, supervised: bool) -> Values:
        from elpo_ray.learner import Objective

        objective = Objective.nll if supervised else Objective.surrogate
        return asdict(self.rank.update(forest, objective))

    def connect(self, workers: list[ActorHandle[Any]]) -> None:
        """Prepare to publish weights to these rollout workers' engines."""
        engines, buckets, config = RemoteEngines(workers), self.rank.weight_buckets, self.config
        self.publisher: Publisher
        if config.cluster.gpus:
            from elpo_ray.nccl_transfer import BucketSource, NcclPublisher

            counts = [config.engine.tensor_parallel_size] * len(workers)
            source = BucketSource(buckets, BUCKET_BYTES)
            self.publisher = NcclPublisher(self.index, engines, source, counts, self.endpoint())
        else:
            self.publisher = HostPublisher(self.index, engines, buckets, BUCKET_BYTES)

    def publish(self, version: int) -> None:
        self.publisher.publish(version)

    def reset_optimizer(self, config: OptimizerConfig, total_steps: int, reference: str) -> None:
        self.rank.reset_optimizer(config, total_steps, reference)

    def save(self, path: str) -> None:
        self.rank.save(path)

    def load(self, path: str) -> None:
        self.rank.load(path)

    def export(self, path: str) -> None:
        self.rank.export(path)


class RemoteEngines:
    """`weights.EngineHandles` over the rollout workers."""

    def __init__(self, workers: list[ActorHandle[Any]]) -> None:
        self._workers = workers

    def call(self, method: str, *args: Any) -> None:
        shared = [ray.put(arg) for arg in args]
        ray.get([worker.engine_call.remote(method, *shared) for worker in self._workers])

    def call_each(self, method: str, args: Sequence[Any]) -> None:
        pairs = zip(self._workers, args, strict=True)
        ray.get([worker.engine_call.remote(method, arg) for worker, arg in pairs])


class SandboxActor:
    """A sandbox host's process. Ray makes it anew, empty, when it dies."""

    def __init__(self, config: Config) -> None:
        from elpo_ray.sandbox_host import SandboxHost, sandbox_of

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # each snapshot takes some
        self.host = SandboxHost(sandbox_of(config.sandbox, config.cluster))

    async def start(self) -> None:
        """Raises SandboxUnavailable where the machine cannot isolate."""
        opened = await self.host.open()
        await self.host.close(opened.session)

    async def open(self, setup: str, at: Any, tree: str | None, keep: Any) -> Any:
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
        await self.host.shutdown()


class RemoteHost:
    """A sandbox actor as `tools.PooledTools` sees it: the same methods, awaited over Ray."""

    def __init__(self, actor: ActorHandle[Any]) -> None:
        self._actor = actor

    async def open(self, setup: str, at: Any, tree: str | None, keep: Any) -> Any:
        return await self._actor.open.remote(setup, at, tree, keep)

    async def call(self, session_id: str, code: str) -> Any:
        return await self._actor.call.remote(session_id, code)

    async def close(self, session_id: str) -> None:
        await self._actor.close.remote(session_id)

    async def release(self, tree: str) -> None:
        await self._actor.release.remote(tree)


class RolloutActor:
    """A rollout worker's process: one engine, and the trees that grow next to it."""

    async def start(self, config: Config, folder: str, sandboxes: list[ActorHandle[Any]]) -> None:
        """With `engine.endpoint` there is no engine: the model is behind that URL."""
        from elpo_ray.tools import PooledTools

        hosts = [RemoteHost(actor) for actor in sandboxes]
        self.tools = PooledTools(hosts, config.sandbox, faults=(ray.exceptions.RayError,))
        self.engine = None if config.engine.endpoint else make_engine(config, folder)
        self.folder = folder
        await self.use(config)
        if self.engine is not None:
            await self.engine.start()

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

    async def grow(self, problem: Problem, step: int) -> RolloutTree:
        tree = await self.worker.grow(problem, step)
        self.tools.check()
        return tree

    async def evaluate(
        self, problem: Problem, index: int, sampling: SamplingConfig | None
    ) -> Sample:
        sample = await self.worker.evaluate(problem, index, sampling)
        self.tools.check()
        return sample

    async def examine(self, problem: Problem, config: AnalyzeConfig) -> list[dict[str, Any]]:
        """The records of an analysis (`elpo_ray.analysis`)."""
        from elpo_ray.analysis.catalog import examine

        records = await examine(self.worker, problem, config)
        self.tools.check()
        return records

    async def completed(self) -> int:
        """Trajectories finished since the actor started."""
        return self.worker.completed

    async def engine_call(self, method: str, *args: Any) -> None:
        assert self.engine is not None, "an endpoint takes no weights"
        await getattr(self.engine, method)(*args)

    async def stop(self) -> None:
        if self.engine is not None:
            await self.engine.stop()


def make_engine(config: Config, folder: str) -> Engine:
    """A rollout worker's engine, not yet started."""
    from elpo_ray.engine import Engine

    return Engine(
        local_folder(folder),
        config.model,
        config.engine,
        seed=config.trainer.seed,
        gpus=config.cluster.gpus,
        threads=config.cluster.engine_threads,
    )
