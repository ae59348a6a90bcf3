"""The worker's end of its conversation with the driver (`rollouts`)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle

from elpo_ray.cluster.garbage import freeze_gc
from elpo_ray.cluster.gauges import Gauges
from elpo_ray.cluster.sandboxes import RemoteHost
from elpo_ray.config import Config
from elpo_ray.models.folder import local_folder
from elpo_ray.scheduling import Job, JobRunner, Report
from elpo_ray.tools.interpreter import PooledTools

if TYPE_CHECKING:
    from elpo_ray.rollout.engine import Engine

OVERCOMMIT = 2
"""Trajectories under way for each that the engine decodes at once: some wait for tools, and
searches leave gaps."""


class RolloutActor:
    """A rollout worker's process: one engine, and the trees that grow next to it."""

    runner: JobRunner | None = None
    gauges: Gauges | None = None

    async def start(self, config: Config, folder: str, sandboxes: list[ActorHandle[Any]]) -> None:
        """With `engine.endpoint` there is no engine: the model is behind that URL."""
        hosts = [RemoteHost(actor, config) for actor in sandboxes]
        faults = (ray.exceptions.RayError, TimeoutError)
        self.tools = PooledTools(hosts, config.sandbox, faults=faults)
        self.engine = None if config.engine.endpoint else make_engine(config, folder)
        self.folder = folder
        await self.use(config)
        if self.engine is not None:
            await self.engine.start()
        freeze_gc()

    async def use(self, config: Config) -> None:
        """Work on `config.task` from now on, with the same model."""
        from elpo_ray.chat.template import Chat
        from elpo_ray.rollout.endpoint import Endpoint
        from elpo_ray.rollout.worker import RolloutWorker
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
        """Begin jobs, take the news (`scheduling.JobRunner`). Raises InfrastructureError once the
        engine is lost: this process is then of no use."""
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

    async def on_engine(self, act: Callable[[Engine], Awaitable[None]]) -> None:
        """Have the engine do it. Raises InfrastructureError if the engine is lost."""
        assert self.engine is not None, "an endpoint takes no weights"
        try:
            await act(self.engine)
        finally:
            self.engine.check()


def make_engine(config: Config, folder: str) -> Engine:
    """A rollout worker's engine, not yet started."""
    from elpo_ray.rollout.engine import Engine

    return Engine(
        local_folder(folder),
        config.model,
        replace(config.engine, transfer=config.transfer),
        config.cluster,
        seed=config.trainer.seed,
    )
