"""The model that RL starts from: built or named, then trained on demonstrations, then cached.

Invariant: a cached folder is complete (it is renamed into place last) and its name is a digest of
everything that determines it, so that a changed setting never meets an old model.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from elpo_ray.cluster import Cluster, LearnerGroup
from elpo_ray.config import Config
from elpo_ray.forest import TrainForest, TrainTree, demonstrations
from elpo_ray.interfaces import Task
from elpo_ray.metrics import progress_bar
from elpo_ray.model_folder import local_folder
from elpo_ray.types import Message

TOKENIZER_TEXTS = 2000
"""Demonstrations that the tiny tokenizer is trained on."""
LAYOUT = 1
"""Raised when code changes what a demonstration or a tiny model is: older folders are not met."""
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
    batches = lessons(config, task, base)
    learner = cluster.learner(base, len(batches))
    learner.reset_optimizer(config.cold_start.optimizer, len(batches), base)
    started = time.perf_counter()
    with progress_bar(console, "cold start", len(batches), config.logging.progress) as advance:
        for done in range(0, len(batches), BATCHES_PER_CALL):
            part = batches[done : done + BATCHES_PER_CALL]
            stats = learner.update(TrainForest(minibatches=part), supervised=True)
            advance(done + len(part))
    commit(folder, learner.export)
    learner.reset_optimizer(config.learner.optimizer, config.optimizer_steps, folder)
    console.print(
        f"cold start: {len(batches)} optimizer steps in {time.perf_counter() - started:.0f} s, "
        f"loss {stats['loss']:.3f} nats a token; kept in {folder}",
        highlight=False,
    )
    return Start(folder, learner)


def base_model(config: Config, task: Task) -> Path:
    """`model.path`, or the tiny model and tokenizer built for the task."""
    if config.model.path is not None:
        return Path(config.model.path)
    folder = Path(config.cold_start.cache) / f"tiny-{digest(_base_key(config))}"
    if not folder.exists():
        from elpo_ray.tiny import build_tiny  # torch and transformers take seconds to import

        texts = list(islice(_conversations(task), TOKENIZER_TEXTS))
        shape, context = config.model.tiny, config.model.max_context
        seed = config.trainer.seed
        commit(
            folder,
            lambda path: build_tiny(path, shape, texts, task.tools, max_context=context, seed=seed),
        )
    return folder


def commit(folder: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a partial folder, then give it its final name."""
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    partial.rename(folder)


def digest(key: dict[str, Any]) -> str:
    """A short, stable name for a JSON-able description."""
    text = json.dumps(
        key, sort_keys=True, default=lambda value: getattr(value, "value", str(value))
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _base_key(config: Config) -> dict[str, Any]:
    return {
        "layout": LAYOUT,
        "tiny": asdict(config.model.tiny),
        "max_context": config.model.max_context,
        "task": asdict(config.task.countdown),
        "seed": config.trainer.seed,
    }


def _cold_start_key(config: Config) -> dict[str, Any]:
    settings = asdict(config.cold_start)
    del settings["cache"], settings["enabled"]
    adapters = config.learner.adapters
    return ({} if adapters is None else {"adapters": asdict(adapters)}) | {
        "base": config.model.path or _base_key(config),
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


def lessons(config: Config, task: Task, base: Path) -> list[list[TrainTree]]:
    """The demonstrations of every epoch, shuffled, as one mini-batch an optimizer step; targets are
    the assistant's tokens. ValueError if the task has none that fits."""
    from elpo_ray.chat import Chat  # transformers takes seconds to import

    settings = config.cold_start
    chat = Chat.from_folder(str(local_folder(base)), task.tools)
    encoded = [chat.conversation_ids(messages) for messages in _conversations(task)]
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


def _conversations(task: Task) -> Iterator[list[Message]]:
    index = 0
    while (conversation := task.demonstration(index)) is not None:
        yield conversation
        index += 1
