"""The model that RL starts from: built or named, then trained on demonstrations, then cached.

Invariant: a cached folder is complete (it is renamed into place last) and its name is a digest of
everything that determines it, so that a changed setting never meets an old model.
"""

from __future__ import annotations

import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from elpo_ray.chat.template import Chat
from elpo_ray.cluster import Cluster, LearnerGroup
from elpo_ray.config import Config
from elpo_ray.forest import TrainForest, TrainTree, demonstrations
from elpo_ray.interfaces import Task
from elpo_ray.models.base import base_key, conversations, digest
from elpo_ray.models.folder import local_folder
from elpo_ray.runs.atomic import new_folder
from elpo_ray.runs.metrics import progress_bar

BATCHES_PER_CALL = 10
"""Optimizer steps between two movements of the progress bar."""


@dataclass(frozen=True)
class Start:
    """Where RL begins."""

    folder: Path
    """A Hugging Face folder (or hub name) that engines and learner load."""
    learner: LearnerGroup | None
    """The learner that made it, its optimizer fresh; None when it came from the cache."""


def starting_model(
    config: Config, task: Task, base: Path, cluster: Cluster, console: Console
) -> Start:
    """`base`, after a cold start on demonstrations if the configuration asks for one.

    A resumed run needs none: its checkpoint brings the weights.
    """
    if not config.cold_start.enabled or config.trainer.resume is not None:
        return Start(base, None)
    folder = Path(config.cold_start.cache) / f"cold-start-{digest(_cold_start_key(config))}"
    if folder.exists():
        console.print(f"cold start: cached in {folder}", highlight=False)
        return Start(folder, None)
    batches = sft_batches(config, task, base)
    learner = cluster.learner(base, len(batches))
    learner.reset_optimizer(config.cold_start.optimizer, len(batches), base)
    started = time.perf_counter()
    with progress_bar(console, "cold start", len(batches), config.logging.progress) as advance:
        for done in range(0, len(batches), BATCHES_PER_CALL):
            part = batches[done : done + BATCHES_PER_CALL]
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
    return Start(folder, learner)


def _cold_start_key(config: Config) -> dict[str, Any]:
    settings = asdict(config.cold_start)
    del settings["cache"], settings["enabled"]
    adapters = config.learner.adapters
    return ({} if adapters is None else {"adapters": asdict(adapters)}) | {
        "base": config.model.path or base_key(config),
        "task": [
            config.task.name,
            config.task.demonstrations_file,
            config.task.data_dir,
            asdict(config.task.countdown),
        ],
        "cold_start": settings,
        "precision": config.model.precision,
        "seed": config.trainer.seed,
    }


def sft_batches(config: Config, task: Task, base: Path) -> list[list[TrainTree]]:
    """The demonstrations of every epoch, shuffled, as one mini-batch an optimizer step; targets are
    the assistant's tokens. ValueError if the task has none that fits."""
    settings = config.cold_start
    chat = Chat.from_folder(str(local_folder(base)), task.tools)
    encoded = [chat.conversation_ids(messages) for messages in conversations(task)]
    room = settings.max_tokens or config.model.max_context
    if settings.cut_longer:
        encoded = [(ids[:room], agent[:room]) for ids, agent in encoded]
    encoded = [(ids, agent) for ids, agent in encoded if len(ids) <= room and any(agent)]
    if not encoded:
        raise ValueError(
            f"task.name={config.task.name.value}: it has no demonstration within "
            f"cold_start.max_tokens={room}; name some with task.demonstrations_file, raise the "
            "limit or leave the cold start out"
        )
    rng = random.Random(config.trainer.seed)
    batches: list[list[TrainTree]] = []
    for _ in range(settings.epochs):
        rng.shuffle(encoded)
        batches += demonstrations(encoded, settings.batch_size).minibatches
    return batches
