"""The driver's side of the queue: which inputs wait, which worker holds which, what is complete.

An input is with one worker at most. Its journal only grows, and the next worker that gets the input
gets the journal with it. Its result comes once.

When a worker dies, the inputs that it held go back to the front of the queue with their journals.
An input that was with a worker at two deaths, without a completed trajectory in between, is given
only to a worker that holds nothing else, until it completes one. If at two of these deaths the
worker held nothing else, the input is set aside: no other input can have caused them, and a single
one may be chance. An input that fails by an InfrastructureError goes back as well; that counts like
the death of a worker that held nothing else.

The queue is called from two threads: one talks with the workers, another waits for batches.
"""

from __future__ import annotations

import threading
from collections import deque
from itertools import count
from typing import Any

from elpo_ray.scheduling.batches import Batch, Entry
from elpo_ray.scheduling.jobs import Job, Report
from elpo_ray.types import InfrastructureError

MAX_LOSSES = 2
"""So many losses of an input, without a completion in between, have it run alone; so many that
no other input can have caused have it set aside."""
NAMED = 5
"""Most inputs that `InputQueue.describe` names."""


class InputQueue:
    """Inputs by batch, workers by number."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._waiting: deque[Entry] = deque()
        self._held: dict[int, dict[int, Entry]] = {}
        """By worker, then by the key of its job."""
        self._keys = count()
        self._batches: set[Batch[Any]] = set()
        self._stopped: BaseException | None = None
        self.set_aside = 0
        """Inputs set aside since the start."""
        self.requeued = 0
        """Inputs that went back because their worker died."""

    def submit(self, batch: Batch[Any], *, first: bool = False) -> None:
        """`first`: before what waits already."""
        with self._lock:
            if self._stopped is not None:
                batch.stop(self._stopped)
            self._batches.add(batch)
            if first:
                self._waiting.extendleft(reversed(batch.entries))
            else:
                self._waiting.extend(batch.entries)

    def withdraw(self, batch: Batch[Any]) -> None:
        """Forget a batch: what workers still do for it is ignored."""
        with self._lock:
            self._batches.discard(batch)
            self._waiting = deque(e for e in self._waiting if e.batch is not batch)
            for worker, held in self._held.items():
                self._held[worker] = {k: e for k, e in held.items() if e.batch is not batch}

    def stop(self, error: BaseException) -> None:
        """No batch will be finished, nor any that is submitted later."""
        with self._lock:
            self._stopped = error
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """No batch that was submitted so far will be finished."""
        with self._lock:
            for batch in self._batches:
                batch.stop(error)

    # --- workers ---

    def join(self, worker: int) -> None:
        """A worker is ready for inputs."""
        with self._lock:
            self._held[worker] = {}

    def give(self, worker: int, room: int) -> dict[int, Job[Any]]:
        """Jobs for a worker with room for `room` more trajectories, by key: no more than its share
        of all, so that no batch waits for one worker while others are idle."""
        with self._lock:
            given = {}
            for entry in self._choose(worker, room):
                key = next(self._keys)
                self._waiting.remove(entry)
                self._held[worker][key], entry.home = entry, worker
                given[key] = entry.job_now()
            return given

    def _choose(self, worker: int, room: int) -> list[Entry]:
        held = self._held[worker]
        if any(entry.run_alone for entry in held.values()):
            return []
        alone = next((entry for entry in self._waiting if entry.run_alone), None)
        if alone is not None and not held:
            return [alone]
        chosen: list[Entry] = []
        leased = sum(len(entries) for entries in self._held.values())
        share = -(-(len(self._waiting) + leased) // len(self._held))
        for entry in self._waiting:
            full = room < entry.job.width and (held or chosen)
            if full or len(held) + len(chosen) >= share:
                break
            at_home = entry.home in (None, worker) or entry.home not in self._held
            if at_home and not entry.run_alone:
                room -= entry.job.width
                chosen.append(entry)
        return chosen

    def take(self, worker: int, report: Report) -> None:
        """Take in a worker's report. Raises nothing: a bug in a job stops its batch."""
        with self._lock:
            held = self._held[worker]
            for key, done in report.completions:
                if (entry := held.get(key)) is not None:
                    entry.complete(done)
            for key, result in report.finished:
                if (entry := held.pop(key, None)) is not None:
                    self._waiting.extendleft(entry.batch.finish(entry, result))
            for key, error in report.failed:
                if (entry := held.pop(key, None)) is None:
                    continue
                if not isinstance(error, InfrastructureError):
                    entry.batch.stop(error)
                    continue
                entry.lose(alone=True)
                if entry.losses_alone >= MAX_LOSSES:
                    self._give_up(entry, f"lost to the infrastructure again and again: {error}")
                else:
                    self._waiting.appendleft(entry)

    def lost(self, worker: int, why: str) -> None:
        """A worker has died; what it held goes back, or is set aside."""
        with self._lock:
            held = list(self._held.pop(worker, {}).values())
            for entry in reversed(held):
                entry.lose(alone=len(held) == 1)
                if entry.losses_alone >= MAX_LOSSES:
                    self._give_up(entry, f"its worker died {entry.losses} times: {why}")
                    continue
                entry.run_alone = entry.losses >= MAX_LOSSES
                self._waiting.appendleft(entry)
                self.requeued += 1

    def _give_up(self, entry: Entry, why: str) -> None:
        self.set_aside += 1
        self._waiting.extendleft(entry.batch.give_up(entry, why))

    # --- for people ---

    def pending(self) -> dict[int, int]:
        """How many inputs each live worker holds."""
        with self._lock:
            return {worker: len(held) for worker, held in sorted(self._held.items())}

    def describe(self, worker: int) -> str:
        """What a worker holds, in words."""
        with self._lock:
            held = list(self._held.get(worker, {}).values())
        names = ", ".join(entry.job.problem.id for entry in held[:NAMED])
        return f"{len(held)} inputs" + (f" ({names}{', …' * (len(held) > NAMED)})" if held else "")
