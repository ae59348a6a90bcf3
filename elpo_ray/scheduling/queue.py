"""The owner's side: which inputs wait, who holds which, and what of them is complete.

Invariants: an input is with one worker at most; its journal only grows, and whoever gets the input
next gets the journal; its result comes once. A dead worker's inputs go back to the front. One that
was with a worker at two deaths and completed nothing in between is a suspect, given out alone. Only
deaths of a worker that had nothing else convict it: two of them, for one may be chance.

Called from two threads: one talks with the workers, another waits for batches.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from elpo_ray.rollout.journal import Completion, TreeEnd, assemble
from elpo_ray.scheduling.jobs import Job, Report, SetAside
from elpo_ray.scheduling.shared_budget import SharedBudget, could_learn_more
from elpo_ray.types import InfrastructureError

POLL_S = 0.25
"""Seconds between two looks at how far a batch is."""
STRIKES = 2
"""Deaths of its worker without a completion in between that make an input a suspect, and as many
without other inputs there that convict it."""


@dataclass(eq=False)
class Entry:
    """One input in the queue."""

    job: Job
    batch: Batch
    index: int
    """Place in the batch."""
    journal: list[Completion] = field(default_factory=list)
    home: int | None = None
    """The worker that holds it, or held it last: its prefixes are cached there."""
    strikes: int = 0
    mark: int = 0
    """Completions at the last strike."""
    blame: int = 0
    """Strikes, of those, where the worker had nothing else."""
    alone: bool = False

    def strike(self, *, to_blame: bool) -> None:
        if self.mark != len(self.journal):
            self.strikes = self.blame = 0
        self.strikes, self.blame = self.strikes + 1, self.blame + to_blame
        self.mark = len(self.journal)

    def set_aside(self, why: str) -> SetAside:
        return SetAside(self.job.problem, why, tuple(self.journal))


class Batch:
    """Jobs that were submitted together; iterate `results`."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = list(jobs)
        self.completed = 0
        """Trajectories."""
        self._events: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()

    def finish(self, entry: Entry, result: Any) -> list[int]:
        """A worker has finished a job; returns the places of those that now go on."""
        self.put(entry.index, result)
        return []

    def put(self, index: int, result: Any) -> None:
        self._events.put((index, result))

    def stop(self, error: BaseException) -> None:
        """Have `results` raise."""
        self._events.put((-1, error))

    def results(self, advance: Callable[[int], None] = lambda done: None) -> Iterator[Any]:
        """(place, result or SetAside) as they come; `advance` hears of completed trajectories."""
        left = len(self.jobs)
        while left:
            try:
                index, result = self._events.get(timeout=POLL_S)
            except queue.Empty:
                advance(self.completed)
                continue
            if index < 0:
                raise result
            left -= 1
            advance(self.completed)
            yield index, result


class TreeBatch(Batch):
    """Inputs whose trees are grown; their results are trees, or SetAside.

    With a shared budget, a finished tree that could still teach waits for a grant until the batch
    is over.
    """

    def __init__(self, jobs: Sequence[Job], shared: SharedBudget | None = None) -> None:
        super().__init__(jobs)
        self.shared = shared
        self._ends: dict[int, tuple[Entry, TreeEnd]] = {}
        """Finished, and perhaps to be continued."""
        self._open = len(self.jobs)
        """Inputs that are neither in `_ends` nor set aside."""

    def finish(self, entry: Entry, result: Any) -> list[int]:
        if self.shared is None:
            self._deliver(entry, result)
            return []
        tree = assemble(entry.job.problem, entry.job.args[1], entry.journal, result)
        self._ends[entry.index] = entry, result
        return self._settle(entry.index, len(entry.journal), could_learn_more(tree))

    def _settle(self, index: int, spent: int, hungry: bool) -> list[int]:
        assert self.shared is not None
        going_on = self.shared.settle(index, spent, hungry)
        self._open += len(going_on) - 1
        for other in going_on:
            del self._ends[other]
        if self._open == 0:
            for entry, end in self._ends.values():
                self._deliver(entry, end)
            self._ends.clear()
        return going_on

    def _deliver(self, entry: Entry, end: TreeEnd) -> None:
        tree = assemble(entry.job.problem, entry.job.args[1], entry.journal, end)
        self.put(entry.index, tree)

    def give_up(self, entry: Entry, why: str) -> list[int]:
        """Set an input aside; its unspent rollouts are for the others."""
        self.put(entry.index, entry.set_aside(why))
        return [] if self.shared is None else self._settle(entry.index, len(entry.journal), False)


class InputQueue:
    """Inputs by batch, workers by number."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._waiting: deque[Entry] = deque()
        self._held: dict[int, dict[int, Entry]] = {}
        """By worker, then by the key of its job."""
        self._keys = count()
        self._batches: dict[int, Batch] = {}
        self._entries: dict[tuple[int, int], Entry] = {}
        self._stopped: BaseException | None = None
        self.set_aside = 0
        """Inputs, since the start."""
        self.requeued = 0
        """Inputs that a death gave back."""

    def submit(self, batch: Batch, *, first: bool = False) -> None:
        """`first`: before what waits already."""
        entries = [Entry(job, batch, index) for index, job in enumerate(batch.jobs)]
        with self._lock:
            if self._stopped is not None:
                batch.stop(self._stopped)
            self._batches[id(batch)] = batch
            self._entries |= {(id(batch), e.index): e for e in entries}
            if first:
                self._waiting.extendleft(reversed(entries))
            else:
                self._waiting.extend(entries)

    def withdraw(self, batch: Batch) -> None:
        """Forget a batch: what is under way of it will not be missed."""
        with self._lock:
            self._batches.pop(id(batch), None)
            self._waiting = deque(e for e in self._waiting if e.batch is not batch)
            for worker, held in self._held.items():
                self._held[worker] = {k: e for k, e in held.items() if e.batch is not batch}
            self._entries = {k: e for k, e in self._entries.items() if e.batch is not batch}

    def stop(self, error: BaseException) -> None:
        """No batch will be finished, nor any that is submitted later."""
        with self._lock:
            self._stopped = error
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """No batch of now will be finished."""
        with self._lock:
            for batch in self._batches.values():
                batch.stop(error)

    # --- workers ---

    def join(self, worker: int) -> None:
        """A worker is ready for inputs."""
        with self._lock:
            self._held[worker] = {}

    def give(self, worker: int, room: int) -> list[Job]:
        """Inputs for a worker with room for `room` more trajectories: no more than its share of
        all, so that nobody waits for one worker while others are idle."""
        with self._lock:
            held = self._held[worker]
            if any(entry.alone for entry in held.values()):
                return []
            given = self._suspect() if not held else []
            leased = sum(len(entries) for entries in self._held.values())
            share = -(-(len(self._waiting) + leased) // len(self._held))
            if not given:
                for entry in list(self._waiting):
                    full = room < entry.job.width and (held or given)
                    if full or len(held) + len(given) >= share:
                        break
                    at_home = entry.home in (None, worker) or entry.home not in self._held
                    if entry.alone or not at_home:
                        continue
                    room -= entry.job.width
                    given.append(entry)
            return [self._lease(entry, worker) for entry in given]

    def _suspect(self) -> list[Entry]:
        """One that must be run alone, if there is any."""
        return [entry for entry in self._waiting if entry.alone][:1]

    def _lease(self, entry: Entry, worker: int) -> Job:
        key = next(self._keys)
        self._waiting.remove(entry)
        self._held[worker][key], entry.home = entry, worker
        return replace(entry.job, key=key, journal=tuple(entry.journal))

    def take(self, worker: int, report: Report) -> None:
        """What a worker has to say. Raises nothing: a bug in a job stops its batch."""
        with self._lock:
            held = self._held[worker]
            for key, done in report.completions:
                if (entry := held.get(key)) is not None:
                    entry.journal.append(done)
                    entry.alone = False
                    entry.batch.completed += 1
            for key, result in report.finished:
                if (entry := held.pop(key, None)) is not None:
                    if not entry.job.grows:
                        entry.batch.completed += 1
                    self._go_on(entry.batch, entry.batch.finish(entry, result))
            for key, error in report.failed:
                if (entry := held.pop(key, None)) is None:
                    continue
                if not isinstance(error, InfrastructureError):
                    entry.batch.stop(error)
                    continue
                entry.strike(to_blame=True)
                if entry.blame >= STRIKES:
                    self._give_up(entry, f"lost to the infrastructure again and again: {error}")
                else:
                    self._waiting.appendleft(entry)

    def lost(self, worker: int, why: str) -> None:
        """A worker has died; what it held goes back, or is set aside."""
        with self._lock:
            held = list(self._held.pop(worker, {}).values())
            for entry in reversed(held):
                entry.strike(to_blame=len(held) == 1)
                if entry.blame >= STRIKES:
                    self._give_up(entry, f"its worker died {entry.strikes} times: {why}")
                    continue
                entry.alone = entry.strikes >= STRIKES
                self._waiting.appendleft(entry)
                self.requeued += 1

    def _give_up(self, entry: Entry, why: str) -> None:
        self.set_aside += 1
        if isinstance(entry.batch, TreeBatch):
            self._go_on(entry.batch, entry.batch.give_up(entry, why))
        else:
            entry.batch.put(entry.index, entry.set_aside(why))

    def _go_on(self, batch: Batch, indices: Sequence[int]) -> None:
        """Inputs of a shared budget whose grant came: where their prefixes are, and soon."""
        for index in indices:
            assert isinstance(batch, TreeBatch) and batch.shared is not None
            entry = self._entries[id(batch), index]
            step, _ = entry.job.args
            entry.job = replace(entry.job, args=(step, batch.shared.total_of(index)))
            self._waiting.appendleft(entry)

    # --- for people ---

    def pending(self) -> dict[int, int]:
        """Inputs that each live worker holds."""
        with self._lock:
            return {worker: len(held) for worker, held in sorted(self._held.items())}

    def describe(self, worker: int, most: int = 5) -> str:
        """What a worker holds, in words."""
        with self._lock:
            held = list(self._held.get(worker, {}).values())
        names = ", ".join(entry.job.problem.id for entry in held[:most])
        return f"{len(held)} inputs" + (f" ({names}{', …' * (len(held) > most)})" if held else "")
