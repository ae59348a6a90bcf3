"""What several sections need: the quickstart's settings, its model, a Ray of their own."""

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

from elpo_ray.cluster import Cluster
from elpo_ray.cold_start import base_model, starting_model
from elpo_ray.command import typed
from elpo_ray.config import CONF_DIR, Config
from elpo_ray.tasks import make_task

Values = dict[str, Any]


def quickstart(*overrides: str) -> Config:
    ConfigStore.instance().store(name="config_schema", node=Config)
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        composed = compose("config", ["+experiment=quickstart", *overrides])
    return typed(Config, composed)


@contextmanager
def with_model(args: argparse.Namespace, config: Config, cluster: Cluster) -> Iterator[Path]:
    """Folder of the model that `--model` and `--layers` ask for."""
    with TemporaryDirectory() as scratch:
        folder = cold_start(config, cluster) if args.model is None else Path(args.model)
        yield deepened(folder, args.layers, Path(scratch) / "model") if args.layers else folder


def cold_start(config: Config, cluster: Cluster) -> Path:
    task = make_task(config.task, config.trainer.seed)
    start = starting_model(config, task, base_model(config, task), cluster, Console(stderr=True))
    for rank in start.learner.ranks if start.learner is not None else []:
        ray.kill(rank)
    return start.folder


def deepened(folder: Path, layers: int, to: Path) -> Path:
    """The model of `folder` with so many layers in all, those added without effect: their output
    projections are zero."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    weights = model.state_dict()
    shape = model.config
    shape.num_hidden_layers, shape.layer_types = layers, None
    deeper = AutoModelForCausalLM.from_config(type(shape)(**shape.to_dict()))
    with torch.no_grad():
        for name, weight in deeper.state_dict().items():
            if name in weights:
                weight.copy_(weights[name])
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
    shutil.copytree(folder, to)
    deeper.save_pretrained(to)
    return to


@contextmanager
def local_ray() -> Iterator[None]:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()
