"""The loop: inputs -> trees -> credit -> forest -> update -> publish -> report.

Invariants: the weights' version is the number of finished steps; inputs are handed out in the order
of the training stream and the checkpoint keeps how many were trained on, so a resumed run meets the
same ones, whatever had been grown ahead; Ctrl-C never cuts an update in two.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from elpo_ray.cluster.cluster import Cluster
from elpo_ray.cluster.garbage import freeze_gc, importing
from elpo_ray.cluster.gauges import Gauges
from elpo_ray.cluster.learner import LearnerGroup
from elpo_ray.cluster.rollouts import RolloutGroup
from elpo_ray.cluster.waits import LearnerLost
from elpo_ray.config import Config
from elpo_ray.config.schedule import BudgetScope
from elpo_ray.credit import assign
from elpo_ray.evaluation.held_out import described, held_out_values, part_of
from elpo_ray.evaluation.oracle import localization_accuracy
from elpo_ray.evaluation.summary import mean_success
from elpo_ray.forest.trees import TrainForest, pack
from elpo_ray.interfaces import Task
from elpo_ray.learner.saved import starting_folder
from elpo_ray.models.folder import local_folder
from elpo_ray.runs.folder import RunFolder, read_state
from elpo_ray.runs.log import PASS_AT_1
from elpo_ray.runs.metrics import (
    Metrics,
    Stopwatch,
    comparison_axes,
    step_metrics,
)
from elpo_ray.runs.progress import announce, progress_bar, waiting
from elpo_ray.runs.summary import show_summary, summarize
from elpo_ray.scheduling.dynamic_sampling import Grown, StepBatch, collect
from elpo_ray.scheduling.jobs import SetAside
from elpo_ray.scheduling.pipeline import Pipeline
from elpo_ray.tasks import make_task
from elpo_ray.training.checks import check_model, check_prompts, check_rows
from elpo_ray.training.cold_start import check_demonstrations, starting_model
from elpo_ray.training.loop import Outcome, RunLoop, begin, nothing_left
from elpo_ray.tree import RolloutTree
from elpo_ray.types import Fault, Values

MAX_LOSSES = 8
"""Losses of the learner, without a further step between them, that end a run."""


def train(config: Config) -> Outcome:
    """A whole run, from the starting model to the summary."""
    console, watch = Console(), Stopwatch()
    run = RunFolder.of(config)
    if nothing_left(run, config, config.trainer.steps, console):
        return Outcome(run.path, interrupted=False)
    task = make_task(config.task, config.trainer.seed)
    with watch.phase("start"), waiting(console, "reading the problems"):
        check_rows(config, task)
    with watch.phase("start"), waiting(console, "starting Ray"), ThreadPoolExecutor(1) as beside:
        # Its imports take as long as Ray; if it fails, Ray goes again.
        checked = beside.submit(checked_base, config, task)
        cluster = Cluster(config)
    with cluster, closing(run):
        console.print(cluster.watched, highlight=False, soft_wrap=True)
        if not checked.done():
            with watch.phase("start"), waiting(console, "checking the model and the prompts"):
                wait([checked])
        base, notice = checked.result()
        if notice is not None:
            console.print(notice, highlight=False, soft_wrap=True)
        begin(run, config, console)
        with watch.phase("cold_start"):
            start = starting_model(config, task, base, cluster, console)
        with watch.phase("start"):
            learner, rollouts = cluster.both(
                start.folder, config.optimizer_steps, start.learner, partial(waiting, console)
            )
            run.keep_tokenizer(local_folder(start.folder))
            run.keep_base(local_folder(start.folder))
            learner.connect(rollouts)
            freeze_gc()
        with closing(Metrics(run.path, config, console)) as metrics:
            return Trainer(
                config=config,
                steps=config.trainer.steps,
                task=task,
                learner=learner,
                new_learner=lambda: cluster.learner(start.folder, config.optimizer_steps),
                rollouts=rollouts,
                run=run,
                metrics=metrics,
                console=console,
                watch=watch,
            ).train()


def rehearse(config: Config) -> None:
    """Everything that `train` looks at before its first actor, and no more. Raises ValueError."""
    task = make_task(config.task, config.trainer.seed)
    check_rows(config, task)
    checked_base(config, task)
    if config.cluster.address is not None:
        with Cluster(config):
            return  # it is there, with the GPUs that are asked for


def checked_base(config: Config, task: Task) -> tuple[Path, str | None]:
    """The folder of the model, once the task's rows are read, its prompts fit the model, it can be
    trained, and there are demonstrations for the cold start; and a line for the user if it is
    trained otherwise than asked for. ValueError if not."""
    base = starting_folder(config, task)
    with importing():
        check_prompts(config, task, base)
        check_demonstrations(config, task, base)
        return base, check_model(config, base)


@dataclass(kw_only=True)
class Trainer(RunLoop):
    """One run's loop over its actors."""

    task: Task
    new_learner: Callable[[], LearnerGroup]
    """Starts another one with the weights that the run began with, the lost one gone."""
    rollouts: RolloutGroup
    gauges: Gauges = field(default_factory=Gauges)
    pass_at_1_after: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.pipeline = self.new_pipeline()
        self.lost_at, self.losses = -1, 0
        """Most finished steps when a learner was lost, and losses since then."""

    def new_pipeline(self) -> Pipeline:
        return Pipeline(self.grow, staleness=self.config.schedule.staleness, steps=self.steps)

    def take_steps(self) -> None:
        """Evaluate, take the steps that are left, evaluate."""
        if self.state.pass_at_1_before is None:
            self.state.pass_at_1_before = self.evaluate()
        while self.state.step < self.steps:
            try:
                self.evaluate_if_due()
                self.step()
            except LearnerLost as lost:
                self.start_over(lost)
        self.pass_at_1_after = self.evaluate()

    def step(self) -> None:
        """One batch of inputs becomes one version of the weights."""
        step, algorithm = self.state.step, self.config.algorithm
        with self.watch.phase("grow"):
            batch = self.next_batch()
        with self.signals.deferred():
            with self.watch.phase("credit"):
                forest = TrainForest(minibatches=[])
                if batch.trained:
                    credits = assign(batch.trained, algorithm)
                    forest = pack(batch.trained, credits, self.config.loss, self.config.learner)
            self.finish_checkpoint()
            with self.learner.changing_weights():
                with self.watch.phase("update"), self.bar(f"step {step + 1}: updating") as advance:
                    stats = self.learner.update(forest, advance=advance)
                with self.watch.phase("sync"):
                    self.learner.publish(version=step + 1)
            self.state.step, self.state.cursor = step + 1, self.state.cursor + batch.taken
            seconds = self.watch.lap()
            with self.watch.phase("report"):
                self.report(batch, stats, seconds)
            self.checkpoint_if_due()

    def next_batch(self) -> StepBatch:
        """This step's batch, grown now or ahead (`pipeline`)."""
        step = self.state.step
        total = self.config.trainer.inputs_per_step * self.config.algorithm.growth.n_total
        with self.bar(f"step {step + 1}: growing trees", total) as advance:
            return self.pipeline.batch(
                step,
                self.state.cursor,
                lambda: advance(self.rollouts.completed, note=self.rollouts.describe()),
            )

    def grow(self, step: int, cursor: int) -> StepBatch:
        """The inputs of `step`, from the `cursor`-th one of the training stream on, and their
        trees. Inputs that the rollout workers gave up leave a record and are passed over."""

        growth = self.config.algorithm.growth
        fitted = self.state.fitted(growth, step, self.config.schedule.staleness)

        def grow_inputs(first: int, count: int) -> list[Grown]:
            stream = range(cursor + first, cursor + first + count)
            inputs = [self.task.train_problem(i) for i in stream]
            results = self.rollouts.grow(inputs, step, fitted)
            self.run.set_aside(step + 1, [tree for tree in results if isinstance(tree, SetAside)])
            pairs = zip(inputs, results, strict=True)
            return [(problem, tree) for problem, tree in pairs if isinstance(tree, RolloutTree)]

        batch = collect(grow_inputs, self.config.trainer.inputs_per_step, growth.dynamic)
        if not batch.grown:
            raise Fault(
                f"step {step + 1}: all inputs were set aside, see {self.run.path}/set_aside"
            )
        return batch

    def evaluate(self, part: int | None = None) -> float:
        """pass@1 on the held-out problems, or a part of them: `task.eval_samples` of each, at
        temperature 1, with seeds of their own. It is logged under the step's number."""
        problems = part_of(self.task.eval_problems(self.config.task.eval_problems), part)
        step, samples = self.state.step, self.config.task.eval_samples
        total = len(problems) * samples
        announce(self.console, "evaluating")
        with self.watch.phase("evaluate"), self.bar("evaluating", total) as advance:
            drawn = self.rollouts.evaluate(problems, samples, advance)
        values = held_out_values(problems, drawn)
        if values:
            self.metrics.log(step, values | comparison_axes(self.state.totals))
            self.gauges.set(values)
            text = f"step {step}: held-out pass@1 {described(values)}"
            self.console.print(text, highlight=False, soft_wrap=True)
        return mean_success(drawn)

    def evaluate_if_due(self) -> None:
        """Evaluate between two steps, unless it was done before an interruption."""
        every, step = self.config.trainer.eval_every, self.state.step
        if step and every and step % every == 0 and PASS_AT_1 not in self.metrics.last():
            self.evaluate(self.config.trainer.eval_part)

    def report(self, batch: StepBatch, stats: Values, seconds: Values) -> None:
        """Dump the trees, log one object of numbers, add to the run's totals. What this takes is in
        the next step's `seconds`."""
        right, judged = localization_accuracy(self.task, batch.inputs, batch.trees)
        growth, fixed = self.config.algorithm.growth, self.config.budget.scope is BudgetScope.input
        values = step_metrics(batch, growth, self.state.step, fixed=fixed)
        values |= self.rollouts.metrics() | stats | seconds
        if judged:
            values["localization_accuracy"] = right / judged
        self.state.fit(growth, batch.trees)
        self.state.add(
            rollouts=values["rollouts"],
            tokens_generated=values["tokens_generated"],
            localizations_right=right,
            localizations_judged=judged,
            **seconds,
        )
        values |= comparison_axes(self.state.totals)
        tokens = self.config.logging.dump_tokens
        self.run.write_trees(self.state.step, batch.trees, tokens=tokens)
        self.metrics.log(self.state.step, values)
        self.gauges.set(values)
        self.metrics.show(self.state.step, batch.trees)

    def restore(self) -> None:
        """Continue from the newest checkpoint: state, learner, engines."""
        with self.learner.changing_weights():
            super().restore()
            self.learner.publish(version=self.state.step)

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
        self.pipeline = self.new_pipeline()
        self.run.rewind(read_state(kept).step)
        try:
            self.learner = self.new_learner()
            with self.learner.changing_weights():
                self.learner.connect(self.rollouts)
                self.restore()
        except LearnerLost as again:
            self.start_over(again)

    def finish(self) -> None:
        """Write the summary and show it."""
        self.state.add(**self.watch.lap())
        summary = summarize(self.config, self.state, self.pass_at_1_after)
        self.run.write_summary(summary)
        show_summary(self.console, summary, self.run.path)

    def bar(self, title: str, total: int | None = None) -> AbstractContextManager[Any]:
        return progress_bar(self.console, title, total, self.config.logging.progress)
