"""A cold start as a run of its own: demonstrations, optimizer steps, checkpoints, a model folder.

The learner is the one that RL uses. Invariants: the order of the demonstrations follows from the
seed, so a resumed run goes on with the ones it had not seen; `model/` appears only when whole.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console

from elpo_ray.cluster import Cluster, LearnerGroup
from elpo_ray.config import Config
from elpo_ray.forest import TrainForest, TrainTree
from elpo_ray.models.base import base_model
from elpo_ray.runs.atomic import new_folder
from elpo_ray.runs.folder import RunFolder, RunState, read_state
from elpo_ray.runs.metrics import SUPERVISED_COLUMNS, Metrics
from elpo_ray.tasks import make_task
from elpo_ray.training.cold_start import sft_batches
from elpo_ray.training.driver import Outcome
from elpo_ray.training.interrupts import Interrupts

STEPS_A_ROW = 10
"""Most optimizer steps between two rows of metrics."""


def train_supervised(config: Config) -> Outcome:
    """The whole run: from `model.path`, or the tiny model, to runs/NAME/model."""
    console = Console()
    config = _named(config)
    run = RunFolder.of(config)
    task = make_task(config.task, config.trainer.seed)
    base = base_model(config, task)
    batches = sft_batches(config, task, base)
    with Cluster(config, engines=False) as cluster:
        run.begin(config)
        learner = cluster.learner(base, len(batches))
        learner.reset_optimizer(config.cold_start.optimizer, len(batches), base)
        metrics = Metrics(run.path, config, console, SUPERVISED_COLUMNS)
        try:
            return SupervisedTrainer(
                config=config,
                batches=batches,
                learner=learner,
                run=run,
                metrics=metrics,
                console=console,
            ).train()
        finally:
            metrics.close()


@dataclass(kw_only=True)
class SupervisedTrainer:
    """One run's way through its batches."""

    config: Config
    batches: list[list[TrainTree]]
    learner: LearnerGroup
    run: RunFolder
    metrics: Metrics
    console: Console
    state: RunState = field(default_factory=RunState)
    started: float = field(default_factory=time.perf_counter)

    def train(self) -> Outcome:
        """Take the steps that are left; on Ctrl-C write a checkpoint and stop."""
        self.restore()
        signals = Interrupts()
        try:
            with signals:
                while self.state.step < len(self.batches):
                    with signals.deferred():
                        self.row()
        except KeyboardInterrupt:
            self.checkpoint()
            self.console.print(
                f"interrupted after optimizer step {self.state.step}; continue with "
                f"trainer.resume={self.run.path}"
            )
            return Outcome(self.run.path, interrupted=True)
        self.finish()
        return Outcome(self.run.path, interrupted=False)

    def row(self) -> None:
        """The optimizer steps up to the next row of metrics or checkpoint."""
        every, step = self.config.trainer.checkpoint_every, self.state.step
        end = min(step + STEPS_A_ROW, len(self.batches))
        if every:
            end = min(end, (step // every + 1) * every)
        forest = TrainForest(minibatches=self.batches[step:end])
        values: dict[str, Any] = dict(self.learner.update(forest, supervised=True))
        values["tokens_per_second"] = values["forward_tokens"] / max(values["seconds"], 1e-9)
        self.state.step = self.state.cursor = end
        self.metrics.log(end, values)
        if every and end % every == 0:
            self.checkpoint()

    def checkpoint(self) -> None:
        keep = self.config.trainer.keep_checkpoints
        with self.run.checkpoint(self.state, keep) as folder:
            self.learner.save(folder / "learner")

    def restore(self) -> None:
        """Continue from the newest checkpoint of a resumed run."""
        if self.config.trainer.resume is None:
            return
        checkpoint = self.run.newest_checkpoint()
        assert checkpoint is not None, "RunFolder.of checked it"
        self.learner.load(checkpoint / "learner")
        self.state = read_state(checkpoint)
        self.console.print(f"resumed {self.run.path} after optimizer step {self.state.step}")

    def finish(self) -> None:
        """Export the model, and say what was done."""
        self.checkpoint()
        folder = self.run.path / "model"
        if not folder.exists():
            with new_folder(folder) as partial:
                self.learner.export(partial)
        seconds = time.perf_counter() - self.started
        self.run.write_summary(
            {
                "experiment": self.config.experiment,
                "seed": self.config.trainer.seed,
                "optimizer_steps": self.state.step,
                "conversations": sum(map(len, self.batches)),
                "wall_seconds": seconds,
                "model": str(folder),
            }
        )
        self.console.print(
            f"{self.state.step} optimizer steps in {seconds:.0f} s; train on with "
            f"model.path={folder} cold_start.enabled=false",
            highlight=False,
            soft_wrap=True,
        )


def _named(config: Config) -> Config:
    """A new run's folder says what made it."""
    if config.trainer.run_name is not None or config.trainer.resume is not None:
        return config
    name = f"{config.experiment}-sft-{time.strftime('%Y%m%d-%H%M%S')}"
    return replace(config, trainer=replace(config.trainer, run_name=name))
