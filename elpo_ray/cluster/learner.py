"""The driver's end of its conversation with the learner's ranks (`learner_actor`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from elpo_ray.cluster.rollouts import RolloutGroup
from elpo_ray.cluster.sharing import DeviceSharing
from elpo_ray.cluster.waits import LearnerLost, learner_losses, wait_for
from elpo_ray.config.learner import OptimizerConfig
from elpo_ray.forest import TrainForest
from elpo_ray.types import Values


class LearnerGroup:
    """The learner's ranks as one: every call goes to all of them at once."""

    def __init__(
        self, ranks: list[ActorHandle[Any]], timeout_s: float, sharing: DeviceSharing
    ) -> None:
        self.ranks = ranks
        self._timeout_s = timeout_s
        self._sharing = sharing
        self._rollouts: RolloutGroup | None = None
        sharing.learner.onload = lambda: self._all([r.onload.remote() for r in ranks], "onload")
        sharing.learner.offload = lambda: self._all([r.offload.remote() for r in ranks], "offload")

    def update(
        self,
        forest: TrainForest,
        *,
        supervised: bool = False,
        advance: Callable[[int, int], None] = lambda done, total: None,
    ) -> Values:
        """Optimizer steps over `forest`; statistics over all ranks (`learner.UpdateStats`).
        `advance` hears at times how many packs are done, and how many there are."""
        shared = ray.put(forest)
        stats: Values = {}
        with self._sharing.for_learner():
            streams: list[Any] = [
                rank.update_reporting.options(num_returns="streaming").remote(shared, supervised)
                for rank in self.ranks
            ]
            for report in self._reports(streams, "update"):
                if isinstance(report, tuple):
                    advance(*report)
                else:
                    stats = report
        return stats

    def connect(self, rollouts: RolloutGroup) -> None:
        """Publish to these workers' engines, and to each that is restarted. Must come before
        `publish`."""
        self._rollouts = rollouts
        rollouts.bring_up_to_date = self._send
        with self.moving():
            self._all([r.connect.remote(rollouts.members) for r in self.ranks], "connect")

    def moving(self) -> AbstractContextManager[object]:
        """Around whatever changes the weights and its `publish`: a worker that is restarted in
        between waits, and then gets the new ones."""
        return self._sharing.weights_lock

    def publish(self, version: int) -> None:
        """Every engine serves the learner's weights as `version` when this returns; one that is
        down will when it is up again."""
        assert self._rollouts is not None, "connect() comes first"
        with self.moving():
            self._rollouts.version = min(version, self._rollouts.version)
            self._send(version, self._rollouts.members)
            self._rollouts.version = version

    def _send(self, version: int, workers: list[ActorHandle[Any]]) -> None:
        with self._sharing.for_learner():
            self._all([r.publish.remote(version, workers) for r in self.ranks], "publish")

    def reset_optimizer(self, config: OptimizerConfig, total_steps: int, reference: Path) -> None:
        with self._sharing.for_learner():
            calls = [r.reset_optimizer.remote(config, total_steps, reference) for r in self.ranks]
            self._all(calls, "reset_optimizer")

    def save(self, path: Path, *, background: bool = False) -> None:
        """Raises OSError if the disk refuses; then nothing of the checkpoint is left. `background`:
        `finish_save` must follow."""
        with self._sharing.for_learner():
            self._all([r.save.remote(path, background=background) for r in self.ranks], "save")

    def finish_save(self) -> None:
        """Wait for what `save` left to the background. Raises OSError if the disk refused."""
        self._all([rank.finish_save.remote() for rank in self.ranks], "finish_save")

    def load(self, path: Path) -> None:
        """Raises ValueError on a checkpoint of another model."""
        with self._sharing.for_learner():
            self._all([rank.load.remote(path) for rank in self.ranks], "load")

    def export(self, path: Path) -> None:
        """Write a plain Hugging Face folder."""
        with self._sharing.for_learner():
            self._all([rank.export.remote(path) for rank in self.ranks], "export")

    def _reports(self, streams: list[Any], phase: str) -> Iterator[Any]:
        """What the ranks yield, as it comes. Raises as `_all`; the deadline is for each report."""
        while streams:
            ready: list[Any] = ray.wait(streams, timeout=self._timeout_s)[0]
            if not ready:
                raise LearnerLost(f"{phase} of the learner: nothing in {self._timeout_s:.0f} s")
            for stream in ready:
                report = next(stream, None)
                if report is None:
                    streams.remove(stream)
                else:
                    yield self._all(report, phase)

    def _all(self, refs: Any, phase: str) -> Any:
        """Raises LearnerLost, naming the phase, when a rank dies or does not answer in time."""
        with learner_losses(phase):
            return wait_for(refs, self._timeout_s, f"{phase} of the learner")
