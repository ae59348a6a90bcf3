"""Trackers get the numbers of `metrics.jsonl` and a few trees to look at."""

from __future__ import annotations

import importlib.util
import json
import shutil
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from fakes import sample_of
from rich.console import Console

from elpo_ray.config import Config
from elpo_ray.config.growth import DynamicSamplingConfig, GrowthConfig
from elpo_ray.config.run import LoggingConfig, TrainerConfig, WandbMode
from elpo_ray.evaluation.held_out import held_out_values
from elpo_ray.learner.stats import UpdateStats
from elpo_ray.runs.metrics import Metrics, comparison_axes, step_metrics
from elpo_ray.runs.trackers import check_trackers, sample_trees
from elpo_ray.scheduling.dynamic_sampling import collect
from elpo_ray.tree import Localization, RolloutTree
from elpo_ray.types import BENCHMARK, FinishReason, Problem, Score, Step, Turn

VALUES = {"reward": 0.5, "seconds/grow": 2.0}


def step(action: str, observation: str = "") -> Step:
    turn = Turn((1,), (0.0,), (0.5,), FinishReason.STOP, 0)
    return Step(turn, action_text=action, observation_text=observation)


def tree(task_id: str, *, found: bool, searched: bool = True) -> RolloutTree:
    grown = RolloutTree(task_id, 2, messages=[{"role": "user", "content": f"solve {task_id}"}])
    failed = [step("try", "seen"), step("mistake", "late"), step("give up")]
    leaf = grown.add_trajectory(0, failed, Score(0.0, False))
    grown.add_trajectory(0, [step("right")], Score(1.0, True))
    if searched:
        critical = grown.path(leaf)[1] if found else None
        interval = (2, 2) if found else (1, 3)
        grown.localizations.append(Localization(leaf, critical, found, interval, []))
    return grown


def test_samples_are_trees_whose_critical_step_was_found_before_others() -> None:
    trees = [
        tree("unsearched", found=False, searched=False),
        tree("open", found=False),
        tree("found", found=True),
    ]
    first, second = sample_trees(trees)
    assert (first.task_id, first.critical_step, second.critical_step) == ("found", 2, None)
    assert (first.leaves, first.successes) == (2, 1)
    lines = first.trajectory.splitlines()
    assert lines[0] == "solve found"
    assert [line for line in lines if "irrecoverable" in line] == [
        "--- step 2 (node 2)  <- first irrecoverable step"
    ]
    assert lines[-1] == "give up"
    assert sample_trees(trees[:1]) == []


def test_tensorboard_has_every_number_and_the_trees(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging = LoggingConfig(wandb=WandbMode.disabled, tensorboard=True)
    log(Config(logging=logging), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name, value in VALUES.items():
        assert [(event.step, event.value) for event in events.Scalars(name)] == [(1, value)]
    (text,) = events.Tensors("trees/0/text_summary")
    assert b"first irrecoverable step" in text.tensor_proto.string_val[0]


def test_mlflow_has_every_number_the_settings_and_the_trees(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    store = f"file:{tmp_path / 'mlflow'}"
    logging = LoggingConfig(wandb=WandbMode.disabled, mlflow=store, project="tests")
    log(Config(logging=logging), tmp_path)
    log(Config(logging=logging), tmp_path)  # a second run of the same experiment
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 2
    for run in runs:
        assert run.data.metrics == VALUES and run.info.status == "FINISHED"
        assert run.data.params["logging.project"] == "tests"
        folder = Path(run.info.artifact_uri.removeprefix("file://").removeprefix("file:"))
        shown = json.loads((folder / "trees" / "step_00001.json").read_text())["trees"]
        assert shown[0]["task_id"] == "found"


def test_wandb_writes_offline_into_the_run_folder(tmp_path: Path) -> None:
    log(Config(), tmp_path)
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/table/trees_*.json"))


def test_a_tracker_that_is_not_installed_is_refused_beforehand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_trackers(LoggingConfig(tensorboard=True, mlflow="http://localhost:5000"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"logging\.tensorboard=True: .*elpo_ray\[trackers\]"):
        check_trackers(LoggingConfig(wandb=WandbMode.disabled, tensorboard=True))
    with pytest.raises(ValueError, match=r"logging\.mlflow='file:x'"):
        check_trackers(LoggingConfig(wandb=WandbMode.disabled, mlflow="file:x"))
    check_trackers(LoggingConfig(wandb=WandbMode.disabled))


@pytest.mark.parametrize(
    "uri",
    ["localhost:5000", "htp://localhost:5000", "http:/localhost:5000", "https://", "s3://x", "",
     " ", "http://[::1"],
)  # fmt: skip
def test_an_address_that_is_no_store_of_mlflow_is_refused_beforehand(uri: str) -> None:
    with pytest.raises(ValueError, match=r"logging\.mlflow=.*http://HOST:PORT") as raised:
        check_trackers(LoggingConfig(wandb=WandbMode.disabled, mlflow=uri))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "uri",
    ["http://localhost:5000", "https://mlflow.example/x", "file:x", "file:///tmp/x", "mlruns",
     "/a/b", "./x", "sqlite:///x.db", "postgresql+psycopg2://u:p@h/db", "databricks", "databricks-uc://p"],
)  # fmt: skip
def test_every_kind_of_mlflow_store_is_let_through(uri: str) -> None:
    check_trackers(LoggingConfig(wandb=WandbMode.disabled, mlflow=uri))


def continued(config: Config, folder: Path) -> Config:
    """The same run, resumed."""
    return replace(config, trainer=TrainerConfig(resume=str(folder)))


def write(config: Config, folder: Path, *rows: tuple[int, dict[str, float]]) -> None:
    metrics = Metrics(folder, config, Console(quiet=True))
    for step, values in rows:
        metrics.log(step, values)
    metrics.close()


def mlflow_runs(store: str, project: str = "elpo_ray") -> tuple[Any, list[Any]]:
    from mlflow import MlflowClient

    client = MlflowClient(store)
    experiment = client.get_experiment_by_name(project)
    return client, [] if experiment is None else client.search_runs([experiment.experiment_id])


def test_mlflow_goes_on_in_the_same_run_with_times_that_are_right(tmp_path: Path) -> None:
    store = f"file:{tmp_path / 'mlflow'}"
    config = Config(logging=LoggingConfig(wandb=WandbMode.disabled, mlflow=store))
    before = 1000 * time.time()
    write(config, tmp_path, (1, VALUES), (2, VALUES))
    write(continued(config, tmp_path), tmp_path, (3, VALUES), (3, {"eval/pass_at_1": 0.5}))
    client, (run,) = mlflow_runs(store)
    history = client.get_metric_history(run.info.run_id, "reward")
    assert [point.step for point in history] == [1, 2, 3]
    assert all(before - 1 <= point.timestamp <= 1000 * time.time() + 1 for point in history)
    assert run.data.metrics["eval/pass_at_1"] == 0.5 and run.info.status == "FINISHED"


def test_mlflow_begins_a_run_where_the_store_has_the_old_one_no_longer(tmp_path: Path) -> None:
    for place in ("one", "two"):  # another store, too
        store = f"file:{tmp_path / place}"
        config = Config(logging=LoggingConfig(wandb=WandbMode.disabled, mlflow=store))
        write(continued(config, tmp_path), tmp_path, (1, VALUES))
        assert len(mlflow_runs(store)[1]) == 1
    known = json.loads((tmp_path / "trackers.json").read_text())["mlflow"]["run_id"]
    (folder,) = (tmp_path / "two").glob(f"*/{known}")
    shutil.rmtree(folder)
    write(continued(config, tmp_path), tmp_path, (1, VALUES))
    (run,) = mlflow_runs(store)[1]
    assert run.info.run_id != known


def test_a_store_that_cannot_be_written_to_for_a_while_misses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "mlflow"
    place.write_text("a file where a folder should be")
    logging = LoggingConfig(wandb=WandbMode.disabled, mlflow=f"file:{place}")
    metrics = Metrics(tmp_path, Config(logging=logging), Console(quiet=True))
    for step_number in (1, 2, 3):
        metrics.log(step_number, VALUES)
    place.unlink()
    metrics.log(4, VALUES)
    metrics.close()
    client, (run,) = mlflow_runs(f"file:{place}")
    history = client.get_metric_history(run.info.run_id, "reward")
    assert [point.step for point in history] == [1, 2, 3, 4]
    said = capsys.readouterr().err
    assert "logging.mlflow='file:" in said and "it answers again" in said


def test_a_service_that_is_not_there_costs_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logging = LoggingConfig(wandb=WandbMode.disabled, mlflow="http://127.0.0.1:9")
    write(Config(logging=logging), tmp_path, (1, VALUES), (2, VALUES))
    assert capsys.readouterr().err.count("elpo_ray: logging.mlflow='http://127.0.0.1:9'") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_wandb_without_a_login_is_written_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    write(Config(logging=LoggingConfig(wandb=WandbMode.online)), tmp_path, (1, VALUES))
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    known = json.loads((tmp_path / "trackers.json").read_text())["wandb"]["id"]
    assert f"wandb sync --id {known} {folder}" in capsys.readouterr().err


def test_wandb_goes_on_under_the_same_name(tmp_path: Path) -> None:
    write(Config(), tmp_path, (1, VALUES))
    write(continued(Config(), tmp_path), tmp_path, (2, VALUES))
    known = json.loads((tmp_path / "trackers.json").read_text())["wandb"]["id"]
    parts = [path.name for path in tmp_path.glob("wandb/offline-run-*")]
    assert parts and all(f"-{known}" in part for part in parts)


def test_tensorboard_shows_steps_that_are_made_again_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = Config(logging=LoggingConfig(wandb=WandbMode.disabled, tensorboard=True))
    write(config, tmp_path, *((step_number, {"reward": 1.0}) for step_number in (1, 2, 3)))
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)[:1]
    (tmp_path / "metrics.jsonl").write_text("".join(kept))  # as `RunFolder.rewind` does
    again = ((step_number, {"reward": 2.0}) for step_number in (2, 3))
    write(continued(config, tmp_path), tmp_path, *again)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("reward")]
    assert found == [(1, 1.0), (2, 2.0), (3, 2.0)]


def test_no_metric_is_named_like_a_folder_of_others() -> None:
    """MLflow keeps each metric in a file of its name, so `seconds` cannot stand beside
    `seconds/grow`."""
    learner = [field.name for field in fields(UpdateStats)]
    problems = [Problem(name, (), None, extra={BENCHMARK: name}) for name in "ab"]
    samples = [sample_of(problem.id) for problem in problems]
    names = {
        *step_metrics(collect(lambda *_: [(problems[0], tree("t", found=True))], 1,
                              DynamicSamplingConfig()), GrowthConfig(), 1),
        *learner, *held_out_values(problems, samples), *comparison_axes({}), "seconds/grow",
        "localization_accuracy", "faults/restarts", "engine_busy_s",
    }  # fmt: skip
    assert not [(one, other) for one in names for other in names if other.startswith(f"{one}/")]


def log(config: Config, folder: Path) -> None:
    metrics = Metrics(folder, config, Console(quiet=True))
    metrics.log(1, VALUES)
    metrics.show(1, [tree("found", found=True)])
    metrics.close()
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1]) == {"step": 1, **VALUES}


OWN = """
class Book:
    def __init__(self, folder, config, *, name="book"):
        self.file = (folder / name).open("a")
    def write(self, step, values): print(step, sorted(values), file=self.file)
    def show(self, step, samples): print(len(samples), file=self.file)
    def close(self): self.file.close()
class Flaky(Book):
    def write(self, step, values): raise OSError("no network")
class Half:
    def __init__(self, folder, config): ...
    def write(self, step, values): ...
def half(folder, config): return Half(folder, config)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_trackers.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))


def own_logging(*entries: object) -> LoggingConfig:
    return LoggingConfig(wandb=WandbMode.disabled, trackers=list(entries))


def test_a_tracker_of_ones_own_gets_what_the_others_get(own: None, tmp_path: Path) -> None:
    entries = ["own_trackers:Book", {"name": "own_trackers:Flaky", "options": {"name": "flaky"}}]
    logging = own_logging(*entries)
    check_trackers(logging)
    metrics = Metrics(tmp_path, Config(logging=logging), Console(quiet=True))
    metrics.log(1, VALUES)
    metrics.show(1, [tree("found", found=True)])
    metrics.close()
    assert (tmp_path / "book").read_text() == "1 ['reward', 'seconds/grow']\n1\n"
    assert (tmp_path / "flaky").read_text() == ""


def test_a_tracker_that_fails_is_named_and_the_run_goes_on(
    own: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config(logging=own_logging("own_trackers:Flaky"))
    metrics = Metrics(tmp_path, config, Console(quiet=True))
    for step_number in (1, 2):
        metrics.log(step_number, VALUES)
    metrics.close()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "own_trackers:Flaky': write raised OSError: no network; the run goes on" in said
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("own_trackers:Boook", "own_trackers has no Boook; did you mean Book"),
        ("own_trackers:Half", "Half has no show, close; a tracker has write, show, close"),
        (
            {"name": "own_trackers:Book", "options": {"nam": 1}},
            "no option nam; it takes name",
        ),
    ],
)
def test_a_tracker_that_cannot_be_used_is_refused(own: None, entry: object, message: str) -> None:
    with pytest.raises(ValueError, match=rf"logging\.trackers='own_trackers:\w+': {message}"):
        check_trackers(own_logging(entry))


def test_what_a_factory_makes_is_looked_at_too(own: None, tmp_path: Path) -> None:
    logging = own_logging("own_trackers:half")
    check_trackers(logging)
    with pytest.raises(ValueError, match="own_trackers:half': Half has no show, close"):
        Metrics(tmp_path, Config(logging=logging), Console(quiet=True))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("tensorbord", "did you mean tensorboard"),
        ({"nam": "tensorboard"}, "write a name, or"),
        ({"name": "tensorboard", "options": 3}, "write a name, or"),
        (7, "write a name, or"),
    ],
)
def test_an_entry_that_names_no_tracker_is_refused(entry: object, message: str) -> None:
    with pytest.raises(ValueError, match=rf"logging\.trackers=.*{message}"):
        own_logging(entry)


def test_a_built_in_tracker_may_stand_in_the_list() -> None:
    assert own_logging("tensorboard").wanted == {"tensorboard": {}}
    both = LoggingConfig(trackers=[{"name": "wandb", "options": {"mode": "online"}}])
    assert both.wanted == {"wandb": {"mode": "online"}}
