"""The models that runs leave: a checkpoint as a Hugging Face folder, for another run or for others.

Nothing here starts a process. torch is imported where weights are read, as checks before a run must
not wait for it.
"""

from __future__ import annotations

import json
import os
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from safetensors import SafetensorError

from elpo_ray.chat.training_templates import training_template
from elpo_ray.config import Config
from elpo_ray.config.values import typed
from elpo_ray.interfaces import Task
from elpo_ray.models.base import base_model
from elpo_ray.models.folder import checkpoint_of, local_folder
from elpo_ray.runs.atomic import new_folder
from elpo_ray.runs.folder import RunFolder, read_state, run_of
from elpo_ray.tasks import make_task

CARD = "README.md"


class Adapter(Enum):
    """What becomes of the adapters of a run with `learner.lora`."""

    merged = "merged"
    """They are added to the weights."""
    only = "only"
    """They are written by themselves, for PEFT."""


def starting_folder(config: Config, task: Task) -> Path:
    """The model that everything starts from: a folder, a hub name or the tiny one, as `base_model`
    has it, or the newest weights of the run that `model.path` names. Raises ValueError if that run
    has none."""
    if config.model.path is not None:
        run = run_of(Path(config.model.path))
        if run is not None:
            return saved_model(run, Path(config.model.path), "model.path")
    return base_model(config, task)


def saved_config(run: RunFolder) -> Config:
    """The configuration that a run was started with."""
    return typed(Config, OmegaConf.load(run.path / "config.yaml"))


def saved_model(run: RunFolder, path: Path, key: str) -> Path:
    """The model folder of the checkpoint that `path` names, or of the run's newest, written beside
    the checkpoint where need be. A finished cold start (`elpo sft`) has its own. Raises ValueError,
    naming `key`, if there is none."""
    checkpoint = checkpoint_of(run, path, key)
    if checkpoint is None:
        return run.path / "model"
    folder = checkpoint / "model"
    if not folder.exists():
        with new_folder(folder) as partial:
            _convert(run, checkpoint, partial)
    return folder


def export_run(
    run: str | Path,
    folder: str | Path | None = None,
    step: int | None = None,
    adapter: Adapter | str = Adapter.merged,
) -> Path:
    """Write the weights of a run as a plain Hugging Face folder, which is returned.

    `run` is a run folder or a checkpoint in it, `step` one of its checkpoints (the newest if None),
    `folder` a new or empty folder (RUN/export if None). The weights have the precision in which
    they were trained. `adapter`: whether adapters are merged or written by themselves. Raises
    ValueError, in one line, if there is nothing to export or `folder` is in use.
    """
    source, wanted = _run(Path(run)), Adapter(adapter)
    checkpoint = _checkpoint(source, Path(run), step)
    target = source.path / "export" if folder is None else Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target}: exists and is not empty; name another folder")
    try:
        with new_folder(Path(os.path.abspath(target))) as partial:
            if wanted is Adapter.only:
                _write_adapter(source, checkpoint, partial)
            else:
                _convert(source, checkpoint, partial)
                _complete(partial)
                _keep_training_template(partial)
            card = model_card(source, checkpoint, wanted)
            (partial / CARD).write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{target}: could not be written ({reason}); nothing is left of it"
        ) from error
    return target


def _keep_training_template(folder: Path) -> None:
    """Give the export the chat template that the run trained with, where the model's own needed a
    change (`chat.training_templates`)."""
    alone, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if alone.is_file():
        alone.write_text(training_template(alone.read_text("utf-8")), "utf-8")
    elif settings.is_file():
        values = json.loads(settings.read_text("utf-8"))
        if isinstance(values.get("chat_template"), str):
            values["chat_template"] = training_template(values["chat_template"])
            settings.write_text(json.dumps(values, indent=2, ensure_ascii=False), "utf-8")


def _run(path: Path) -> RunFolder:
    run = run_of(path)
    if run is None:
        what = "not a run (no config.yaml with checkpoints in it)" if path.is_dir() else "no folder"
        raise ValueError(f"{path}: {what}; name one under runs/, or a checkpoint of one")
    return run


def _checkpoint(run: RunFolder, path: Path, step: int | None) -> Path:
    complete = {read_state(f.parent).step: f.parent for f in run.checkpoints.glob("*/state.json")}
    if path != run.path and step is None:
        if path not in complete.values():
            raise ValueError(f"{path}: no complete checkpoint; name one under {run.checkpoints}")
        return path
    if not complete:
        raise ValueError(f"{run.path}: it has no complete checkpoint yet; let it take a step")
    chosen = max(complete) if step is None else step
    if chosen not in complete:
        have = ", ".join(map(str, sorted(complete)))
        raise ValueError(
            f"step={step}: {run.path} has no checkpoint of it; choose one of {have} "
            "(trainer.checkpoint_every and trainer.keep_checkpoints say which are kept)"
        )
    return complete[chosen]


def _base(run: RunFolder) -> Path:
    """A folder with the files, weights aside, of the model that the run began with."""
    if (run.base / "config.json").is_file():
        return run.base
    saved = saved_config(run)  # of a version that kept none
    return local_folder(starting_folder(saved, make_task(saved.task, saved.trainer.seed)))


def _convert(run: RunFolder, checkpoint: Path, target: Path) -> None:
    from elpo_ray.learner.export import convert_checkpoint

    convert_checkpoint(checkpoint / "learner", _base(run), target)


def _write_adapter(run: RunFolder, checkpoint: Path, target: Path) -> None:
    from elpo_ray.learner.export import convert_adapter

    convert_adapter(checkpoint / "learner", _base(run), target)


def _complete(folder: Path) -> None:
    """Give the folder a generation config, which some models lack."""
    from transformers import AutoConfig, GenerationConfig

    if not (folder / "generation_config.json").is_file():
        generation = GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder))
        generation.save_pretrained(folder)


# --- the model card -------------------------------------------------------------------------------


def model_card(run: RunFolder, checkpoint: Path, adapter: Adapter = Adapter.merged) -> str:
    """What the model is and what it was trained on, as Markdown with the hub's header."""
    config = saved_config(run)
    step = read_state(checkpoint).step
    header = ["library_name: " + ("peft" if adapter is Adapter.only else "transformers")]
    if config.model.path and not Path(config.model.path).exists():
        header.append(f"base_model: {config.model.path}")
    header.append("pipeline_tag: text-generation")
    supervised = not any(run.trees.glob("step_*.jsonl"))
    how = "demonstrations" if supervised else "reinforcement learning on trees of its trajectories"
    tiny = f"a tiny {config.model.tiny.architecture.value} built for the task"
    rows = {
        "starting model": config.model.path or tiny,
        "task": _task(config),
        **(_demonstrated(config, step) if supervised else _reinforced(config, step)),
        "context": f"{config.model.max_context} tokens",
        "precision": config.model.precision.value,
        "seed": str(config.trainer.seed),
        **_adapters(config, adapter),
        **_results(run, step),
    }
    lines = [
        "---", *header, "---", "", f"# {run.path.resolve().name}", "",
        f"An agent that calls tools, trained with elpo_ray by {how}.", "",
        "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items()), "",
    ]  # fmt: skip
    return "\n".join(lines)


def _reinforced(config: Config, step: int) -> dict[str, str]:
    trainer = config.trainer
    return {
        "algorithm": config.algorithm.name,
        "steps": f"{step} of {trainer.steps}, {trainer.inputs_per_step} inputs each",
        "learning rate": f"{config.learner.optimizer.lr:g}",
    }


def _demonstrated(config: Config, step: int) -> dict[str, str]:
    settings = config.cold_start
    return {
        "optimizer steps": f"{step}, {settings.batch_size} demonstrations each",
        "learning rate": f"{settings.optimizer.lr:g}",
    }


def _task(config: Config) -> str:
    name = getattr(config.task.name, "value", config.task.name)
    file = config.task.train_file
    return f"{name} ({Path(file).name})" if file else str(name)


def _adapters(config: Config, adapter: Adapter) -> dict[str, str]:
    lora = config.learner.adapters
    if lora is None:
        return {}
    how = "merged into the weights" if adapter is Adapter.merged else "in this folder"
    return {"adapters": f"LoRA of rank {lora.rank}, alpha {lora.alpha}, {how}"}


def _results(run: RunFolder, step: int) -> dict[str, str]:
    """Held-out pass@1, if the run has ended and these are its last weights."""
    file = run.path / "summary.json"
    summary: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    before, after = summary.get("pass_at_1_before"), summary.get("pass_at_1_after")
    if summary.get("steps") != step or before is None or after is None:
        return {}
    return {"held-out pass@1": f"{before:.1%} before, {after:.1%} after"}
