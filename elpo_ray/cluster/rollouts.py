"""The driver's end of its conversations with the rollout workers (`rollout_actor`), and restarts.

A thread of its own talks with all workers, so that they never wait for the driver: it carries
reports to the queue and inputs from it (`scheduling`). A worker that dies, hangs or loses its
engine is replaced: its inputs go back to the queue at once; a new process loads the model, gets the
weights that are now served, and pulls.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle

from elpo_ray import growth
from elpo_ray.cluster.rollout_actor import RemoteEngines
from elpo_ray.cluster.sharing import DeviceSharing
from elpo_ray.cluster.user_code import tools_that_ran
from elpo_ray.cluster.waits import LearnerLost, WorkerLost, wait_for, worker_losses
from elpo_ray.config import Config
from elpo_ray.config.growth import GrowthConfig
from elpo_ray.config.schedule import BudgetScope
from elpo_ray.rollout.sample import Sample
from elpo_ray.scheduling.batches import Batch, GrowBatch, JobBatch
from elpo_ray.scheduling.jobs import EvaluateJob, GrowJob, Job, SetAside, WorkerUnusable
from elpo_ray.scheduling.queue import InputQueue
from elpo_ray.scheduling.shared_budget import SharedBudget
from elpo_ray.tree import RolloutTree
from elpo_ray.types import Fault, InfrastructureError, Problem, Values

log = logging.getLogger(__name__)
R = TypeVar("R")
Advance = Callable[[int], None]
Spawn = Callable[[int, int], ActorHandle[Any]]
"""(number, life) -> a new actor for worker `number`, not yet started."""
PATIENCE_S = 1.0
"""Longest time between two reports of a worker that is well."""
MAX_DEATHS = 8
"""Deaths of one worker, without a completed trajectory between them, that retire it."""


@dataclass(eq=False)
class Worker:
    """One rollout worker over all its lives."""

    number: int
    handle: ActorHandle[Any] | None
    life: int = 0
    deaths: int = 0
    """How often it died since it last completed something."""
    counters: dict[str, float] = field(default_factory=dict)
    phase: str = "start"
    home: tuple[str, str] | None = None
    """See `RolloutActor.home`."""

    @property
    def name(self) -> str:
        return f"rollout-{self.number}"


class RolloutGroup:
    """The rollout workers as one: each pulls inputs when it has room."""

    def __init__(
        self,
        workers: list[ActorHandle[Any]],
        sandboxes: list[ActorHandle[Any]],
        config: Config,
        folder: str,
        spawn: Spawn,
        sharing: DeviceSharing | None = None,
    ) -> None:
        """`workers` serve the weights of `folder`, as `spawn`ed ones will."""
        self.sandboxes = sandboxes
        self.version = 0
        """Version of the weights that all members serve."""
        self.sharing = sharing or DeviceSharing(shared=False)
        self.sharing.engines.onload = lambda: self._engines().wake()
        self.sharing.engines.offload = lambda: self._engines().sleep()
        self.bring_up_to_date: Callable[[int, list[ActorHandle[Any]]], None] | None = None
        """Sends the weights that are now served, as that version, to restarted workers."""
        self.restarts = 0
        self.queue = InputQueue()
        self._growing = GrowBatch([])
        self._config = config
        self._folder = folder
        self._spawn = spawn
        self._workers = [Worker(number, handle) for number, handle in enumerate(workers)]
        self._loop = asyncio.new_event_loop()
        self._starting = ThreadPoolExecutor(len(workers), thread_name_prefix="rollout-start")
        self._closing = False
        self._told: set[str] = set()
        self._end = asyncio.Event()
        self._thread = threading.Thread(
            target=lambda: self._loop.run_until_complete(self._talk()), name="rollouts", daemon=True
        )
        self._thread.start()

    # --- what the driver asks for ---

    def grow(
        self, inputs: Sequence[Problem], step: int, config: GrowthConfig | None = None
    ) -> list[RolloutTree | SetAside]:
        """One tree an input, in order; `config` as in `GrowJob`."""
        _, n_total, most = self._config.allowance
        width = growth.width(self._config.algorithm.growth)
        jobs = [
            GrowJob(problem=problem, width=width, step=step, budget=n_total, config=config)
            for problem in inputs
        ]
        shared = None
        if self._config.budget.scope is BudgetScope.batch:
            shared = SharedBudget(n_total, most)
        self._growing = GrowBatch(jobs, shared)
        return self._all(self._growing, lambda done: None)

    @property
    def completed(self) -> int:
        """Trajectories that are complete in the batch that `grow` works on."""
        return self._growing.completed

    def evaluate(self, problems: Sequence[Problem], samples: int, advance: Advance) -> list[Sample]:
        """`samples` independent trajectories of each problem in turn, at temperature 1, their
        seeds fixed. Those that the infrastructure lost again and again are left out."""
        jobs = [
            EvaluateJob(problem=problem, index=i) for problem in problems for i in range(samples)
        ]
        drawn = [r for r in self._all(JobBatch(jobs), advance) if not isinstance(r, SetAside)]
        if not drawn:
            raise Fault(f"evaluation: all {len(jobs)} trajectories were lost to the infrastructure")
        return drawn

    def stream(
        self, jobs: Sequence[Job[R]], advance: Advance
    ) -> Iterator[tuple[int, R | InfrastructureError]]:
        """(place in `jobs`, result) as they finish; an InfrastructureError in the place of a
        result that it cost. Other errors are raised."""
        for index, result in self._run(JobBatch(jobs), advance):
            if isinstance(result, SetAside):
                yield index, InfrastructureError(result.why)
            else:
                yield index, result

    def use(self, config: Config) -> None:
        """Work on `config.task` from now on, with the same model. ValueError as at the start."""
        self._config = config
        refs = [worker.use.remote(config) for worker in self.members]
        wait_for(refs, config.cluster.call_timeout_s, "use of a task")

    @property
    def members(self) -> list[ActorHandle[Any]]:
        """The workers that are up."""
        return [worker.handle for worker in self._workers if worker.handle is not None]

    def describe(self) -> str:
        """The three workers that still hold most inputs, and what they do."""
        pending = sorted(self.queue.pending().items(), key=lambda item: -item[1])[:3]
        held = [(self._workers[number], count) for number, count in pending]
        shown = [
            f"{worker.name}: {count} inputs, {worker.counters.get('episodes', 0):.0f} trajectories"
            for worker, count in held
        ]
        down = sum(worker.handle is None for worker in self._workers)
        return "; ".join([*shown, f"{down} workers are down"] if down else shown)

    def metrics(self) -> Values:
        """Sums since the start: what faults cost, and how long engines had nothing to do."""
        busy = sum(worker.counters.get("busy_s", 0.0) for worker in self._workers)
        idle = sum(worker.counters.get("idle_s", 0.0) for worker in self._workers)
        return {
            "faults/restarts": self.restarts,
            "faults/inputs_requeued": self.queue.requeued,
            "faults/inputs_set_aside": self.queue.set_aside,
            "faults/tool_timeouts": sum(
                worker.counters.get("tool_timeouts", 0.0) for worker in self._workers
            ),
            "faults/tool_threads": sum(
                worker.counters.get("tool_threads_abandoned", 0.0) for worker in self._workers
            ),
            "engine_busy_s": busy,
            "engine_idle_s": idle,
        }

    def abandon(self) -> None:
        """Fail the batches that are under way: their results are no longer wanted."""
        self.queue.fail(Fault("the batch was abandoned"))

    def close(self) -> None:
        """End the conversations; the cluster kills the workers. Batches that are still waited for
        fail."""
        self._closing = True
        self.queue.stop(Fault("the rollout workers were closed"))
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(timeout=10)
        for worker in self._workers:
            if worker.home is not None:  # of a worker on another node nothing is there
                Path(worker.home[1]).unlink(missing_ok=True)

    def _all(self, batch: Batch[R], advance: Advance) -> list[R | SetAside]:
        results = {index: result for index, result in self._run(batch, advance)}
        return [results[index] for index in range(len(batch.entries))]

    def _run(self, batch: Batch[R], advance: Advance) -> Iterator[tuple[int, R | SetAside]]:
        self.sharing.for_engines()
        self.queue.submit(batch, first=not isinstance(batch, GrowBatch))
        self._loop.call_soon_threadsafe(self._wake)
        try:
            yield from batch.results(advance)
        except WorkerUnusable as error:
            raise Fault(str(error)) from error
        finally:
            self.queue.withdraw(batch)

    # --- the thread ---

    async def _talk(self) -> None:
        """Talk with all workers, until `close`."""
        talks = [asyncio.ensure_future(self._serve(worker)) for worker in self._workers]
        await self._end.wait()
        for talk in talks:
            talk.cancel()
        await asyncio.gather(*talks, return_exceptions=True)
        self._starting.shutdown(wait=False, cancel_futures=True)

    def _wake(self) -> None:
        for handle in self.members:
            handle.wake.remote()

    async def _serve(self, worker: Worker) -> None:
        """Talk with one worker, over all its lives."""
        try:
            while True:
                try:
                    await self._converse(worker)
                except WorkerLost as lost:
                    why = str(lost) + await asyncio.to_thread(tools_that_ran, worker.home)
                    if self._closing or not await self._replace(worker, why):
                        return
        except Exception as error:  # a bug: raised again where batches are waited for
            self.queue.stop(error)

    async def _converse(self, worker: Worker) -> None:
        """Exchange inputs for reports until the worker is lost."""
        assert worker.handle is not None
        cluster, number, room = self._config.cluster, worker.number, 0
        with worker_losses(f"{worker.name} does not answer", cluster.stuck_s):
            home: Any = worker.handle.home.remote()
            worker.home = await asyncio.wait_for(home, cluster.stuck_s)
        self.queue.join(number)
        moved = time.monotonic()
        while True:
            jobs, served = self.queue.give(number, room), self.version
            call: Any = worker.handle.exchange.remote(jobs, PATIENCE_S)
            with worker_losses(f"{worker.name} hangs ({worker.phase})", cluster.stuck_s):
                report = await asyncio.wait_for(call, cluster.stuck_s)
            if report.version < min(served, self.version):
                raise WorkerLost(f"{worker.name} missed version {served} of the weights")
            self.queue.take(number, report)
            room, worker.counters = report.room, report.counters
            self._tell(report.notes)
            worker.phase = report.phase
            now = time.monotonic()
            if report.progress or not self.queue.pending().get(number):
                moved, worker.deaths = now, 0 if report.progress else worker.deaths
            elif now - moved > cluster.call_timeout_s:
                held = self.queue.describe(number)
                raise WorkerLost(
                    f"{worker.name} completed nothing in {now - moved:.0f} s: {report.phase}; "
                    f"it has {held}"
                )

    def _tell(self, notes: Sequence[str]) -> None:
        """Tell the user what a worker noticed, the first time that one does."""
        for note in notes:
            if note not in self._told:
                self._told.add(note)
                log.warning(note)

    async def _replace(self, worker: Worker, why: str) -> bool:
        """Start a lost worker again, with the current weights; False once it has died too often."""
        while True:
            self.queue.lost(worker.number, why)
            old, worker.handle, worker.phase = worker.handle, None, "start"
            if old is not None:
                ray.kill(old)
            worker.deaths += 1
            if worker.deaths >= MAX_DEATHS:
                if not any(other.deaths < MAX_DEATHS for other in self._workers):
                    self.queue.stop(Fault(f"every rollout worker keeps dying; last: {why}"))
                return False
            worker.life += 1
            self.restarts += 1
            new = self._spawn(worker.number, worker.life)
            try:
                await self._with_learner(self._start, worker, new)
                await self._with_learner(self._update, worker, new)
                return True
            except WorkerLost as again:
                worker.handle, why = new, str(again)

    async def _with_learner(
        self,
        part: Callable[[Worker, ActorHandle[Any]], None],
        worker: Worker,
        handle: ActorHandle[Any],
    ) -> None:
        """Do a part of a new start that needs the learner, in a thread. Raises WorkerLost."""
        while True:
            try:
                return await self._loop.run_in_executor(self._starting, part, worker, handle)
            except LearnerLost as lost:  # raised again in the driver, which starts another one
                self.queue.fail(lost)
                await asyncio.sleep(PATIENCE_S)

    def _start(self, worker: Worker, handle: ActorHandle[Any]) -> None:
        """Load the model. On a shared device the learner is offloaded by then, and the new engine
        sleeps at once: the learner may be needed again to send its weights."""
        timeout_s = self._config.cluster.start_timeout_s
        with self.sharing.for_new_engine():
            start: Any = handle.start.remote(self._config, self._folder, self.sandboxes)
            with worker_losses(f"{worker.name} does not start", timeout_s):
                ray.get(start, timeout=timeout_s)
            if self.sharing.shared:
                engine = RemoteEngines([handle], timeout_s)
                engine.sleep()
                if engine.lost:
                    raise WorkerLost(f"{worker.name} does not sleep")

    def _engines(self) -> RemoteEngines:
        """The engines of the workers that are up. A loss is noticed by the conversation."""
        return RemoteEngines(self.members, self._config.cluster.call_timeout_s)

    def _update(self, worker: Worker, handle: ActorHandle[Any]) -> None:
        """Serve what the others serve, then be one of them."""
        with self.sharing.weights_lock:
            if self.version and self.bring_up_to_date is not None:
                self.bring_up_to_date(self.version, [handle])
                call: Any = handle.engine_version.remote()
                timeout_s = self._config.cluster.stuck_s
                with worker_losses(f"{worker.name} does not say its version", timeout_s):
                    serves = ray.get(call, timeout=timeout_s)
                if serves != self.version:
                    raise WorkerLost(f"{worker.name} did not take the weights")
            worker.handle = handle
            if self.sharing.shared:
                self.sharing.for_engines()
                self._engines().wake()
