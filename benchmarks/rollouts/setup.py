"""What several sections need: the quickstart's settings, its model, a Ray of their own."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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


def with_model(args: argparse.Namespace, config: Config, cluster: Cluster) -> Path:
    if args.model is not None:
        return Path(args.model)
    task = make_task(config.task, config.trainer.seed)
    start = starting_model(config, task, base_model(config, task), cluster, Console(stderr=True))
    for rank in start.learner.ranks if start.learner is not None else []:
        ray.kill(rank)
    return start.folder


@contextmanager
def local_ray() -> Iterator[None]:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()
