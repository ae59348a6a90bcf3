"""What the loop of RL and the loop of supervised training share: restore, interrupt, checkpoint.

Invariant: the run folder's newest checkpoint and the learner's weights in it belong to the same
number of finished steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from rich.console import Console

from elpo_ray.cluster.learner import LearnerGroup
from elpo_ray.config import Config
from elpo_ray.runs.folder import RunFolder, RunState, read_state
from elpo_ray.runs.metrics import Metrics, Stopwatch
from elpo_ray.training.interrupts import Interrupts


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    folder: Path
    interrupted: bool


def nothing_left(
    run: RunFolder, config: Config, steps: int, console: Console, more: str = "trainer.steps=MORE"
) -> bool:
    """Whether a run of so many steps that is to be resumed has ended, which the user is told.
    `more`: how to get further steps."""
    if config.trainer.resume is None or config.trainer.fork is not None or not run.finished(steps):
        return False
    console.print(
        f"{run.path} has ended: its {steps} steps are taken, and nothing was changed. More steps: "
        f"{more}; other settings: trainer.fork=NEW_NAME",
        highlight=False,
        soft_wrap=True,
    )
    return True


def begin(run: RunFolder, config: Config, console: Console) -> None:
    """Make the run's folder ready, and say which settings a continued run goes on with."""
    run.begin(config)
    for change in run.changes:
        console.print(f"goes on with {change}", highlight=False, soft_wrap=True)


@dataclass(kw_only=True)
class RunLoop(ABC):
    """A run from its first step, or its newest checkpoint, to its last step."""

    unit: ClassVar[str] = "step"
    """What messages call a step."""

    config: Config
    steps: int
    """Steps of the whole run."""
    learner: LearnerGroup
    run: RunFolder
    metrics: Metrics
    console: Console
    watch: Stopwatch = field(default_factory=Stopwatch)
    state: RunState = field(default_factory=RunState)
    signals: Interrupts = field(default_factory=Interrupts)
    unfinished: ExitStack | None = field(default=None, init=False)
    """Commits the checkpoint that is being written."""

    @abstractmethod
    def take_steps(self) -> None:
        """Take the steps that are left. A KeyboardInterrupt may end it between two of them."""

    @abstractmethod
    def finish(self) -> None:
        """Say what came of the run, all steps taken."""

    def train(self) -> Outcome:
        """Take the steps and finish; on Ctrl-C write a checkpoint and stop."""
        if self.config.trainer.resume is not None:
            self.restore()
        try:
            with self.signals:
                self.take_steps()
                with self.signals.deferred():
                    self.finish_checkpoint()
        except KeyboardInterrupt:
            with self._told("while its checkpoint was written"):
                self.checkpoint()
            self.console.print(
                f"interrupted after {self.unit} {self.state.step}, of which a checkpoint is kept; "
                f"continue with trainer.resume={self.run.path}",
                highlight=False,
                soft_wrap=True,
            )
            return Outcome(self.run.path, interrupted=True)
        with self._told("after the last step"):
            self.finish()
        return Outcome(self.run.path, interrupted=False)

    @contextmanager
    def _told(self, when: str) -> Iterator[None]:
        """Have a Ctrl-C in the body say what is kept."""
        try:
            yield
        except KeyboardInterrupt:
            newest = self.run.newest_checkpoint()
            kept = (
                "nothing is kept"
                if newest is None
                else f"{newest} is kept; continue with trainer.resume={self.run.path}"
            )
            raise KeyboardInterrupt(f"interrupted {when}; {kept}") from None

    def checkpoint_if_due(self) -> None:
        """Write one after every `trainer.checkpoint_every` steps and after the last."""
        every, step = self.config.trainer.checkpoint_every, self.state.step
        if (every and step % every == 0) or step == self.steps:
            self.checkpoint(background=self.config.trainer.background_checkpoints)

    def checkpoint(self, *, background: bool = False) -> None:
        """Write one; with `background` it is complete only after `finish_checkpoint`."""
        self.finish_checkpoint()
        keep, state = self.config.trainer.keep_checkpoints, deepcopy(self.state)
        with self.watch.phase("checkpoint"), ExitStack() as stack:
            folder = stack.enter_context(self.run.checkpoint(state, keep))
            self.learner.save(folder / "learner", background=background)
            if background:
                self.unfinished = stack.pop_all()

    def finish_checkpoint(self) -> None:
        """Wait for what is still being written. Raises CheckpointError if it could not be."""
        unfinished, self.unfinished = self.unfinished, None
        if unfinished is not None:
            with self.watch.phase("checkpoint"), unfinished:
                self.learner.finish_save()

    def restore(self) -> None:
        """Continue from the newest checkpoint, which must exist."""
        checkpoint = self.run.newest_checkpoint()
        assert checkpoint is not None, "RunFolder.of and start_over check that there is one"
        self.state = read_state(checkpoint)
        self.learner.load(checkpoint / "learner")
        self.console.print(f"resumed {self.run.path} after {self.unit} {self.state.step}")
