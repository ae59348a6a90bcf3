"""The loop: inputs -> trees -> credit -> forest -> update -> publish -> report.

Invariants: the weights' version is the number of finished steps; inputs are handed out in the order
of the training stream and the checkpoint keeps how many were, so a resumed run meets the same ones;
Ctrl-C never cuts an update in two.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from elpo_ray.checks import check_prompts
from elpo_ray.cluster import Cluster, LearnerGroup, RolloutGroup
from elpo_ray.cold_start import base_model, starting_model
from elpo_ray.config import Config
from elpo_ray.credit import assign
from elpo_ray.evaluation.summary import mean_success
from elpo_ray.forest import TrainForest, pack
from elpo_ray.growth.dynamic import Batch, Grown, collect
from elpo_ray.interfaces import Task
from elpo_ray.metrics import (
    Metrics,
    Stopwatch,
    Values,
    comparison_axes,
    progress_bar,
    tree_metrics,
)
from elpo_ray.model_folder import local_folder
from elpo_ray.report import show_summary, summarize
from elpo_ray.rollout import localization_accuracy
from elpo_ray.runs import RunFolder, RunState, read_state
from elpo_ray.tasks import make_task


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    folder: Path
    interrupted: bool


def train(config: Config) -> Outcome:
    """A whole run, from the starting model to the summary."""
    console, watch = Console(), Stopwatch()
    run = RunFolder.of(config)
    task = make_task(config.task, config.trainer.seed)
    base = base_model(config, task)
    check_prompts(config, task, base)
    with watch.phase("start"):
        cluster = Cluster(config)
    with cluster:
        run.begin(config)
        with watch.phase("cold_start"):
            start = starting_model(config, task, base, cluster, console)
        with watch.phase("start"):
            learner = start.learner or cluster.learner(start.folder, config.optimizer_steps)
            rollouts = cluster.rollouts(start.folder)
            run.keep_tokenizer(local_folder(start.folder))
            learner.connect(rollouts)
        metrics = Metrics(run.path, config, console)
        try:
            return Trainer(
                config=config,
                task=task,
                learner=learner,
                rollouts=rollouts,
                run=run,
                metrics=metrics,
                console=console,
                watch=watch,
            ).train()
        finally:
            metrics.close()


@dataclass(kw_only=True)
class Trainer:
    """One run's loop over its actors."""

    config: Config
    task: Task
    learner: LearnerGroup
    rollouts: RolloutGroup
    run: RunFolder
    metrics: Metrics
    console: Console
    watch: Stopwatch
    state: RunState = field(default_factory=RunState)

    def train(self) -> Outcome:
        """Evaluate, take the steps, evaluate; on Ctrl-C write a checkpoint and stop."""
        self.restore()
        signals = Interrupts()
        try:
            with signals:
                if self.state.pass_at_1_before is None:
                    self.state.pass_at_1_before = self.evaluate()
                    self.tell_pass_at_1(self.state.pass_at_1_before)
                while self.state.step < self.config.trainer.steps:
                    self.step(signals)
                after = self.evaluate()
        except KeyboardInterrupt:
            self.checkpoint()
            self.console.print(
                f"interrupted after step {self.state.step}; continue with "
                f"trainer.resume={self.run.path}"
            )
            return Outcome(self.run.path, interrupted=True)
        self.finish(after)
        return Outcome(self.run.path, interrupted=False)

    def step(self, signals: Interrupts) -> None:
        """One batch of inputs becomes one version of the weights."""
        step, algorithm = self.state.step, self.config.algorithm
        with self.watch.phase("grow"):
            wanted = self.config.trainer.inputs_per_step
            batch = collect(self.grow, wanted, algorithm.growth.dynamic)
        with signals.deferred():
            with self.watch.phase("credit"):
                forest = TrainForest(minibatches=[])
                if batch.trained:
                    credits = assign(batch.trained, algorithm)
                    forest = pack(batch.trained, credits, algorithm.loss, self.config.learner)
            with self.watch.phase("update"), self.status(f"step {step + 1}: updating"):
                stats = self.learner.update(forest)
            with self.watch.phase("sync"):
                self.learner.publish(version=step + 1)
            self.state.step, self.state.cursor = step + 1, self.state.cursor + len(batch.grown)
            self.report(batch, stats)
            self.checkpoint_if_due()
        self.evaluate_if_due()

    def grow(self, first: int, count: int) -> list[Grown]:
        """`count` inputs of the stream and their trees, from the `first`-th one of this step on."""
        step, start = self.state.step, self.state.cursor + first
        inputs = [self.task.train_problem(i) for i in range(start, start + count)]
        total = count * self.config.algorithm.growth.n_total
        with self.bar(f"step {step + 1}: growing trees", total) as advance:
            return list(zip(inputs, self.rollouts.grow(inputs, step, advance), strict=True))

    def evaluate(self) -> float:
        """pass@1 on the held-out problems, `task.eval_samples` of each, at temperature 1."""
        problems = self.task.eval_problems(self.config.task.eval_problems)
        samples = self.config.task.eval_samples
        total = len(problems) * samples
        with self.watch.phase("evaluate"), self.bar("evaluating", total) as advance:
            drawn = self.rollouts.evaluate(problems, samples, advance)
        return mean_success(drawn)

    def evaluate_if_due(self) -> None:
        every, step = self.config.trainer.eval_every, self.state.step
        if every and step % every == 0 and step < self.config.trainer.steps:
            self.tell_pass_at_1(self.evaluate())

    def tell_pass_at_1(self, passed: float) -> None:
        text = f"step {self.state.step}: held-out pass@1 {passed:.1%}"
        self.console.print(text, highlight=False)

    def report(self, batch: Batch, stats: Values) -> None:
        """Dump the trees, log one object of numbers, add to the run's totals. Everything grown
        counts, also what was not trained on."""
        right, judged = localization_accuracy(self.task, batch.inputs, batch.trees)
        values = tree_metrics(batch.trees, self.config.algorithm.growth.bel)
        values |= {"inputs_grown": len(batch.grown), "inputs_trained": len(batch.trained)}
        seconds = self.watch.lap()
        values |= stats | {f"seconds/{phase}": value for phase, value in seconds.items()}
        values["tokens_per_second"] = values["tokens_generated"] / max(seconds["grow"], 1e-9)
        values["weight_version"] = self.state.step
        if judged:
            values["localization_accuracy"] = right / judged
        self.state.add(
            rollouts=values["rollouts"],
            tokens_generated=values["tokens_generated"],
            localizations_right=right,
            localizations_judged=judged,
            **{f"seconds/{phase}": value for phase, value in seconds.items()},
        )
        values |= comparison_axes(self.state.totals)
        tokens = self.config.logging.dump_tokens
        self.run.write_trees(self.state.step, batch.trees, tokens=tokens)
        self.metrics.log(self.state.step, values)

    def checkpoint_if_due(self) -> None:
        every, step = self.config.trainer.checkpoint_every, self.state.step
        if (every and step % every == 0) or step == self.config.trainer.steps:
            self.checkpoint()

    def checkpoint(self) -> None:
        keep = self.config.trainer.keep_checkpoints
        with self.watch.phase("checkpoint"), self.run.checkpoint(self.state, keep) as folder:
            self.learner.save(folder / "learner")

    def restore(self) -> None:
        """Continue from the newest checkpoint of a resumed run: learner, engines, cursor."""
        if self.config.trainer.resume is None:
            return
        checkpoint = self.run.newest_checkpoint()
        assert checkpoint is not None, "RunFolder.of checked it"
        self.learner.load(checkpoint / "learner")
        self.state = read_state(checkpoint)
        self.learner.publish(version=self.state.step)
        self.console.print(f"resumed {self.run.path} after step {self.state.step}")

    def finish(self, pass_at_1_after: float) -> None:
        self.state.add(**{f"seconds/{phase}": s for phase, s in self.watch.lap().items()})
        summary = summarize(self.config, self.state, pass_at_1_after)
        self.run.write_summary(summary)
        show_summary(self.console, summary, self.run.path)

    def status(self, title: str) -> AbstractContextManager[Any]:
        """A spinner on a terminal, for a phase that cannot say how far it is."""
        shown = self.config.logging.progress and self.console.is_terminal
        return self.console.status(title) if shown else nullcontext()

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Any]:
        with progress_bar(self.console, title, total, self.config.logging.progress) as advance:
            yield advance


class Interrupts:
    """Ctrl-C and SIGTERM as KeyboardInterrupt, at once or at the end of a `deferred` region."""

    def __init__(self) -> None:
        self._pending = False
        self._deferring = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._deferring:
            raise KeyboardInterrupt
        self._pending = True

    @contextmanager
    def deferred(self) -> Iterator[None]:
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        if self._pending:
            raise KeyboardInterrupt
