"""Experiment trackers: the built-in ones and the user's own behind one `Tracker`.

Each gets every number of `metrics.jsonl` under the same name, and a few sample trees a step as
text. A tracker is imported when it is asked for; `check_trackers` says beforehand what is missing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from elpo_ray.config import Config
from elpo_ray.config.dotted import check_call, is_path, load_object
from elpo_ray.config.rules import require
from elpo_ray.config.run import LoggingConfig, TrackerName, WandbMode
from elpo_ray.config.values import flattened, plain
from elpo_ray.runs.atomic import write_whole
from elpo_ray.runs.guard import Guarded, TimedTracker, UnusableTracker
from elpo_ray.runs.log import last_step
from elpo_ray.tree import RolloutTree
from elpo_ray.types import Values

_SAMPLES = 2
"""The number of trees that a step shows."""
_MAX_CHARS = 4000
"""The most characters of a trajectory's text."""
METHODS = ("write", "show", "close")
"""What a `Tracker` has."""
TRACKERS = "trackers.json"
"""The file of a run folder with what the trackers call the run."""
TIMEOUT_S = 30
"""How long a service may take to answer, or to take what is left at a run's end."""
_MLFLOW_SERVERS = ("http", "https")
_MLFLOW_STORES = ("", "file", "sqlite", "mysql", "postgresql", "mssql", "databricks", "uc")
"""Schemes that MLflow knows itself; one of a database may name its driver after a plus sign."""


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

    def write(self, step: int, values: Values) -> None:
        """Take numbers of a step. Those of a held-out evaluation come in a call of their own, with
        the number of a step that may have been written before."""

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
    """Raise ValueError if a tracker was asked for that is not installed, a store that MLflow does
    not know, or a tracker of the user's that cannot be used as configured."""
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
        given = ("folder", "config") if is_path(name) else ("folder", "config", "kept")
        check_call(where, factory, given, options)
        if isinstance(factory, type):
            _check_methods(where, factory)
    if config.mlflow is not None:
        _check_mlflow(config.mlflow)


def _check_mlflow(uri: str) -> None:
    """Raise ValueError for a tracking URI of no form that MLflow knows; whether a server answers is
    another question, which a run survives. MLflow itself takes many seconds to import."""
    try:
        scheme, server = urlsplit(uri)[:2]
    except ValueError:
        scheme, server = "?", ""
    kind = scheme.partition("+")[0].removesuffix("-uc")
    added = entry_points(group="mlflow.tracking_store")
    known = kind in _MLFLOW_STORES or scheme in {entry.name for entry in added}
    require(
        bool(uri.strip()) and (known or (kind in _MLFLOW_SERVERS and bool(server))),
        "logging.mlflow",
        uri,
        "MLflow has no store under this address; write http://HOST:PORT for a server, or a folder "
        "as file:/PATH or mlruns",
    )


def trackers(folder: Path, config: Config) -> list[Guarded]:
    """The trackers that `config.logging` asks for. Raises UnusableTracker for an object of the
    user's that is none."""
    return [
        _guarded(name, folder, config, options) for name, options in config.logging.wanted.items()
    ]


def _guarded(name: str, folder: Path, config: Config, options: dict[str, Any]) -> Guarded:
    if is_path(name):
        where = f"logging.trackers={name!r}"
        return Guarded(where, partial(OwnTracker, where, name, folder, config, options))
    value = getattr(config.logging, name)
    where = f"logging.{name}={getattr(value, 'value', value)!r}"
    kept = Kept(folder, config, name)
    return Guarded(where, partial(BUILT_IN[name], folder, config, kept, **options))


def _check_methods(where: str, kind: type) -> None:
    missing = [name for name in METHODS if not callable(getattr(kind, name, None))]
    if missing:
        raise UnusableTracker(
            f"{where}: {kind.__name__} has no {', '.join(missing)}; a tracker has "
            f"{', '.join(METHODS)} (elpo_ray.runs.trackers.Tracker)"
        )


class OwnTracker:
    """A tracker of the user's, which is not told when a number was measured."""

    def __init__(
        self, where: str, path: str, folder: Path, config: Config, options: dict[str, Any]
    ) -> None:
        """UnusableTracker if what the path names makes something else."""
        made = load_object("logging.trackers", path)(folder, config, **options)
        _check_methods(where, type(made))
        self._tracker: Tracker = made
        self.show, self.close = made.show, made.close

    def write(self, step: int, values: Values, at: float) -> None:
        self._tracker.write(step, values)


class Kept:
    """What a tracker calls the run, in `trackers.json`, so that a resumed run goes on in the same
    one, and a start that failed half-way too."""

    def __init__(self, folder: Path, config: Config, tracker: str) -> None:
        self._path, self._tracker = folder / TRACKERS, tracker
        self._known = config.trainer.resume is not None

    def read(self) -> dict[str, str]:
        """Empty where the run is new, or new to the tracker."""
        return dict(self._all().get(self._tracker, {})) if self._known else {}

    def write(self, **names: str) -> None:
        self._known = True
        write_whole(self._path, json.dumps(self._all() | {self._tracker: names}, indent=2) + "\n")

    def _all(self) -> dict[str, dict[str, str]]:
        if not self._path.is_file():
            return {}
        return dict(json.loads(self._path.read_text(encoding="utf-8")))


class WandbSink:
    """Weights & Biases, offline by default; its files lie in the run folder. A server that cannot
    be reached at the start makes the run an offline one, which can be uploaded later."""

    def __init__(self, folder: Path, config: Config, kept: Kept, mode: str = "offline") -> None:
        import wandb

        self._wandb = wandb
        run_id = kept.read().get("id") or _new_id()
        kept.write(id=run_id)
        begin = partial(self._begin, folder, config)
        try:
            self._run = begin(run_id, WandbMode(mode))
        except Exception as fault:  # the client of a service is a boundary
            if WandbMode(mode) is not WandbMode.online:
                raise
            # W&B's client takes the first name for one in use, though it could not begin.
            self._run = begin(_new_id(), WandbMode.offline)
            text = " ".join(str(fault).split())
            where = Path(self._run.dir).parent
            print(
                f"elpo_ray: logging.wandb='online': {type(fault).__name__}: {text}; the run is "
                f"written offline, upload it with: wandb sync --id {run_id} {where}",
                file=sys.stderr,
                flush=True,
            )

    def _begin(self, folder: Path, config: Config, run_id: str, mode: WandbMode) -> Any:
        return self._wandb.init(
            project=config.logging.project,
            name=folder.name,
            id=run_id,
            resume="allow" if mode is WandbMode.online else None,
            dir=str(folder),
            mode=mode.value,
            config=plain(config),
            allow_val_change=True,
            settings=self._wandb.Settings(
                silent=True, init_timeout=TIMEOUT_S, finish_timeout=TIMEOUT_S
            ),
        )

    def write(self, step: int, values: Values, at: float) -> None:
        self._run.log(values | {"_timestamp": at}, step=step)

    def show(self, step: int, samples: Sequence[SampleTree]) -> None:
        columns: list[Any] = list(SampleTree.__slots__)
        rows = [list(asdict(sample).values()) for sample in samples]
        self._run.log({"trees": self._wandb.Table(columns=columns, data=rows)}, step=step)

    def close(self) -> None:
        self._run.finish()


def _new_id() -> str:
    return uuid.uuid4().hex[:8]


class TensorboardSink:
    """TensorBoard event files: `tensorboard --logdir runs`. A resumed run goes on in its folder;
    steps that it makes again take the place of the old ones."""

    def __init__(self, folder: Path, config: Config, kept: Kept) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        events = folder / "tensorboard"
        again = None if config.trainer.resume is None else last_step(folder) + 1
        self._writer: Any = SummaryWriter(str(events), purge_step=again)

    def write(self, step: int, values: Values, at: float) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, walltime=at)

    def show(self, step: int, samples: Sequence[SampleTree]) -> None:
        for number, sample in enumerate(samples):
            title = f"{sample.task_id}: {sample.successes} of {sample.leaves} succeeded"
            text = "\n".join("    " + line for line in sample.trajectory.splitlines())
            self._writer.add_text(f"trees/{number}", f"{title}\n\n{text}", step)

    def close(self) -> None:
        self._writer.close()


class MlflowSink:
    """An MLflow run under `config.logging.project`, on a server or in a folder."""

    def __init__(self, folder: Path, config: Config, kept: Kept, uri: str) -> None:
        if "://" not in uri or uri.startswith("file:"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow prefers databases
        # A server that does not answer must not hold up the run for minutes, as by default.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(TIMEOUT_S))
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric = MlflowClient(uri), Metric
        known = kept.read()
        run = self._known(known["run_id"]) if known.get("uri") == uri else None
        if run is None:
            run = self._client.create_run(self._experiment(config), run_name=folder.name)
            kept.write(uri=uri, run_id=run.info.run_id)
        self._id = run.info.run_id
        if run.data.params:  # it cannot take other values for them
            self._client.update_run(self._id, status="RUNNING")
            return
        flat: list[Any] = [
            Param(key, str(value)[:500]) for key, value in flattened(plain(config)).items()
        ]
        for start in range(0, len(flat), 100):  # MLflow's limit for one request
            self._client.log_batch(self._id, params=flat[start : start + 100])

    def _experiment(self, config: Config) -> str:
        project = config.logging.project
        experiment = self._client.get_experiment_by_name(project)
        return experiment.experiment_id if experiment else self._client.create_experiment(project)

    def _known(self, run_id: str) -> Any:
        """The run of an earlier part of this one; None if the store has it no longer."""
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_run(run_id)
        except MlflowException as fault:
            if fault.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def write(self, step: int, values: Values, at: float) -> None:
        when = int(1000 * at)
        metrics: list[Any] = [self._metric(key, value, when, step) for key, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def show(self, step: int, samples: Sequence[SampleTree]) -> None:
        rows = [asdict(sample) for sample in samples]
        self._client.log_dict(self._id, {"trees": rows}, f"trees/step_{step:05d}.json")

    def close(self) -> None:
        self._client.set_terminated(self._id)


BUILT_IN: dict[str, Callable[..., TimedTracker]] = {
    TrackerName.wandb: WandbSink,
    TrackerName.tensorboard: TensorboardSink,
    TrackerName.mlflow: MlflowSink,
}
