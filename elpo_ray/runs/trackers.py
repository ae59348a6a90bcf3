"""Experiment trackers: the built-in ones and the user's own behind one `Tracker`.

Each gets every number of `metrics.jsonl` under the same name, and a few sample trees a step as
text. A tracker is imported when it is asked for; `check_trackers` says beforehand what is missing.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from elpo_ray.config import Config
from elpo_ray.config.dotted import check_call, is_path, load_object
from elpo_ray.config.rules import require
from elpo_ray.config.run import LoggingConfig, TrackerName, WandbMode
from elpo_ray.config.values import flattened, plain
from elpo_ray.tree import RolloutTree
from elpo_ray.types import Values

_SAMPLES = 2
"""The number of trees that a step shows."""
_MAX_CHARS = 4000
"""The most characters of a trajectory's text."""
METHODS = ("write", "show", "close")
"""What a `Tracker` has."""


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
    """Raise ValueError if a tracker was asked for that is not installed, or that is the user's and
    cannot be used as configured."""
    for name, options in config.wanted.items():
        key = "logging.trackers" if is_path(name) else f"logging.{name}"
        require(
            is_path(name) or importlib.util.find_spec(name) is not None,
            key,
            getattr(config, name, name),
            f"the package {name} is missing; pip install 'elpo_ray[trackers]'",
        )
        factory = load_object(key, name) if is_path(name) else BUILT_IN[name]
        where = f"{key}={name!r}"
        check_call(where, factory, ("folder", "config"), options)
        if isinstance(factory, type):
            _check_methods(where, factory)


def trackers(folder: Path, config: Config) -> list[Tracker]:
    """The trackers that `config.logging` asks for."""
    return [
        OwnTracker(name, folder, config, options)
        if is_path(name)
        else BUILT_IN[name](folder, config, **options)
        for name, options in config.logging.wanted.items()
    ]


def _check_methods(where: str, kind: type) -> None:
    missing = [name for name in METHODS if not callable(getattr(kind, name, None))]
    if missing:
        raise ValueError(
            f"{where}: {kind.__name__} has no {', '.join(missing)}; a tracker has "
            f"{', '.join(METHODS)} (elpo_ray.runs.trackers.Tracker)"
        )


class OwnTracker:
    """A tracker of the user's. Once it has raised, the run says so and goes on without it."""

    def __init__(self, path: str, folder: Path, config: Config, options: dict[str, Any]) -> None:
        """ValueError if it cannot be made."""
        self._where = f"logging.trackers={path!r}"
        try:
            made = load_object("logging.trackers", path)(folder, config, **options)
        except Exception as fault:  # the user's code is a boundary
            raise ValueError(f"{self._where}: raised {type(fault).__name__}: {fault}") from fault
        _check_methods(self._where, type(made))
        self._tracker: Tracker | None = made

    def write(self, step: int, values: Values) -> None:
        self._call("write", step, values)

    def show(self, step: int, samples: Sequence[SampleTree]) -> None:
        self._call("show", step, samples)

    def close(self) -> None:
        self._call("close")

    def _call(self, name: str, *given: Any) -> None:
        if self._tracker is None:
            return
        try:
            getattr(self._tracker, name)(*given)
        except Exception as fault:  # the user's code is a boundary
            self._tracker = None
            print(
                f"elpo_ray: {self._where}: {name} raised {type(fault).__name__}: {fault}; the run "
                "goes on without this tracker",
                file=sys.stderr,
            )


class WandbSink:
    """Weights & Biases, offline by default; its files lie in the run folder."""

    def __init__(self, folder: Path, config: Config, mode: str = "offline") -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=config.logging.project,
            name=folder.name,
            dir=str(folder),
            mode=WandbMode(mode).value,
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

    def __init__(self, folder: Path, config: Config) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))

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

    def __init__(self, folder: Path, config: Config, uri: str) -> None:
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
        self._id = self._client.create_run(experiment_id, run_name=folder.name).info.run_id
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


BUILT_IN: dict[str, Callable[..., Tracker]] = {
    TrackerName.wandb: WandbSink,
    TrackerName.tensorboard: TensorboardSink,
    TrackerName.mlflow: MlflowSink,
}
