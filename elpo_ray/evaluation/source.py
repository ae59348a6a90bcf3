"""What `model=…` may name: a folder, a hub name, a run, a checkpoint, a server.

Invariant: what comes out is ready to be served: a Hugging Face folder on this node or the URL of a
server that answers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elpo_ray.config.measure import MeasureConfig
from elpo_ray.config.model import ModelConfig, Precision
from elpo_ray.learner.saved import saved_config, saved_model
from elpo_ray.models.folder import (
    check_context,
    check_model_path,
    context_limit,
    fingerprint,
    local_folder,
)
from elpo_ray.runs.folder import run_of

MAX_CONTEXT = 20480
"""The paper's tokens of context, for a model whose own limit is not known."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that can be sampled."""

    name: str
    """The model's name as the user gave it."""
    path: str
    """A Hugging Face folder, or the URL of a server."""
    served_model: str | None
    """The server's name of it; None for a folder."""
    max_context: int
    precision: Precision
    tool_parser: str | None = None
    template_options: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path | None:
        """None behind a server."""
        return None if self.served_model else Path(self.path)

    def fingerprint(self) -> str:
        """Changes with the weights, the tokenizer and the template (`models.folder.fingerprint`). A
        server's is its name of the model."""
        if self.folder is None:
            return f"{self.path} {self.served_model}"
        return fingerprint(self.folder)


def resolve(config: MeasureConfig) -> ModelSource:
    """The model that `config.model` names; a checkpoint is first written as a model folder beside
    itself. Raises ValueError if it cannot be served."""
    name = config.model
    default = Precision.bf16 if config.cluster.gpus else Precision.fp32
    if "://" in name:
        from elpo_ray.rollout.endpoint import served_model  # seconds to import

        served = served_model(name, config.served_model)
        return ModelSource(name, name, served, config.max_context or MAX_CONTEXT, default)
    if config.served_model is not None:
        raise ValueError(
            f"served_model={config.served_model!r}: belongs to a server; give its URL as model"
        )
    run = run_of(Path(name))
    if run is None:
        check_model_path(name, "model")
        folder, saved = (
            local_folder(name, key="model"),
            ModelConfig(max_context=MAX_CONTEXT, precision=default),
        )
    else:
        folder, saved = saved_model(run, Path(name), "model"), saved_config(run).model
    max_context = saved.max_context
    if config.max_context is None:
        max_context = min(max_context, context_limit(folder) or max_context)
    else:
        check_context(folder, "max_context", config.max_context)
    return ModelSource(
        name,
        str(folder.resolve()),
        None,
        config.max_context or max_context,
        config.precision or saved.precision,
        config.tool_parser or saved.tool_parser,
        config.template_options or saved.template_options,
    )
