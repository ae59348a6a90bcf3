"""The model that everything starts from: the one that the user names, or a tiny one built here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from elpo_ray.config import Config
from elpo_ray.interfaces import Task
from elpo_ray.runs.atomic import new_folder
from elpo_ray.tools.catalog import schemas
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
    folder = Path(config.cold_start.cache) / f"tiny-{digest(base_key(config))}"
    if not folder.exists():
        from elpo_ray.models.tiny import build_tiny  # torch takes seconds to import

        texts = list(islice(conversations(task), TOKENIZER_TEXTS))
        tools = schemas(config.task, config.sandbox)
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


def base_key(config: Config) -> dict[str, Any]:
    return {
        "layout": LAYOUT,
        "tiny": asdict(config.model.tiny),
        "max_context": config.model.max_context,
        "task": asdict(config.task.countdown),
        "tools": schemas(config.task, config.sandbox),
        "seed": config.trainer.seed,
    }


def conversations(task: Task) -> Iterator[list[Message]]:
    index = 0
    while (conversation := task.demonstration(index)) is not None:
        yield conversation
        index += 1
