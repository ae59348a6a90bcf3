"""The cold start: supervised training on demonstrations, before RL or as a run of its own.

Before RL its model is cached. Invariants: a cached folder is complete (it is renamed into place
last) and its name is a digest of everything that determines it, so that a changed setting never
meets an old model.

A run of its own (`python -m elpo_ray.sft`) has metrics, checkpoints and a model folder. Invariants:
the order of the demonstrations follows from the seed, so a resumed run goes on with the ones it had
not seen; `model/` appears only when whole.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from elpo_ray.cluster.cluster import Cluster
from elpo_ray.cluster.learner import LearnerGroup
from elpo_ray.config import Config
from elpo_ray.forest.trees import TrainForest, TrainTree, demonstrations
from elpo_ray.interfaces import Task
from elpo_ray.learner.saved import starting_folder
from elpo_ray.models.base import (
    SOURCE,
    code_version,
    conversations,
    demonstrations_key,
    digest,
)
from elpo_ray.models.folder import fingerprint, local_folder, texts_fingerprint
from elpo_ray.runs.atomic import new_folder
from elpo_ray.runs.folder import RunFolder
from elpo_ray.runs.metrics import SUPERVISED_COLUMNS, Metrics
from elpo_ray.runs.progress import announce, progress_bar, waiting
from elpo_ray.tasks import make_task
from elpo_ray.tools.catalog import schemas
from elpo_ray.training.checks import (
    check_model,
    check_rows,
    demonstration_room,
    no_demonstration,
)
from elpo_ray.training.loop import Outcome, RunLoop, begin, nothing_left

STEPS_PER_CALL = 10
"""Most optimizer steps between two movements of the progress bar or two rows of metrics."""


@dataclass(frozen=True)
class StartingModel:
    """Where RL begins."""

    folder: Path
    """A Hugging Face folder (or hub name) that engines and learner load."""
    learner: LearnerGroup | None
    """The learner that made it, its optimizer fresh; None when it came from the cache."""


def starting_model(
    config: Config, task: Task, base: Path, cluster: Cluster, console: Console
) -> StartingModel:
    """`base`, after a cold start on demonstrations if the configuration asks for one.

    A resumed run needs none: its checkpoint brings the weights.
    """
    if not config.cold_start.enabled or config.trainer.resume is not None:
        return StartingModel(base, None)
    folder = _cached(config, task, base)
    if folder.exists():
        console.print(f"cold start: cached in {folder}", highlight=False)
        return StartingModel(folder, None)
    with waiting(console, "cold start: reading the demonstrations"):
        batches = sft_batches(config, task, base)
    with waiting(console, "cold start: starting the learner"):
        learner = _sft_learner(config, cluster, base, len(batches))
    started = time.perf_counter()
    announce(console, "cold start")
    with progress_bar(console, "cold start", len(batches), config.logging.progress) as advance:
        for done in range(0, len(batches), STEPS_PER_CALL):
            part = batches[done : done + STEPS_PER_CALL]
            stats = learner.update(TrainForest(minibatches=part), supervised=True)
            advance(done + len(part))
    with new_folder(folder) as partial:
        learner.export(partial)
    learner.reset_optimizer(config.learner.optimizer, config.optimizer_steps, folder)
    console.print(
        f"cold start: {len(batches)} optimizer steps in {time.perf_counter() - started:.0f} s, "
        f"loss {stats['loss']:.3f} nats a token; kept in {folder}",
        highlight=False,
    )
    return StartingModel(folder, learner)


def _cached(config: Config, task: Task, base: Path) -> Path:
    """Where the model of a cold start before RL is kept."""
    key = digest(_cold_start_key(config, task, base))
    return Path(config.cold_start.cache) / f"cold-start-{key}"


def check_demonstrations(config: Config, task: Task, base: Path) -> None:
    """Raise ValueError if the run has to begin with a cold start and no demonstration fits."""
    if not config.cold_start.enabled or config.trainer.resume is not None:
        return
    if not _cached(config, task, base).exists():
        _check_first(config, task, base)


def _check_first(config: Config, task: Task, base: Path) -> None:
    if next(_examples(config, task, base), None) is None:
        raise no_demonstration(config)


def _sft_learner(config: Config, cluster: Cluster, base: Path, steps: int) -> LearnerGroup:
    learner = cluster.learner(base, steps)
    learner.reset_optimizer(config.cold_start.optimizer, steps, base)
    return learner


def _cold_start_key(config: Config, task: Task, base: Path) -> dict[str, Any]:
    """Everything that determines the model of a cold start."""
    settings = asdict(config.cold_start)
    del settings["cache"], settings["enabled"]
    adapters = config.learner.adapters
    return ({} if adapters is None else {"adapters": asdict(adapters)}) | {
        "base": _base_contents(base),
        "code": code_version((*SOURCE, "learner", "forest", "training/cold_start.py")),
        "context": config.model.max_context,
        "demonstrations": demonstrations_key(config, task),
        "tools": schemas(config.task, config.sandbox),
        "cold_start": settings,
        "template_options": config.model.template_options,
        "tool_parser": config.model.tool_parser,
        "precision": config.model.precision,
        "seed": config.trainer.seed,
    }


def _base_contents(base: Path) -> list[str]:
    """Weights, tokenizer and chat template that a cold start begins with. The weights of a hub
    name are those of its snapshot, which need not be here yet."""
    if base.is_dir():
        return [fingerprint(base), texts_fingerprint(base)]
    snapshot = local_folder(base, weights=False)
    return [str(base), snapshot.name, texts_fingerprint(snapshot)]


def _examples(
    config: Config, task: Task, base: Path
) -> Iterator[tuple[Sequence[int], Sequence[bool]]]:
    """Token ids of each demonstration that fits, and which of them are the assistant's."""
    from elpo_ray.chat.template import Chat  # transformers takes seconds to import

    settings, room = config.cold_start, demonstration_room(config)
    folder = local_folder(base, weights=False)
    tools = schemas(config.task, config.sandbox)
    chat = Chat.from_folder(str(folder), tools, config.model)
    for messages in conversations(task, tools):
        ids, agent = chat.conversation_ids(messages)
        if settings.cut_longer:
            ids, agent = ids[:room], agent[:room]
        if len(ids) <= room and any(agent):
            yield ids, agent


def sft_batches(config: Config, task: Task, base: Path) -> list[list[TrainTree]]:
    """The demonstrations of every epoch, shuffled, as one mini-batch an optimizer step; targets are
    the assistant's tokens. ValueError if the task has none that fits."""
    settings = config.cold_start
    encoded = list(_examples(config, task, base))
    if not encoded:
        raise no_demonstration(config)
    rng = random.Random(config.trainer.seed)
    batches: list[list[TrainTree]] = []
    for _ in range(settings.epochs):
        rng.shuffle(encoded)
        batches += demonstrations(encoded, settings.batch_size).minibatches
    return batches


def rehearse(config: Config) -> None:
    """Everything that `train_supervised` looks at before its first actor. Raises ValueError."""
    task = make_task(config.task, config.trainer.seed)
    check_rows(config, task, supervised=True)
    base = starting_folder(config, task)
    _check_first(config, task, base)
    check_model(config, base)
    if config.cluster.address is not None:
        with Cluster(config, engines=False):
            return  # it is there, with the GPUs that are asked for


def train_supervised(config: Config) -> Outcome:
    """A whole cold start as a run: from `model.path`, or the tiny model, to runs/NAME/model."""
    console = Console()
    config = _named(config)
    run = RunFolder.of(config)
    task = make_task(config.task, config.trainer.seed)
    with waiting(console, "reading the model and the demonstrations"):
        check_rows(config, task, supervised=True)
        base = starting_folder(config, task)
        batches = sft_batches(config, task, base)
    more = "cold_start.epochs=MORE trainer.fork=NEW_NAME"
    if nothing_left(run, config, len(batches), console, more):
        return Outcome(run.path, interrupted=False)
    notice = check_model(config, base)
    if notice is not None:
        console.print(notice, highlight=False, soft_wrap=True)
    with waiting(console, "starting Ray"):
        cluster = Cluster(config, engines=False)
    with cluster, closing(run):
        console.print(cluster.watched, highlight=False, soft_wrap=True)
        begin(run, config, console)
        run.keep_base(local_folder(base))
        with waiting(console, "starting the learner"):
            learner = _sft_learner(config, cluster, base, len(batches))
        with closing(Metrics(run.path, config, console, SUPERVISED_COLUMNS)) as metrics:
            return SupervisedTrainer(
                config=config,
                steps=len(batches),
                batches=batches,
                learner=learner,
                run=run,
                metrics=metrics,
                console=console,
            ).train()


def _named(config: Config) -> Config:
    """Name a new run's folder after the cold start."""
    if config.trainer.run_name is not None or config.trainer.resume is not None:
        return config
    name = f"{config.experiment}-sft-{time.strftime('%Y%m%d-%H%M%S')}"
    return replace(config, trainer=replace(config.trainer, run_name=name))


@dataclass(kw_only=True)
class SupervisedTrainer(RunLoop):
    """One run's loop over its batches."""

    unit: ClassVar[str] = "optimizer step"

    batches: list[list[TrainTree]]
    """One for each step."""

    def take_steps(self) -> None:
        """Take the steps that are left, a row of metrics at a time."""
        while self.state.step < self.steps:
            with self.signals.deferred():
                self.row()

    def row(self) -> None:
        """Take the optimizer steps up to the next row of metrics or checkpoint."""
        every, step = self.config.trainer.checkpoint_every, self.state.step
        end = min(step + STEPS_PER_CALL, self.steps)
        if every:
            end = min(end, (step // every + 1) * every)
        self.finish_checkpoint()
        forest = TrainForest(minibatches=self.batches[step:end])
        values: dict[str, Any] = dict(self.learner.update(forest, supervised=True))
        values["tokens_per_second"] = values["forward_tokens"] / max(
            values["learner_seconds"], 1e-9
        )
        self.state.step = self.state.cursor = end
        self.metrics.log(end, values)
        self.checkpoint_if_due()

    def finish(self) -> None:
        """Export the model, and say what was done."""
        folder = self.run.path / "model"
        if not folder.exists():
            with new_folder(folder) as partial:
                self.learner.export(partial)
        seconds = sum(self.watch.lap().values())
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
