"""The model that everything starts from: the one that the user names, or a tiny one built here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import count, islice
from pathlib import Path
from typing import Any

from elpo_ray.config import Config
from elpo_ray.config.task import TaskName
from elpo_ray.interfaces import Task
from elpo_ray.runs.atomic import new_folder
from elpo_ray.tasks.demonstrations import check_calls
from elpo_ray.tools.catalog import schemas
from elpo_ray.tools.sources import Schema
from elpo_ray.types import Message

TOKENIZER_TEXTS = 2000
"""Demonstrations that the tiny tokenizer is trained on."""
PACKAGE = Path(__file__).resolve().parents[1]
SOURCE = ("models", "chat", "tasks/countdown.py", "tasks/demonstrations.py")
"""The code, in this package, that says what a demonstration and a tiny model are."""
LIBRARIES = ("transformers", "tokenizers", "torch")
"""Packages that have a say in it too."""


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


def code_version(source: Sequence[str], root: Path = PACKAGE) -> dict[str, str]:
    """A digest of the files and folders `source` below `root`, and the versions of `LIBRARIES`."""
    content = hashlib.sha256()
    for name in source:
        place = root / name
        for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if file.is_file() and file.suffix != ".pyc":
                text = file.read_bytes()
                content.update(f"{file.relative_to(root).as_posix()} {len(text)}\n".encode() + text)
    return {"source": content.hexdigest()[:16]} | {name: version(name) for name in LIBRARIES}


def base_key(config: Config, task: Task) -> dict[str, Any]:
    """Everything that determines the tiny model."""
    return {
        "code": code_version(SOURCE),
        "tiny": asdict(config.model.tiny),
        "max_context": config.model.max_context,
        "demonstrations": demonstrations_key(config, task),
        "tools": schemas(config.task, config.sandbox),
        "seed": config.trainer.seed,
    }


def demonstrations_key(config: Config, task: Task) -> Any:
    """What determines the demonstrations: the settings of Countdown, which makes them, else they
    themselves, wherever they lie."""
    settings = config.task
    if settings.name == TaskName.countdown:
        return asdict(settings.countdown)
    if settings.name == TaskName.reasoning_gym:
        return [settings.name, settings.dataset, settings.options]
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
