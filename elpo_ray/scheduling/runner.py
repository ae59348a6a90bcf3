"""The worker's side of the queue: many jobs on one event loop, one report at a time.

`exchange` brings jobs in and takes the news out. One caller calls it again and again; between two
calls the jobs go on. A caller that gets no answer for long knows that the process hangs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

from elpo_ray.rollout.worker import RolloutWorker
from elpo_ray.scheduling.jobs import Job, Report, WorkerUnusable
from elpo_ray.types import InfrastructureError

GAP_S = 0.05
"""Least time between two reports while there is news: reports of a fast worker carry many."""


class JobRunner:
    """Runs jobs on a rollout worker."""

    def __init__(self, worker: RolloutWorker, capacity: int, check: Callable[[], None]) -> None:
        """`capacity`: trajectories under way at once. `check` is called after every job; an
        InfrastructureError from it means that going on is useless."""
        self.worker = worker
        """Runs the jobs to come."""
        self._capacity = capacity
        self._check = check
        self._running: dict[int, tuple[Job[Any], asyncio.Task[None]]] = {}
        self._report = Report()
        self._news = asyncio.Event()
        self._news.set()  # the first report says how much room there is
        self._last = 0.0

    async def exchange(self, jobs: Mapping[int, Job[Any]], patience_s: float) -> Report:
        """Begin `jobs`, named by their keys; returns once there is something finished or failed, or
        after `patience_s`, or when woken."""
        for key, job in jobs.items():
            self._running[key] = (job, asyncio.ensure_future(self._run(key, job)))
        try:
            await asyncio.wait_for(self._news.wait(), patience_s)
            await asyncio.sleep(max(0.0, self._last + GAP_S - time.monotonic()))
        except TimeoutError:
            pass
        self._news.clear()
        report, self._report = self._report, Report()
        report.room = self._capacity - sum(job.width for job, _ in self._running.values())
        counters = self.worker.counters
        report.counters, report.phase = counters.values(), str(counters)
        self._last = time.monotonic()
        return report

    def wake(self) -> None:
        """Have `exchange` return: the queue has something new."""
        self._news.set()

    async def _run(self, key: int, job: Job[Any]) -> None:
        try:
            result = await job.run(
                self.worker, lambda done: self._report.completions.append((key, done))
            )
            try:
                self._check()
            except InfrastructureError as error:
                raise WorkerUnusable(str(error)) from error
            self._report.finished.append((key, result))
        except Exception as error:  # raised again where the job's result is waited for
            self._report.failed.append((key, error))
        finally:
            self._running.pop(key, None)
            self._news.set()
