"""The model that everything starts from: the one that the user names, or a tiny one built here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import count, islice
from pathlib import Path
from typing import Any

from elpo_ray.config import Config
from elpo_ray.config.dotted import is_path
from elpo_ray.config.task import TaskName
from elpo_ray.interfaces import Task
from elpo_ray.runs.atomic import new_folder
from elpo_ray.tasks.demonstrations import check_calls
from elpo_ray.tools.catalog import schemas
from elpo_ray.tools.sources import Schema
from elpo_ray.types import Message

TOKENIZER_TEXTS = 2000
"""Demonstrations that the tiny tokenizer is trained on."""
LAYOUT = 1
"""It is raised when code changes what a demonstration or a tiny model is, so that folders of older
code are not used."""


def base_model(config: Config, task: Task) -> Path:
    """`model.path`, or the folder of the tiny model, which is built for the task where need be."""
    if config.model.path is not None:
        return Path(config.model.path)
    folder = Path(config.cold_start.cache) / f"tiny-{digest(base_key(config, task))}"
    if not folder.exists():
        from elpo_ray.models.tiny import build_tiny  # torch takes seconds to import

        tools = schemas(config.task, config.sandbox)
        texts = list(islice(conversations(task, tools), TOKENIZER_TEXTS))
        if not texts:
            raise ValueError(
                f"model.path=None: a tiny model is built from demonstrations, and task "
                f"{config.task.name} has none; name some with task.demonstrations_file, or a model"
            )
        shape, context = config.model.tiny, config.model.max_context
        seed = config.trainer.seed
        with new_folder(folder) as path:
            build_tiny(path, shape, texts, tools, max_context=context, seed=seed)
    return folder


def digest(key: dict[str, Any]) -> str:
    """A short, stable name for a JSON-able description."""
    text = json.dumps(
        key, sort_keys=True, default=lambda value: getattr(value, "value", str(value))
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def base_key(config: Config, task: Task) -> dict[str, Any]:
    """Everything that determines the tiny model."""
    return {
        "layout": LAYOUT,
        "tiny": asdict(config.model.tiny),
        "max_context": config.model.max_context,
        "demonstrations": demonstrations_key(config, task),
        "tools": schemas(config.task, config.sandbox),
        "seed": config.trainer.seed,
    }


def demonstrations_key(config: Config, task: Task) -> Any:
    """What determines the demonstrations: the settings of a task that makes or knows them, else
    they themselves, whatever the file is called."""
    settings = config.task
    if settings.name == TaskName.countdown:
        return asdict(settings.countdown)
    if settings.name == TaskName.reasoning_gym:
        return [settings.name, settings.dataset, settings.options]
    if settings.demonstrations_file is None and not is_path(settings.name):
        return [settings.name, settings.data_dir]
    return digest({"all": list(conversations(task, schemas(settings, config.sandbox)))})


def conversations(task: Task, tools: Sequence[Schema]) -> Iterator[list[Message]]:
    """The task's demonstrations. Raises ValueError for a call that is none of `tools`."""
    for index in count():
        conversation = task.demonstration(index)
        if conversation is None:
            return
        try:
            check_calls(conversation, tools)
        except ValueError as fault:
            raise ValueError(f"demonstration {index + 1}: {fault} (task.tools)") from None
        yield conversation
