"""The worker's end of its conversation with the driver (`rollouts`), and the handles to engines."""

from __future__ import annotations

import os
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle

from elpo_ray.cluster.garbage import freeze_gc, importing
from elpo_ray.cluster.gauges import Gauges
from elpo_ray.cluster.sandboxes import RemoteHost
from elpo_ray.cluster.tool_actors import RemoteSource
from elpo_ray.cluster.user_code import UserCode, on_worker
from elpo_ray.config import Config
from elpo_ray.config.task import CODE_INTERPRETER
from elpo_ray.interfaces import Policy
from elpo_ray.models.folder import local_folder
from elpo_ray.rollout.settings import RolloutSettings
from elpo_ray.rollout.worker import RolloutWorker
from elpo_ray.scheduling.jobs import Job, Report
from elpo_ray.scheduling.runner import JobRunner
from elpo_ray.tasks import make_task
from elpo_ray.tools.agent import AgentTools
from elpo_ray.tools.caller import Caller, RunningTools
from elpo_ray.tools.catalog import joined, sources
from elpo_ray.tools.interpreter import PooledTools
from elpo_ray.tools.sources import Schema
from elpo_ray.tools.variables import keep_only, restored
from elpo_ray.types import InfrastructureError
from elpo_ray.weights.protocol import Part

if TYPE_CHECKING:
    from elpo_ray.rollout.engine import Engine

    Act = Callable[[Engine], Awaitable[None]]

OVERCOMMIT = 2
"""Trajectories under way for each that the engine decodes at once: some wait for tools, and
searches leave gaps."""


class RolloutActor:
    """A rollout worker's process: one engine, and the trees that grow next to it."""

    runner: JobRunner | None = None
    caller: Caller | None = None
    tools: PooledTools | AgentTools
    gauges: Gauges | None = None

    def __init__(self, user: UserCode | None = None) -> None:
        self._user = user or UserCode()
        self._environment = dict(os.environ)
        """The whole one, for what is not the user's code."""
        self._running_file = Path(tempfile.gettempdir(), f"elpo-tools-{uuid.uuid4().hex}")

    async def start(self, config: Config, folder: str, sandboxes: list[ActorHandle[Any]]) -> None:
        """With `engine.endpoint` there is no engine: the model is behind that URL. Raises
        ValueError for an object of the user's that cannot be loaded on this node."""
        keep_only(self._user.variables)
        with on_worker():
            self._user.install(config.task.modules)
            sources(config.task, Caller(config.task.tool_timeout_s))
        hosts = [RemoteHost(actor, config) for actor in sandboxes]
        faults = (ray.exceptions.RayError, TimeoutError)
        self.interpreter = PooledTools(hosts, config.sandbox, faults=faults)
        self.engine = None if config.engine.endpoint else make_engine(config, folder)
        self.folder = folder
        if self.engine is not None:
            with importing(), restored(self._environment):
                await self.engine.start()
        await self.use(config)
        freeze_gc()

    async def use(self, config: Config) -> None:
        """Work on `config.task` from now on, with the same model."""
        from elpo_ray.chat.template import Chat  # with transformers, which the driver does not need
        from elpo_ray.rollout.endpoint import Endpoint

        with on_worker():
            task = make_task(config.task, config.trainer.seed)
            found = self._tools(config)
        settings = RolloutSettings.of(config)
        policy: Policy
        chat: Chat | Endpoint
        if self.engine is not None:
            chat = Chat.from_folder(str(local_folder(self.folder)), found, config.model)
            self.engine.end_turns_at(chat.end_of_turn_ids)
            policy = self.engine
        else:
            url, model = config.engine.endpoint, config.engine.served_model
            assert url is not None and model is not None
            with restored(self._environment):
                policy = chat = Endpoint(url, model, found)
        worker = RolloutWorker(policy, self.tools, chat, task, settings, self.interpreter)
        if self.runner is None:
            # An endpoint may serve others too: never more requests than were asked for.
            room = (OVERCOMMIT if self.engine is not None else 1) * config.engine.max_num_seqs
            self.runner = JobRunner(worker, room, lambda: self.tools.check())
        self.runner.worker = worker

    def _tools(self, config: Config) -> list[Schema]:
        """Make the tools of `config.task`; returns their schemas. ValueError if one cannot be."""
        task = config.task
        self.tools = self.interpreter
        if task.tools == [CODE_INTERPRETER]:
            return joined(task, config.sandbox, [])
        self.caller = Caller(task.tool_timeout_s, RunningTools(self._running_file))
        made = sources(task, self.caller)
        schemas = joined(task, config.sandbox, made)
        entries = [entry for entry in task.tools if entry != CODE_INTERPRETER]
        for place, entry in enumerate(entries):
            actors = self._user.tool_actors.get(entry) if isinstance(entry, str) else None
            if actors is not None:
                made[place] = RemoteSource(made[place], actors, config.cluster.call_timeout_s)
        self.tools = AgentTools(
            schemas,
            self.interpreter if task.interpreter else None,
            made,
            self.caller,
            retries=config.sandbox.retries,
            max_failure_rate=config.sandbox.max_failure_rate,
        )
        return schemas

    async def home(self) -> tuple[str, str] | None:
        """This process's node, and the file there that names the tools that run; None without
        tools of the user's."""
        if self.caller is None:
            return None
        return ray.get_runtime_context().get_node_id(), str(self._running_file)

    async def exchange(self, jobs: dict[int, Job[Any]], patience_s: float) -> Report:
        """Begin jobs, take the news (`scheduling.JobRunner`). Raises InfrastructureError once the
        engine is lost: this process is then of no use."""
        report = await self._running.exchange(jobs, patience_s)
        if self.engine is not None:
            self.engine.check()
        if self.caller is not None:
            self.caller.check()
            report.notes = self.caller.take_notes()
            report.counters |= self.caller.counters()
        self.gauges = self.gauges or Gauges("elpo_worker_")
        report.version = await self.engine_version()
        self.gauges.set(report.counters | {"weight_version": report.version})
        return report

    async def wake(self) -> None:
        self._running.wake()

    @property
    def _running(self) -> JobRunner:
        assert self.runner is not None, "start() comes first"
        return self.runner

    async def engine_version(self) -> int:
        return 0 if self.engine is None else self.engine.version

    async def on_engine(self, act: Act) -> None:
        """Call `act` on the engine. Raises InfrastructureError if the engine is lost."""
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


class RemoteEngines:
    """`weights.protocol.EngineHandles`, and sleep and wake, over `RolloutActor.on_engine`.

    A worker that is lost is left out from then on: it gets the weights when it is back.
    """

    def __init__(self, workers: Sequence[ActorHandle[Any]], timeout_s: float) -> None:
        self._workers = workers
        self._timeout_s = timeout_s
        self.lost: list[ActorHandle[Any]] = []

    def join_transfer(self, init_infos: Sequence[dict[str, Any]]) -> None:
        def join(info: dict[str, Any]) -> Act:
            return lambda engine: engine.join_transfer(info)

        self._begin([join(info) for info in init_infos])()

    def begin_update(self) -> None:
        self._call(lambda engine: engine.begin_update())

    def receive(self, part: Part) -> Callable[[], None]:
        shared: Any = ray.put(part)

        async def receive(engine: Engine) -> None:
            await engine.receive(await shared)

        return self._begin([receive] * len(self._workers))

    def finish_update(self, version: int) -> None:
        self._call(lambda engine: engine.finish_update(version))

    def abandon_update(self) -> None:
        self._call(lambda engine: engine.abandon_update())

    def sleep(self) -> None:
        self._call(lambda engine: engine.sleep())

    def wake(self) -> None:
        self._call(lambda engine: engine.wake())

    def _call(self, act: Act) -> None:
        """Call `act` on every engine, and wait."""
        self._begin([act] * len(self._workers))()

    def _begin(self, acts: Sequence[Act]) -> Callable[[], None]:
        """Begin acts[i] on engine i; what is returned waits for all of them."""
        pairs = zip(self._workers, acts, strict=True)
        asked = [(w, w.on_engine.remote(act)) for w, act in pairs if w not in self.lost]
        return partial(self._wait, asked, time.monotonic() + self._timeout_s)

    def _wait(self, asked: list[tuple[ActorHandle[Any], Any]], deadline: float) -> None:
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
