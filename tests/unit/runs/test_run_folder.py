"""The run folder: nothing half-written, nothing lost, resumed where it stopped."""

import errno
import json
from pathlib import Path

import pytest

from elpo_ray.config import Config
from elpo_ray.config.model import ModelConfig
from elpo_ray.config.run import ClusterConfig, TrainerConfig
from elpo_ray.runs.folder import RunFolder, RunState, read_state
from elpo_ray.types import CheckpointError


def config(folder: Path, **trainer: object) -> Config:
    return Config(
        model=ModelConfig(),
        cluster=ClusterConfig(gpus=False),
        trainer=TrainerConfig(run_dir=str(folder), run_name="run", **trainer),  # type: ignore[arg-type]
    )


def begin(folder: Path) -> RunFolder:
    run = RunFolder.of(config(folder))
    run.begin(config(folder))
    return run


def save(run: RunFolder, step: int, keep: int = 2) -> None:
    with run.checkpoint(RunState(step=step, cursor=8 * step), keep) as folder:
        (folder / "weights").write_text(str(step))


def test_checkpoints_are_kept_newest_first_and_read_back(tmp_path: Path) -> None:
    run = begin(tmp_path)
    for step in (1, 2, 3):
        save(run, step)
    names = sorted(path.name for path in run.checkpoints.iterdir())
    assert names == ["step_00002", "step_00003"]
    newest = run.newest_checkpoint()
    assert newest is not None
    assert read_state(newest) == RunState(step=3, cursor=24)


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    run = begin(tmp_path)
    save(run, 1)
    with (
        pytest.raises(CheckpointError, match=r"No space left.*step_00001.*trainer\.resume"),
        run.checkpoint(RunState(step=2), 2) as folder,
    ):
        (folder / "weights").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [path.name for path in run.checkpoints.iterdir()] == ["step_00001"]


def test_an_interrupted_save_is_not_a_checkpoint(tmp_path: Path) -> None:
    run = begin(tmp_path)
    save(run, 1)
    partial = run.checkpoints / ".partial-step_00002"
    partial.mkdir()
    (partial / "weights").write_text("half")
    newest = run.newest_checkpoint()
    assert newest is not None and newest.name == "step_00001"
    run.rewind(1)
    assert not partial.exists()


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    run = begin(tmp_path)
    log = run.path / "metrics.jsonl"
    log.write_text("".join(json.dumps({"step": s}) + "\n" for s in (1, 2, 3)) + '{"step": 4, "re')
    for step in (1, 2, 3):
        run.write_trees(step, [])
    run.rewind(2)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2]
    assert sorted(p.name for p in run.trees.iterdir()) == ["step_00001.jsonl", "step_00002.jsonl"]


def test_a_taken_name_is_refused(tmp_path: Path) -> None:
    begin(tmp_path)
    with pytest.raises(ValueError, match=r"trainer\.run_name='run'.*trainer\.resume="):
        RunFolder.of(config(tmp_path))


def test_a_run_without_checkpoint_cannot_be_resumed(tmp_path: Path) -> None:
    run = begin(tmp_path)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        RunFolder.of(config(tmp_path, resume=str(run.path)))


def test_a_checkpoint_of_another_model_is_refused_before_anything_starts(tmp_path: Path) -> None:
    run = begin(tmp_path)
    save(run, 1)
    assert RunFolder.of(config(tmp_path, resume=str(run.path))).path == run.path
    other = config(tmp_path, resume=str(run.path))
    other.model.tiny.num_layers = 9
    with pytest.raises(ValueError, match=r"trainer\.resume=.*model=.*'num_layers': 4.*9"):
        RunFolder.of(other)


def test_totals_add_up() -> None:
    state = RunState()
    state.add(rollouts=3)
    state.add(rollouts=4, tokens=1)
    assert state.totals == {"rollouts": 7, "tokens": 1}


def test_the_tokenizer_is_kept_where_there_is_one(tmp_path: Path) -> None:
    run, model = begin(tmp_path), tmp_path / "model"
    model.mkdir()
    run.keep_tokenizer(model)
    assert not (run.path / "tokenizer.json").exists()
    (model / "tokenizer.json").write_text("{}")
    run.keep_tokenizer(model)
    assert (run.path / "tokenizer.json").read_text() == "{}"
