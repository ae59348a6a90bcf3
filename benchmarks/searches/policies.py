"""The policies whose banks are made: the tiny one before and after training, or any model."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from benchmarks.rollouts.setup import cold_start, quickstart
from benchmarks.searches.bank import BankSize
from elpo_ray.cluster.cluster import Cluster
from elpo_ray.config import Config
from elpo_ray.config.measure import MeasureConfig
from elpo_ray.evaluation.source import resolve

HARDER = (
    "task.countdown.numbers=6",
    "task.countdown.operators='+-*'",
    "task.countdown.high=4",
    "task.countdown.max_value=30",
    "task.countdown.demonstrations=9000",
    "task.max_turns=7",
    "model.max_context=512",
)
"""Six numbers and all operators instead of five numbers with + and -. The numbers are small and the
demonstrations more, so that the tiny policy solves some: with numbers up to 9 it solves 1 %."""


@dataclass(frozen=True)
class Kind:
    """One kind of bank."""

    overrides: tuple[str, ...] = ()
    """Keys over the quickstart's configuration."""
    temperature: float = 1.0
    trained: bool = False
    """Whether the policy was trained for the quickstart's 20 steps after its cold start."""
    size: BankSize = field(default_factory=lambda: BankSize(100, 48, 32))


KINDS = {
    "v0": Kind(),
    "v20": Kind(trained=True),
    "harder": Kind(overrides=HARDER, temperature=1.2, size=BankSize(60, 40, 8)),
}
"""The harder one has few equal prefixes, hence many to complete: it is smaller."""


def configuration(kind: Kind) -> Config:
    """A run's configuration with which the bank is sampled."""
    return quickstart(*kind.overrides, f"sampling.temperature={kind.temperature}")


def policy(name: str, home: Path, console: Console) -> Path:
    """The folder of a kind's policy, which is made if need be; runs lie in `home`."""
    kind = KINDS[name]
    if kind.trained:
        run = home / f"training-{name}"
        if not (run / "summary.json").is_file():
            train(run, kind.overrides)
        return model_of(str(run))
    config = quickstart(*kind.overrides)
    with Cluster(config) as cluster:
        return cold_start(config, cluster)


def model_of(name: str) -> Path:
    """The model folder that a folder, a run or a checkpoint is."""
    source = resolve(MeasureConfig(model=name, tasks=["countdown"]))
    if source.folder is None:
        raise ValueError(f"--model={name}: is a server; a bank needs a folder or a run")
    return source.folder


def train(run: Path, overrides: tuple[str, ...]) -> None:
    """A whole quickstart."""
    command = [
        sys.executable, "-m", "elpo_ray.main", "+experiment=quickstart", *overrides,
        f"trainer.run_dir={run.parent}", f"trainer.run_name={run.name}",
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=sys.stderr)
