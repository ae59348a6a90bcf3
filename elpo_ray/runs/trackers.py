"""Experiment trackers: Weights & Biases, TensorBoard and MLflow behind one `Tracker`.

Each gets every number of `metrics.jsonl` under the same name, and a few sample trees a step as
text. A tracker is imported when it is asked for; `check_trackers` says beforehand what is missing.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from elpo_ray.config import Config
from elpo_ray.config.rules import require
from elpo_ray.config.run import LoggingConfig, WandbMode
from elpo_ray.config.values import flattened, plain
from elpo_ray.tree import RolloutTree
from elpo_ray.types import Values

_SAMPLES = 2
"""The number of trees that a step shows."""
_MAX_CHARS = 4000
"""The most characters of a trajectory's text."""


@dataclass(frozen=True, slots=True)
class SampleTree:
    """One tree in a tracker's table: what was asked, and a trajectory that failed."""

    task_id: str
    leaves: int
    successes: int
    critical_step: int | None
    """The failed trajectory's first irrecoverable step, from 1; None if the search found none."""
    trajectory: str
    """Its turns and observations; the critical step is marked."""


class Sink(Protocol):
    """Where a run's numbers go."""

    def write(self, step: int, values: Values) -> None: ...

    def close(self) -> None: ...


class Tracker(Sink, Protocol):
    """A sink that people browse."""

    def show(self, step: int, samples: Sequence[SampleTree]) -> None:
        """Show sample trees of the step."""


def sample_trees(trees: Sequence[RolloutTree]) -> list[SampleTree]:
    """The step's first trees in which a search found the critical step, else the first searched."""
    searched = [(tree, tree.localizations[0]) for tree in trees if tree.localizations]
    searched.sort(key=lambda pair: pair[1].critical is None)
    samples = []
    for tree, search in searched[:_SAMPLES]:
        path, leaves = tree.path(search.leaf), tree.leaves()
        critical = None if search.critical is None else path.index(search.critical) + 1
        samples.append(
            SampleTree(
                task_id=tree.task_id,
                leaves=len(leaves),
                successes=sum(leaf.score is not None and leaf.score.success for leaf in leaves),
                critical_step=critical,
                trajectory=_text(tree, path, critical)[:_MAX_CHARS],
            )
        )
    return samples


def _text(tree: RolloutTree, path: Sequence[int], critical: int | None) -> str:
    lines = [message["content"] for message in tree.messages[-1:]]
    for number, (node, step) in enumerate(zip(path, tree.steps(path[-1]), strict=True), start=1):
        mark = "  <- first irrecoverable step" if number == critical else ""
        lines += [f"--- step {number} (node {node}){mark}", step.action_text]
        if step.observation_text:
            lines += ["[observation]", step.observation_text]
    return "\n".join(lines)


def check_trackers(config: LoggingConfig) -> None:
    """Raise ValueError if a tracker was asked for that is not installed."""
    for key, wanted, module in (
        ("wandb", config.wandb is not WandbMode.disabled, "wandb"),
        ("tensorboard", config.tensorboard, "tensorboard"),
        ("mlflow", config.mlflow is not None, "mlflow"),
    ):
        require(
            not wanted or importlib.util.find_spec(module) is not None,
            f"logging.{key}",
            getattr(config, key),
            f"the package {module} is missing; pip install 'elpo_ray[trackers]'",
        )


def trackers(folder: Path, config: Config) -> list[Tracker]:
    """The trackers that `config.logging` asks for."""
    sinks: list[Tracker] = []
    if config.logging.wandb is not WandbMode.disabled:
        sinks.append(WandbSink(folder, config))
    if config.logging.tensorboard:
        sinks.append(TensorboardSink(folder / "tensorboard"))
    if config.logging.mlflow is not None:
        sinks.append(MlflowSink(config.logging.mlflow, folder.name, config))
    return sinks


class WandbSink:
    """Weights & Biases, offline by default; its files lie in the run folder."""

    def __init__(self, folder: Path, config: Config) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=config.logging.project,
            name=folder.name,
            dir=str(folder),
            mode=config.logging.wandb.value,
            config=plain(config),
            settings=wandb.Settings(silent=True),
        )

    def write(self, step: int, values: Values) -> None:
        self._run.log(values, step=step)

    def show(self, step: int, samples: Sequence[SampleTree]) -> None:
        columns: list[Any] = list(SampleTree.__slots__)
        rows = [list(asdict(sample).values()) for sample in samples]
        self._run.log({"trees": self._wandb.Table(columns=columns, data=rows)}, step=step)

    def close(self) -> None:
        self._run.finish()


class TensorboardSink:
    """TensorBoard event files: `tensorboard --logdir runs`."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))

    def write(self, step: int, values: Values) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def show(self, step: int, samples: Sequence[SampleTree]) -> None:
        for number, sample in enumerate(samples):
            title = f"{sample.task_id}: {sample.successes} of {sample.leaves} succeeded"
            text = "\n".join("    " + line for line in sample.trajectory.splitlines())
            self._writer.add_text(f"trees/{number}", f"{title}\n\n{text}", step)

    def close(self) -> None:
        self._writer.close()


class MlflowSink:
    """An MLflow run under `config.logging.project`, on a server or in a folder."""

    def __init__(self, uri: str, name: str, config: Config) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        if "://" not in uri or uri.startswith("file:"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow prefers databases
        self._client, self._metric = MlflowClient(uri), Metric
        project = config.logging.project
        experiment = self._client.get_experiment_by_name(project)
        experiment_id = (
            experiment.experiment_id if experiment else self._client.create_experiment(project)
        )
        self._id = self._client.create_run(experiment_id, run_name=name).info.run_id
        flat: list[Any] = [
            Param(key, str(value)[:500]) for key, value in flattened(plain(config)).items()
        ]
        for start in range(0, len(flat), 100):  # MLflow's limit for one request
            self._client.log_batch(self._id, params=flat[start : start + 100])

    def write(self, step: int, values: Values) -> None:
        metrics: list[Any] = [self._metric(name, value, 0, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def show(self, step: int, samples: Sequence[SampleTree]) -> None:
        rows = [asdict(sample) for sample in samples]
        self._client.log_dict(self._id, {"trees": rows}, f"trees/step_{step:05d}.json")

    def close(self) -> None:
        self._client.set_terminated(self._id)
