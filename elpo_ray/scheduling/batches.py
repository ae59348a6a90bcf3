"""Jobs that were submitted together, how far each of them is, and their results as they come."""

from __future__ import annotations

import queue
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from elpo_ray.rollout.journal import Completion, TreeEnd, assemble
from elpo_ray.scheduling.jobs import GrowJob, Job, SetAside
from elpo_ray.scheduling.shared_budget import SharedBudget, could_learn_more
from elpo_ray.tree import RolloutTree

POLL_S = 0.25
"""Seconds between two looks at how far a batch is."""
R = TypeVar("R")


@dataclass(eq=False)
class Entry:
    """One input of a batch, and what has become of it so far."""

    job: Job[Any]
    batch: Batch[Any]
    index: int
    """Place in the batch."""
    journal: list[Completion] = field(default_factory=list)
    home: int | None = None
    """The worker that holds it, or held it last: its prefixes are cached there."""
    losses: int = 0
    """How often, since its last completion, its worker died or the infrastructure made it fail."""
    losses_alone: int = 0
    """Those of its `losses` that no other input can have caused."""
    run_alone: bool = False
    """Whether it is given only to a worker that holds nothing else."""

    def job_now(self) -> Job[Any]:
        """The job for the next worker, which goes on from the journal."""
        if isinstance(self.job, GrowJob):
            return replace(self.job, journal=tuple(self.journal))
        return self.job

    def complete(self, done: Completion) -> None:
        self.journal.append(done)
        self.batch.completed += 1
        self.losses = self.losses_alone = 0
        self.run_alone = False

    def lose(self, *, alone: bool) -> None:
        self.losses += 1
        self.losses_alone += alone


class Batch(ABC, Generic[R]):
    """Jobs whose `results` the caller iterates."""

    def __init__(self, jobs: Sequence[Job[Any]]) -> None:
        self.entries = [Entry(job, self, index) for index, job in enumerate(jobs)]
        self.completed = 0
        """Trajectories; of jobs that report none, the jobs."""
        self._events: queue.SimpleQueue[tuple[int, R | SetAside] | BaseException]
        self._events = queue.SimpleQueue()

    @abstractmethod
    def finish(self, entry: Entry, result: Any) -> list[Entry]:
        """A worker has finished a job; returns the entries that now go on with a new one."""

    def give_up(self, entry: Entry, why: str) -> list[Entry]:
        """Set an input aside; returns the entries that now go on."""
        self.put(entry.index, SetAside(entry.job.problem, why, tuple(entry.journal)))
        return []

    def put(self, index: int, result: R | SetAside) -> None:
        self._events.put((index, result))

    def stop(self, error: BaseException) -> None:
        """Have `results` raise."""
        self._events.put(error)

    def results(
        self, advance: Callable[[int], None] = lambda completed: None
    ) -> Iterator[tuple[int, R | SetAside]]:
        """(place, result) as they come. `advance` is called with `completed` now and then."""
        left = len(self.entries)
        while left:
            try:
                event = self._events.get(timeout=POLL_S)
            except queue.Empty:
                advance(self.completed)
                continue
            if isinstance(event, BaseException):
                raise event
            left -= 1
            advance(self.completed)
            yield event


class JobBatch(Batch[R]):
    """Jobs whose results are handed out as they are."""

    def __init__(self, jobs: Sequence[Job[R]]) -> None:
        super().__init__(jobs)

    def finish(self, entry: Entry, result: R) -> list[Entry]:
        self.completed += 1
        self.put(entry.index, result)
        return []


class GrowBatch(Batch[RolloutTree]):
    """Inputs whose trees are grown.

    With a shared budget, a finished tree that could still teach waits for a grant until the batch
    is over.
    """

    def __init__(self, jobs: Sequence[GrowJob], shared: SharedBudget | None = None) -> None:
        super().__init__(jobs)
        self._jobs = list(jobs)
        """The jobs with the budgets that they have now."""
        self._shared = shared
        self._trees: dict[int, RolloutTree] = {}
        """Finished trees, perhaps to be continued, by place."""
        self._open = len(jobs)
        """Inputs that are neither in `_trees` nor set aside."""

    def finish(self, entry: Entry, result: TreeEnd) -> list[Entry]:
        job = self._jobs[entry.index]
        tree = assemble(job.problem, job.budget, entry.journal, result)
        if self._shared is None:
            self.put(entry.index, tree)
            return []
        self._trees[entry.index] = tree
        return self._settle(self._shared, entry, could_learn_more(tree))

    def give_up(self, entry: Entry, why: str) -> list[Entry]:
        """Set an input aside; its unspent rollouts are for the others."""
        super().give_up(entry, why)
        return [] if self._shared is None else self._settle(self._shared, entry, False)

    def _settle(self, shared: SharedBudget, entry: Entry, wants_more: bool) -> list[Entry]:
        granted = shared.settle(entry.index, len(entry.journal), wants_more)
        self._open += len(granted) - 1
        for index in granted:
            del self._trees[index]
            job = replace(self._jobs[index], budget=shared.total_of(index))
            self._jobs[index] = self.entries[index].job = job
        if self._open == 0:
            for index, tree in self._trees.items():
                self.put(index, tree)
            self._trees.clear()
        return [self.entries[index] for index in granted]
