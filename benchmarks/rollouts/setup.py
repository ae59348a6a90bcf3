"""What several sections need: the quickstart's settings, its model, and a local Ray."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from rich.console import Console

from elpo_ray.cluster.cluster import Cluster
from elpo_ray.config import CONF_DIR, Config
from elpo_ray.config.values import typed
from elpo_ray.models.base import base_model
from elpo_ray.tasks import make_task
from elpo_ray.training.cold_start import starting_model

Values = dict[str, Any]


def quickstart(*overrides: str) -> Config:
    ConfigStore.instance().store(name="config_schema", node=Config)
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        composed = compose("config", ["+experiment=quickstart", *overrides])
    return typed(Config, composed)


@contextmanager
def with_model(args: argparse.Namespace, config: Config, cluster: Cluster) -> Iterator[Path]:
    """Folder of the model that `--model`, `--layers` and `--mlp` ask for."""
    with TemporaryDirectory() as scratch:
        folder = cold_start(config, cluster) if args.model is None else Path(args.model)
        if args.layers or args.mlp:
            folder = enlarged(folder, args.layers, args.mlp, Path(scratch) / "model")
        yield folder


def cold_start(config: Config, cluster: Cluster) -> Path:
    task = make_task(config.task, config.trainer.seed)
    start = starting_model(config, task, base_model(config, task), cluster, Console(stderr=True))
    shared = config.cluster.colocated  # there it rests in host memory while engines sample
    for rank in start.learner.ranks if start.learner is not None and not shared else []:
        ray.kill(rank)
    return start.folder


def enlarged(folder: Path, layers: int | None, mlp: int | None, to: Path) -> Path:
    """The model of `folder` with this number of layers and of neurons in each MLP. The added ones
    have no effect, because their output weights are zero."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    weights = model.state_dict()
    shape = model.config
    shape.num_hidden_layers, shape.layer_types = layers or shape.num_hidden_layers, None
    shape.intermediate_size = mlp or shape.intermediate_size
    larger = AutoModelForCausalLM.from_config(type(shape)(**shape.to_dict()))
    with torch.no_grad():
        for name, weight in larger.state_dict().items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
            if name in weights:
                weight[tuple(slice(size) for size in weights[name].shape)] = weights[name]
    shutil.copytree(folder, to)
    larger.save_pretrained(to)
    return to


@contextmanager
def local_ray() -> Iterator[None]:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()
