"""The worker's side of the queue: many jobs on one event loop, one report at a time.

`exchange` brings jobs in and takes the news out. It is asked again and again by one caller; between
two calls the jobs go on. A caller that gets no answer for long knows that the process hangs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from elpo_ray.rollout.journal import TreeEnd
from elpo_ray.scheduling.jobs import Job, Report, WorkerUnusable
from elpo_ray.types import InfrastructureError

GAP_S = 0.05
"""Least time between two reports while there is news: reports of a fast worker carry many."""


class JobRunner:
    """Runs jobs on a `rollout.RolloutWorker` or something alike."""

    def __init__(self, worker: Any, capacity: int, check: Callable[[], None]) -> None:
        """`capacity`: trajectories under way at once. `check` is asked after every job; an
        InfrastructureError of it means that going on is useless."""
        self._worker = worker
        self._capacity = capacity
        self._check = check
        self._running: dict[int, tuple[Job, asyncio.Task[None]]] = {}
        self._report = Report()
        self._news = asyncio.Event()
        self._news.set()  # the first report says how much room there is
        self._last = 0.0

    def use(self, worker: Any) -> None:
        """Run the jobs to come on another worker."""
        self._worker = worker

    async def exchange(self, jobs: Sequence[Job], patience_s: float) -> Report:
        """Begin `jobs`; returns once there is something finished or failed, or after
        `patience_s`, or when woken."""
        for job in jobs:
            task = asyncio.ensure_future(self._run(job))
            self._running[job.key] = (job, task)
        try:
            await asyncio.wait_for(self._news.wait(), patience_s)
            await asyncio.sleep(max(0.0, self._last + GAP_S - time.monotonic()))
        except TimeoutError:
            pass
        self._news.clear()
        report, self._report = self._report, Report()
        report.room = self._capacity - sum(job.width for job, _ in self._running.values())
        load = self._worker.load
        report.load, report.phase = load.numbers(), str(load)
        self._last = time.monotonic()
        return report

    def wake(self) -> None:
        """Have `exchange` return: the queue has something new."""
        self._news.set()

    async def _run(self, job: Job) -> None:
        key = job.key
        try:
            if job.grows:
                tree = await job.run(
                    self._worker,
                    job.problem,
                    *job.args,
                    journal=job.journal,
                    tell=lambda done: self._report.completions.append((key, done)),
                )
                result: Any = TreeEnd.of(tree)
            else:
                result = await job.run(self._worker, job.problem, *job.args)
            try:
                self._check()
            except InfrastructureError as error:
                raise WorkerUnusable(str(error)) from error
            self._report.finished.append((key, result))
        except Exception as error:  # travels to whoever asked for the job
            self._report.failed.append((key, error))
        finally:
            self._running.pop(key, None)
            self._news.set()
