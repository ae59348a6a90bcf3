"""What the queue and a rollout worker send each other: jobs, and reports of what became of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from elpo_ray.config.growth import GrowthConfig
from elpo_ray.config.rollout import SamplingConfig
from elpo_ray.rollout.journal import Completion, TreeEnd
from elpo_ray.rollout.sample import Sample
from elpo_ray.rollout.worker import RolloutWorker
from elpo_ray.types import Problem

R_co = TypeVar("R_co", covariant=True)
"""What a job returns."""
OnComplete = Callable[[Completion], None]


class WorkerUnusable(Exception):
    """So much fails on a worker that nothing should be sampled there any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(ABC, Generic[R_co]):
    """One input and what a rollout worker does with it."""

    problem: Problem
    width: int = 1
    """Trajectories that it keeps under way at once."""

    @abstractmethod
    async def run(self, worker: RolloutWorker, on_complete: OnComplete) -> R_co:
        """Do it. `on_complete` gets the trajectories from which another worker can go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowJob(Job[TreeEnd]):
    """Grow a tree. Its completed trajectories go to the queue one by one, as they come."""

    step: int
    """The training step, counted from 0."""
    budget: int
    """Rollouts that the input may spend."""
    journal: Sequence[Completion] = ()
    """What other workers, or this one with a smaller budget, completed before."""
    config: GrowthConfig | None = None
    """The growth of this step, where something in it is fitted; None: what the configuration
    says."""

    async def run(self, worker: RolloutWorker, on_complete: OnComplete) -> TreeEnd:
        tree = await worker.grow(
            self.problem, self.step, self.budget, self.journal, on_complete, self.config
        )
        return TreeEnd.of(tree)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateJob(Job[Sample]):
    """Sample one independent trajectory."""

    index: int
    """Which one of its problem's samples it is, from 0."""
    sampling: SamplingConfig | None = None
    """None: temperature 1."""

    async def run(self, worker: RolloutWorker, on_complete: OnComplete) -> Sample:
        return await worker.evaluate(self.problem, self.index, self.sampling)


@dataclass(slots=True)
class Report:
    """What has happened on a worker since its last report. Jobs are named by the queue's keys."""

    completions: list[tuple[int, Completion]] = field(default_factory=list)
    """(key, trajectory), in the order of completion."""
    finished: list[tuple[int, Any]] = field(default_factory=list)
    """(key, what `Job.run` returned)."""
    failed: list[tuple[int, Exception]] = field(default_factory=list)
    """(key, error): an InfrastructureError is the machine's fault, anything else a bug or a
    user's mistake."""
    room: int = 0
    """Trajectories that the worker could have under way in addition."""
    counters: dict[str, float] = field(default_factory=dict)
    """`RolloutCounters.values`."""
    phase: str = ""
    """What the worker is doing, in words."""
    version: int = 0
    """Version of the weights that the worker serves."""
    notes: list[str] = field(default_factory=list)
    """What a person should be told, once."""

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
