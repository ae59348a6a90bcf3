"""The messages between the queue and a rollout worker."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from elpo_ray.rollout.journal import Completion
from elpo_ray.types import Problem


class WorkerUnusable(Exception):
    """So much fails on a worker that nothing should be sampled any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One input and what to do with it."""

    run: Callable[..., Awaitable[Any]]
    """A function of the rollout worker, the problem and `args`."""
    problem: Problem
    args: tuple[Any, ...] = ()
    width: int = 1
    """Trajectories that it keeps under way at once."""
    key: int = -1
    """Names it between queue and worker; given by the queue."""
    grows: bool = False
    """`run` is `RolloutWorker.grow`: completions are told one by one, and it can be taken up again
    from them."""
    journal: Sequence[Completion] = ()
    """What was completed before it came to this worker, where it `grows`."""


@dataclass(slots=True)
class Report:
    """What a worker has to say since the last one."""

    completions: list[tuple[int, Completion]] = field(default_factory=list)
    """(job, trajectory), in the order of completion."""
    finished: list[tuple[int, Any]] = field(default_factory=list)
    """(job, result); of one that grows a `growth.journal.TreeEnd`."""
    failed: list[tuple[int, Exception]] = field(default_factory=list)
    """(job, error): an InfrastructureError is the machine's fault, anything else a bug or a
    user's mistake."""
    room: int = 0
    """Trajectories that the worker could have under way in addition."""
    load: dict[str, float] = field(default_factory=dict)
    """`RolloutCounters.numbers`."""
    phase: str = ""
    """What the worker is doing, in words."""
    version: int = 0
    """Of the weights that it serves."""

    @property
    def progress(self) -> bool:
        return bool(self.completions or self.finished)


@dataclass(frozen=True, slots=True)
class SetAside:
    """An input that was given up: its worker died of it, or the infrastructure lost it, twice."""

    problem: Problem
    why: str
    journal: Sequence[Completion] = ()
    """What it had completed."""
