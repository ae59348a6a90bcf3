"""Threads for code that may block: as many as there are calls at once, and none waits for another.

A call that is over its time limit is abandoned: its caller goes on at once, its thread gets an
exception that ends it at its next line of Python, and is never used again. Belongs to one event
loop; only `_Worker._run` is another thread's.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from elpo_ray.types import InfrastructureError


class Abandoned(BaseException):
    """Raised in a thread whose call nobody waits for any more."""


@dataclass(slots=True, eq=False)
class Outcome:
    """What became of a call."""

    value: Any = None
    error: BaseException | None = None
    """What it raised."""
    timed_out: bool = False
    duration_s: float = 0.0


@dataclass(slots=True, eq=False)
class _Job:
    function: Callable[[], Any]
    future: asyncio.Future[Outcome]
    worker: _Worker
    on_end: Callable[[], None]
    outcome: Outcome = field(default_factory=Outcome)
    timer: asyncio.TimerHandle | None = None
    abandoned: bool = False
    collected: bool = False


class Threads:
    """A pool that grows with the calls under way."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._idle: list[_Worker] = []
        self._done: deque[_Job] = deque()
        self._told = False
        """The loop has been told to look at `_done` and has not yet done so."""
        self.abandoned = 0
        """Calls over their time limit that still hold a thread."""

    async def run(
        self, function: Callable[[], Any], timeout_s: float, on_end: Callable[[], None]
    ) -> Outcome:
        """Call `function` in a thread; returns after `timeout_s` at the latest. `on_end` is called
        on the loop once the thread is back, however late. A process that the function forked ends
        with it. Raises InfrastructureError where the machine has no thread left."""
        loop = self._loop = self._loop or asyncio.get_running_loop()
        worker = self._idle.pop() if self._idle else _Worker(self)
        job = _Job(function, loop.create_future(), worker, on_end)
        job.timer = loop.call_later(timeout_s, self._abandon, job, timeout_s)
        worker.jobs.put(job)
        return await job.future

    def _abandon(self, job: _Job, timeout_s: float) -> None:
        job.abandoned = True
        self.abandoned += 1
        if not job.future.done():
            job.future.set_result(Outcome(timed_out=True, duration_s=timeout_s))
        job.worker.interrupt()

    def finish(self, job: _Job, *, again: bool = False) -> None:
        """Called in a worker's thread: its job has an outcome. `again`: a first call may have been
        interrupted halfway."""
        self._done.append(job)
        if again or not self._told:
            self._told = True
            assert self._loop is not None
            try:
                self._loop.call_soon_threadsafe(self._collect)
            except RuntimeError:
                return  # the loop is closed: nobody waits

    def _collect(self) -> None:
        self._told = False
        while self._done:
            job = self._done.popleft()
            if job.collected:
                continue
            job.collected = True
            job.on_end()
            if job.abandoned:
                self.abandoned -= 1
                job.worker.jobs.put(None)
                continue
            assert job.timer is not None
            job.timer.cancel()
            self._idle.append(job.worker)
            if not job.future.done():  # else its caller was cancelled
                job.future.set_result(job.outcome)


class _Worker:
    """One thread: a call at a time, until it is abandoned."""

    def __init__(self, threads: Threads) -> None:
        self.jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads = threads
        self._thread = threading.Thread(target=self._run, name="tool", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise InfrastructureError(f"no thread for a tool: {error}") from error

    def interrupt(self) -> None:
        """Raise `Abandoned` in the thread, as soon as it runs Python again."""
        assert self._thread.ident is not None
        ident = ctypes.c_ulong(self._thread.ident)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(Abandoned))

    def _run(self) -> None:
        job: _Job | None = None
        try:
            while (job := self.jobs.get()) is not None:
                _perform(job)
                self._threads.finish(job)
                job = None  # it holds the result
        except Abandoned:  # the interruption came just after the call had ended
            if job is not None:
                self._threads.finish(job, again=True)


def _perform(job: _Job) -> None:
    """Fill in the outcome. A forked child of the function comes back here too, and ends."""
    process, began = os.getpid(), time.perf_counter()
    try:
        job.outcome.value = job.function()
    except BaseException as error:  # the user's code is a boundary; SystemExit is its own affair
        job.outcome.error = error
    if os.getpid() != process:
        os._exit(0)
    job.outcome.duration_s = time.perf_counter() - began
