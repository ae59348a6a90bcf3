"""The loop: inputs -> trees -> credit -> forest -> update -> publish -> report.

Invariants: the weights' version is the number of finished steps; inputs are handed out in the order
of the training stream and the checkpoint keeps how many were trained on, so a resumed run meets the
same ones, whatever had been grown ahead; Ctrl-C never cuts an update in two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from elpo_ray.checks import check_prompts
from elpo_ray.cluster import Cluster, Gauges, LearnerGroup, LearnerLost, RolloutGroup
from elpo_ray.cold_start import base_model, starting_model
from elpo_ray.collector import relax
from elpo_ray.config import Config
from elpo_ray.credit import assign
from elpo_ray.dispatch import SetAside
from elpo_ray.evaluation.summary import mean_success
from elpo_ray.forest import TrainForest, pack
from elpo_ray.growth.dynamic import Batch, Grown, collect
from elpo_ray.interfaces import Task
from elpo_ray.interrupts import Interrupts
from elpo_ray.metrics import (
    Metrics,
    Stopwatch,
    announce,
    comparison_axes,
    progress_bar,
    rollout_metrics,
    tree_metrics,
    waiting,
)
from elpo_ray.model_folder import local_folder
from elpo_ray.report import show_summary, summarize
from elpo_ray.rollout import localization_accuracy
from elpo_ray.runs import Fault, RunFolder, RunState, read_state
from elpo_ray.schedule import Schedule
from elpo_ray.tasks import make_task
from elpo_ray.trackers import Values
from elpo_ray.tree import RolloutTree

MAX_LOSSES = 8
"""Losses of the learner, without a further step between them, that end a run."""


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
    with watch.phase("start"), waiting(console, "starting Ray"), ThreadPoolExecutor(1) as beside:
        # Its imports take as long as Ray; if it fails, Ray goes again.
        checked = beside.submit(_checked_base, config, task)
        cluster = Cluster(config)
    with cluster:
        base = checked.result()
        run.begin(config)
        with watch.phase("cold_start"):
            start = starting_model(config, task, base, cluster, console)
        with watch.phase("start"):
            learner, rollouts = cluster.both(
                start.folder, config.optimizer_steps, start.learner, partial(waiting, console)
            )
            run.keep_tokenizer(local_folder(start.folder))
            learner.connect(rollouts)
            relax()
        metrics = Metrics(run.path, config, console)
        try:
            return Trainer(
                config=config,
                task=task,
                learner=learner,
                new_learner=lambda: cluster.learner(start.folder, config.optimizer_steps),
                rollouts=rollouts,
                run=run,
                metrics=metrics,
                console=console,
                watch=watch,
            ).train()
        finally:
            metrics.close()


def _checked_base(config: Config, task: Task) -> Path:
    """The folder of the model, once the task's prompts fit it. ValueError if they do not."""
    base = base_model(config, task)
    check_prompts(config, task, base)
    return base


@dataclass(kw_only=True)
class Trainer:
    """One run's loop over its actors."""

    config: Config
    task: Task
    learner: LearnerGroup
    new_learner: Callable[[], LearnerGroup]
    """Starts another one with the weights that the run began with, the lost one gone."""
    rollouts: RolloutGroup
    run: RunFolder
    metrics: Metrics
    console: Console
    watch: Stopwatch
    state: RunState = field(default_factory=RunState)

    def __post_init__(self) -> None:
        self.gauges, self.schedule = Gauges(), self.new_schedule()
        self.lost_at, self.losses = -1, 0
        """Most finished steps when a learner was lost, and losses since then."""
        self.unfinished: ExitStack | None = None
        """Commits the checkpoint that is being written."""

    def new_schedule(self) -> Schedule:
        staleness, steps = self.config.schedule.staleness, self.config.trainer.steps
        return Schedule(self.grow, staleness=staleness, steps=steps)

    def train(self) -> Outcome:
        """Evaluate, take the steps, evaluate; on Ctrl-C write a checkpoint and stop."""
        if self.config.trainer.resume is not None:
            self.restore()
        signals = Interrupts()
        try:
            with signals:
                if self.state.pass_at_1_before is None:
                    announce(self.console, "evaluating")
                    self.state.pass_at_1_before = self.evaluate()
                    self.tell_pass_at_1(self.state.pass_at_1_before)
                while self.state.step < self.config.trainer.steps:
                    try:
                        self.step(signals)
                    except LearnerLost as lost:
                        self.start_over(lost)
                after = self.evaluate()
                with signals.deferred():
                    self.finish_checkpoint()
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
            batch = self.next_batch()
        with signals.deferred():
            with self.watch.phase("credit"):
                forest = TrainForest(minibatches=[])
                if batch.trained:
                    credits = assign(batch.trained, algorithm)
                    forest = pack(batch.trained, credits, self.config.loss, self.config.learner)
            self.finish_checkpoint()
            with self.learner.moving():
                with self.watch.phase("update"), self.bar(f"step {step + 1}: updating") as advance:
                    stats = self.learner.update(forest, advance=advance)
                with self.watch.phase("sync"):
                    self.learner.publish(version=step + 1)
            self.state.step, self.state.cursor = step + 1, self.state.cursor + batch.taken
            seconds = self.watch.lap()
            with self.watch.phase("report"):
                self.report(batch, stats, seconds)
            self.checkpoint_if_due()
        self.evaluate_if_due()

    def next_batch(self) -> Batch:
        """This step's batch, grown now or ahead (`schedule`)."""
        step = self.state.step
        total = self.config.trainer.inputs_per_step * self.config.algorithm.growth.n_total
        with self.bar(f"step {step + 1}: growing trees", total) as advance:
            return self.schedule.batch(
                step,
                self.state.cursor,
                lambda: advance(self.rollouts.completed, note=self.rollouts.describe()),
            )

    def grow(self, step: int, cursor: int) -> Batch:
        """The inputs of `step`, from the `cursor`-th one of the training stream on, and their
        trees. Inputs that the rollout workers gave up leave a record and are passed over."""

        def some(first: int, count: int) -> list[Grown]:
            stream = range(cursor + first, cursor + first + count)
            inputs = [self.task.train_problem(i) for i in stream]
            results = self.rollouts.grow(inputs, step)
            self.run.set_aside(step + 1, [tree for tree in results if isinstance(tree, SetAside)])
            pairs = zip(inputs, results, strict=True)
            return [(problem, tree) for problem, tree in pairs if isinstance(tree, RolloutTree)]

        growth = self.config.algorithm.growth
        batch = collect(some, self.config.trainer.inputs_per_step, growth.dynamic)
        if not batch.grown:
            raise Fault(
                f"step {step + 1}: all inputs were set aside, see {self.run.path}/set_aside"
            )
        return batch

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

    def report(self, batch: Batch, stats: Values, seconds: Values) -> None:
        """Dump the trees, log one object of numbers, add to the run's totals. Everything grown
        counts, also what was not trained on. What this takes is in the next step's `seconds`."""
        right, judged = localization_accuracy(self.task, batch.inputs, batch.trees)
        growth = self.config.algorithm.growth
        values = tree_metrics(batch.trees, growth.bel) | self.rollouts.metrics()
        values |= rollout_metrics(batch.trees, growth.n_total, self.state.step - 1)
        values |= {"inputs_grown": len(batch.grown), "inputs_trained": len(batch.trained)}
        values |= stats | {f"seconds/{phase}": value for phase, value in seconds.items()}
        values["tokens_per_second"] = values["tokens_generated"] / max(batch.seconds, 1e-9)
        values |= {"weight_version": self.state.step, "seconds_growing": batch.seconds}
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
        self.gauges.set(values)
        self.metrics.show(self.state.step, batch.trees)

    def checkpoint_if_due(self) -> None:
        every, step = self.config.trainer.checkpoint_every, self.state.step
        if (every and step % every == 0) or step == self.config.trainer.steps:
            self.checkpoint(background=self.config.trainer.background_checkpoints)

    def checkpoint(self, *, background: bool = False) -> None:
        """`background`: complete after `finish_checkpoint` only."""
        self.finish_checkpoint()
        keep, state = self.config.trainer.keep_checkpoints, deepcopy(self.state)
        with self.watch.phase("checkpoint"), ExitStack() as stack:
            folder = stack.enter_context(self.run.checkpoint(state, keep))
            self.learner.save(folder / "learner", background=background)
            if background:
                self.unfinished = stack.pop_all()

    def finish_checkpoint(self) -> None:
        """Wait for what is still being written. CheckpointError if it could not be."""
        unfinished, self.unfinished = self.unfinished, None
        if unfinished is not None:
            with self.watch.phase("checkpoint"), unfinished:
                self.learner.finish_save()

    def restore(self) -> None:
        """Continue from the newest checkpoint: learner, engines, cursor."""
        checkpoint = self.run.newest_checkpoint()
        assert checkpoint is not None, "whoever calls this knows that there is one"
        self.state = read_state(checkpoint)
        with self.learner.moving():
            self.learner.load(checkpoint / "learner")
            self.learner.publish(version=self.state.step)
        self.console.print(f"resumed {self.run.path} after step {self.state.step}")

    def start_over(self, lost: LearnerLost) -> None:
        """A new learner goes on from the newest checkpoint; the steps after it are made again.
        Raises Fault if there is none, or if learners keep dying without a further step."""
        step, kept = self.state.step, self.run.newest_checkpoint()
        self.losses = self.losses + 1 if step <= self.lost_at else 1
        if kept is None or self.losses >= MAX_LOSSES:
            hint = f"continue with trainer.resume={self.run.path}" if kept else "start the run anew"
            raise Fault(f"step {step + 1}: {lost}; {hint}") from lost
        self.lost_at, self.unfinished = max(step, self.lost_at), None
        self.console.print(f"step {step + 1}: {lost}; a new learner goes on", highlight=False)
        self.rollouts.abandon()
        self.schedule = self.new_schedule()
        self.run.rewind(read_state(kept).step)
        try:
            self.learner = self.new_learner()
            with self.learner.moving():
                self.learner.connect(self.rollouts)
                self.restore()
        except LearnerLost as again:
            self.start_over(again)

    def finish(self, pass_at_1_after: float) -> None:
        self.state.add(**{f"seconds/{phase}": s for phase, s in self.watch.lap().items()})
        summary = summarize(self.config, self.state, pass_at_1_after)
        self.run.write_summary(summary)
        show_summary(self.console, summary, self.run.path)

    @contextmanager
    def bar(self, title: str, total: int | None = None) -> Iterator[Any]:
        with progress_bar(self.console, title, total, self.config.logging.progress) as advance:
            yield advance
