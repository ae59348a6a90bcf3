"""The driver's side of the learner, and how it waits: a deadline on every remote call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle

from elpo_ray.cluster.turns import Turns
from elpo_ray.config.learner import OptimizerConfig
from elpo_ray.forest import TrainForest
from elpo_ray.types import Fault, Values

if TYPE_CHECKING:
    from elpo_ray.cluster.rollouts import RolloutGroup


class LearnerLost(Fault):
    """A rank of the learner died or hangs: its weights since the newest checkpoint are gone."""


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

    def __init__(self, ranks: list[ActorHandle[Any]], timeout_s: float, turns: Turns) -> None:
        self.ranks = ranks
        self._timeout_s = timeout_s
        self._turns = turns
        self._rollouts: RolloutGroup | None = None
        turns.learner.enter = lambda: self._all([r.onload.remote() for r in ranks], "onload")
        turns.learner.leave = lambda: self._all([r.offload.remote() for r in ranks], "offload")

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
        calls: list[Any] = [r.update.options(num_returns="streaming") for r in self.ranks]
        stats: Values = {}
        with self._turns.of_learner():
            streams = [call.remote(shared, supervised) for call in calls]
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

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Around whatever changes the weights and its `publish`: a worker that is restarted in
        between waits, and then gets the new ones."""
        with self._turns.weights_move:
            yield

    def publish(self, version: int) -> None:
        """Every engine serves the learner's weights as `version` when this returns; one that is
        down will when it is up again."""
        assert self._rollouts is not None, "connect() comes first"
        with self.moving():
            self._rollouts.version = min(version, self._rollouts.version)
            self._send(version, self._rollouts.members)
            self._rollouts.version = version

    def _send(self, version: int, workers: list[ActorHandle[Any]]) -> None:
        self._in_turn("publish", version, workers)

    def reset_optimizer(self, config: OptimizerConfig, total_steps: int, reference: Path) -> None:
        self._in_turn("reset_optimizer", config, total_steps, str(reference))

    def save(self, path: Path, *, background: bool = False) -> None:
        """Raises OSError if the disk refuses; then nothing of the checkpoint is left. `background`:
        `finish_save` must follow."""
        self._in_turn("save", str(path), background)

    def finish_save(self) -> None:
        """Wait for what `save` left to the background. Raises OSError if the disk refused."""
        self._all([rank.finish_save.remote() for rank in self.ranks], "finish_save")

    def load(self, path: Path) -> None:
        """Raises ValueError on a checkpoint of another model."""
        self._in_turn("load", str(path))

    def export(self, path: Path) -> None:
        """Write a plain Hugging Face folder."""
        self._in_turn("export", str(path))

    def _in_turn(self, method: str, *args: Any) -> None:
        """Call `method` of every rank while the learner has the devices."""
        with self._turns.of_learner():
            self._all([getattr(rank, method).remote(*args) for rank in self.ranks], method)

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

    def _all(self, refs: list[Any], phase: str) -> Any:
        """Raises LearnerLost, naming the phase, when a rank dies or does not answer in time."""
        with learner_losses(phase):
            return wait_for(refs, self._timeout_s, f"{phase} of the learner")


@contextmanager
def learner_losses(phase: str) -> Iterator[None]:
    """A rank that dies in the body, or does not answer, is a LearnerLost."""
    try:
        yield
    except ray.exceptions.RayActorError as error:
        raise LearnerLost(f"a learner rank died in {phase}: {first_line(error)}") from error
    except TimeoutError as error:
        raise LearnerLost(str(error)) from error


def first_line(error: BaseException) -> str:
    """What went wrong, without Ray's page of advice."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
