"""The driver's side of the actors: groups with blocking methods, a deadline on every wait."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from elpo_ray.config import Config, OptimizerConfig
from elpo_ray.forest import TrainForest
from elpo_ray.metrics import Values
from elpo_ray.samples import Sample
from elpo_ray.tree import RolloutTree
from elpo_ray.types import InfrastructureError, Problem
from sandbox.metrics import merged

Advance = Callable[[int], None]
Job = tuple[str, Problem, tuple[Any, ...]]
"""A rollout worker's method, its problem, and what else it is called with."""
POLL_S = 0.25
"""Seconds between two looks at what has finished."""
FETCH_S = 120.0
"""Seconds that the fetch of a finished result may take."""


def wait_for(refs: Any, timeout_s: float, what: str) -> Any:
    """`ray.get` with a deadline; the actor's own exception comes out, not Ray's wrapping of it."""
    try:
        return ray.get(refs, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError:
        raise TimeoutError(f"{what}: no answer within {timeout_s:.0f} s") from None
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if error.cause is not None else error) from error


class LearnerGroup:
    """The learner's ranks as one: every call goes to all of them at once."""

    def __init__(self, ranks: list[ActorHandle[Any]], timeout_s: float) -> None:
        self.ranks = ranks
        self._timeout_s = timeout_s

    def update(self, forest: TrainForest, *, supervised: bool = False) -> Values:
        """Optimizer steps over `forest`; statistics over all ranks (`learner.UpdateStats`)."""
        shared = ray.put(forest)
        refs = [rank.update.remote(shared, supervised) for rank in self.ranks]
        return dict(self._all(refs, "update")[0])

    def connect(self, rollouts: RolloutGroup) -> None:
        """Must come before `publish`."""
        self._all([rank.connect.remote(rollouts.workers) for rank in self.ranks], "connect")

    def publish(self, version: int) -> None:
        """Every engine serves the learner's weights as `version` when this returns."""
        self._all([rank.publish.remote(version) for rank in self.ranks], "publish")

    def reset_optimizer(self, config: OptimizerConfig, total_steps: int, reference: Path) -> None:
        refs = [r.reset_optimizer.remote(config, total_steps, str(reference)) for r in self.ranks]
        self._all(refs, "reset_optimizer")

    def save(self, path: Path) -> None:
        """Raises OSError if the disk refuses; then nothing of the checkpoint is left."""
        self._all([rank.save.remote(str(path)) for rank in self.ranks], "save")

    def load(self, path: Path) -> None:
        """Raises ValueError on a checkpoint of another model."""
        self._all([rank.load.remote(str(path)) for rank in self.ranks], "load")

    def export(self, path: Path) -> None:
        """Write a plain Hugging Face folder."""
        self._all([rank.export.remote(str(path)) for rank in self.ranks], "export")

    def _all(self, refs: list[Any], phase: str) -> Any:
        return wait_for(refs, self._timeout_s, f"{phase} of the learner")


class RolloutGroup:
    """The rollout workers as one: inputs are pulled by whoever has room."""

    def __init__(
        self,
        workers: list[ActorHandle[Any]],
        sandboxes: list[ActorHandle[Any]],
        config: Config,
    ) -> None:
        self.workers = workers
        self.sandboxes = sandboxes
        self._config = config

    def grow(self, inputs: Sequence[Problem], step: int, advance: Advance) -> list[RolloutTree]:
        """One tree an input, in order; `advance` hears how many trajectories are complete."""
        # Twice as many trajectories as the engine decodes at once: searches leave gaps.
        room = 2 * self._config.engine.max_num_seqs // self._config.algorithm.growth.n_total
        jobs = [("grow", problem, (step,)) for problem in inputs]
        return self._pull(jobs, max(1, room), advance, f"growing the trees of step {step + 1}")

    def evaluate(self, problems: Sequence[Problem], samples: int, advance: Advance) -> list[Sample]:
        """`samples` independent trajectories of each problem in turn, at temperature 1, their
        seeds fixed."""
        jobs = [("evaluate", problem, (i, None)) for problem in problems for i in range(samples)]
        return self._pull(jobs, self._config.engine.max_num_seqs, advance, "evaluating")

    def sandbox_metrics(self) -> dict[str, float]:
        """Calls by kind, latencies, live snapshots and their bytes, … of all sandbox actors."""
        refs = [actor.metrics.remote() for actor in self.sandboxes]
        timeout_s = self._config.cluster.call_timeout_s
        return merged(wait_for(refs, timeout_s, "metrics of the sandboxes"))

    def use(self, config: Config) -> None:
        """Work on `config.task` from now on, with the same model. ValueError as at the start."""
        self._config = config
        timeout_s = config.cluster.call_timeout_s
        wait_for([worker.use.remote(config) for worker in self.workers], timeout_s, "use of a task")

    def stream(self, jobs: Sequence[Job], room: int, advance: Advance, phase: str) -> Iterator[Any]:
        """(place in `jobs`, result) as they finish, at most `room` unfinished ones per worker; an
        InfrastructureError in the place of a result that it cost. Other errors are raised."""
        running: dict[Any, tuple[int, int]] = {}
        waiting = deque(enumerate(jobs))
        begun = self._completed(phase)
        patience = self._config.cluster.call_timeout_s
        deadline = time.monotonic() + patience

        def feed(worker: int) -> None:
            if waiting:
                index, (method, problem, args) = waiting.popleft()
                ref = getattr(self.workers[worker], method).remote(problem, *args)
                running[ref] = (index, worker)

        for _ in range(room):
            for worker in range(len(self.workers)):
                feed(worker)
        while running:
            done, _ = ray.wait(list(running), num_returns=len(running), timeout=POLL_S)
            for ref in done:
                index, worker = running.pop(ref)
                deadline = time.monotonic() + patience
                feed(worker)
                try:
                    result = wait_for(ref, FETCH_S, f"{phase}: {jobs[index][1].id}")
                except InfrastructureError as error:
                    result = error
                yield index, result
            advance(self._completed(phase) - begun)
            if time.monotonic() > deadline:
                late = ", ".join(f"{jobs[i][1].id} on rollout-{w}" for i, w in running.values())
                raise TimeoutError(f"{phase}: still waiting for {late[:500]}")

    def _pull(self, jobs: Sequence[Job], room: int, advance: Advance, phase: str) -> list[Any]:
        """Results of `jobs` in order. Raises InfrastructureError if one of them is lost."""
        results: dict[int, Any] = {}
        for index, result in self.stream(jobs, room, advance, phase):
            if isinstance(result, InfrastructureError):
                raise result
            results[index] = result
        return [results[index] for index in range(len(jobs))]

    def _completed(self, phase: str) -> int:
        timeout_s = self._config.cluster.call_timeout_s
        counts = wait_for([w.completed.remote() for w in self.workers], timeout_s, phase)
        return sum(counts)
