"""A run that is continued: with the same settings, with others, under another name, or not at all;
and the folder of a start that failed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from elpo_ray.config import Config
from elpo_ray.config.compose import composed
from elpo_ray.runs.folder import RunFolder, RunState

ROOT = Path(__file__).parents[3]


def config(folder: Path, *words: str) -> Config:
    return composed(["+experiment=quickstart", f"trainer.run_dir={folder}", *words])


def made(folder: Path, *steps: int, words: tuple[str, ...] = ()) -> RunFolder:
    """A run that has come to its last checkpoint's step, its process gone."""
    settings = config(folder, "trainer.run_name=run", *words)
    run = RunFolder.of(settings)
    run.begin(settings)
    work(run, *steps)
    return run


def work(run: RunFolder, *steps: int) -> None:
    for step in steps:
        with (run.path / "metrics.jsonl").open("a") as log:
            log.write(json.dumps({"step": step, "reward": float(step)}) + "\n")
            run.write_trees(step, [])
            with run.checkpoint(RunState(step=step, cursor=16 * step), 2) as folder:
                (folder / "learner").write_text(str(step))
    run.close()


def resumed(folder: Path, *words: str) -> RunFolder:
    settings = config(folder, f"trainer.resume={folder / 'run'}", *words)
    run = RunFolder.of(settings)
    run.begin(settings)
    run.close()
    return run


def logged(run: RunFolder) -> list[int]:
    return [json.loads(line)["step"] for line in (run.path / "metrics.jsonl").open()]


def test_settings_that_change_what_is_learned_are_listed_and_refused(tmp_path: Path) -> None:
    made(tmp_path, 1, 2)
    with pytest.raises(ValueError) as refused:
        resumed(tmp_path, "algorithm=grpo", "trainer.seed=3", "logging.tensorboard=true")
    said = str(refused.value)
    assert said.startswith(f"trainer.resume='{tmp_path}/run': its 2 steps were made with other")
    for part in ("algorithm.name=grpo (was elpo)", "trainer.seed=3 (was 0)", "trainer.fork=NEW"):
        assert part in said
    assert "\n" not in said and "tensorboard" not in said


@pytest.mark.parametrize(
    "word",
    ["algorithm.credit.lam=0.3", "task.max_turns=9", "learner.optimizer.lr=1e-3",
     "sampling.temperature=0.9", "cold_start.epochs=2", "schedule.staleness=1",
     "budget.scope=batch", "sandbox.wall_s=3", "model.max_context=800"],
)  # fmt: skip
def test_each_of_them_is_refused_alone(tmp_path: Path, word: str) -> None:
    made(tmp_path, 1)
    with pytest.raises(ValueError, match=r"trainer\.resume=.* now .* \(was .*\); .*trainer\.fork="):
        resumed(tmp_path, word)
    resumed(tmp_path, word, "trainer.fork=other")


def test_settings_of_where_it_runs_may_change_and_every_configuration_is_kept(
    tmp_path: Path,
) -> None:
    run = made(tmp_path, 1, 2)
    again = resumed(tmp_path, "trainer.steps=30", "cluster.rollout_workers=2")
    assert {str(one) for one in again.changes} == {
        "trainer.steps=30 (was 20)",
        "cluster.rollout_workers=2 (was 1)",
    }
    work(again, 3)
    same = resumed(tmp_path, "trainer.steps=30", "cluster.rollout_workers=2")
    assert same.changes == []
    kept = {path.name: yaml.safe_load(path.read_text()) for path in run.path.glob("configs/*")}
    assert {name: found["trainer"]["steps"] for name, found in kept.items()} == {
        "step_00001.yaml": 20,
        "step_00003.yaml": 30,
    }
    assert yaml.safe_load((run.path / "config.yaml").read_text())["trainer"]["steps"] == 30


def test_a_configuration_that_made_no_step_that_is_left_is_not_kept(tmp_path: Path) -> None:
    run = made(tmp_path, 1)
    resumed(tmp_path, "trainer.steps=30")
    resumed(tmp_path, "trainer.steps=40")
    kept = {p.name: yaml.safe_load(p.read_text())["trainer"]["steps"]
            for p in run.path.glob("configs/*")}  # fmt: skip
    assert kept == {"step_00001.yaml": 20, "step_00002.yaml": 40}


def test_a_run_of_an_older_version_keeps_the_configuration_that_it_had(tmp_path: Path) -> None:
    run = made(tmp_path, 1)
    (run.path / "configs" / "step_00001.yaml").unlink()
    resumed(tmp_path, "trainer.steps=30")
    assert sorted(p.name for p in run.path.glob("configs/*")) == [
        "step_00001.yaml",
        "step_00002.yaml",
    ]


def test_a_fork_goes_on_beside_the_old_run_which_stays_as_it_is(tmp_path: Path) -> None:
    run = made(tmp_path, 1, 2)
    with (run.path / "metrics.jsonl").open("a") as log:
        log.write('{"step": 3, "reward": 3.0}\n')  # after the checkpoint
    (run.path / "tokenizer.json").write_text("{}")
    before = {p: p.stat().st_mtime_ns for p in run.path.rglob("*") if p.is_file()}
    forked = resumed(tmp_path, "algorithm=grpo", "trainer.fork=grpo")
    assert forked.path == tmp_path / "grpo" and logged(forked) == [1, 2]
    newest = forked.newest_checkpoint()
    assert newest is not None and (newest / "learner").read_text() == "2"
    names = {path.name: yaml.safe_load(path.read_text())["algorithm"]["name"]
             for path in [*forked.path.glob("configs/*"), forked.path / "config.yaml"]}  # fmt: skip
    assert names == {"step_00001.yaml": "elpo", "step_00003.yaml": "grpo", "config.yaml": "grpo"}
    assert (forked.path / "tokenizer.json").exists()
    work(forked, 3)
    assert {p: p.stat().st_mtime_ns for p in run.path.rglob("*") if p.is_file()} == before
    settings = config(tmp_path, f"trainer.resume={forked.path}", "algorithm=grpo")
    assert RunFolder.of(settings).changes == []
    with pytest.raises(ValueError, match=r"trainer\.fork='grpo': .* holds a run already"):
        resumed(tmp_path, "trainer.fork=grpo")


def test_a_fork_may_have_the_name_of_a_start_that_failed(tmp_path: Path) -> None:
    failed = config(tmp_path, "trainer.run_name=other")
    left = RunFolder.of(failed)
    left.begin(failed)
    left.close()
    (left.path / "trackers.json").write_text("{}")
    made(tmp_path, 1)
    forked = resumed(tmp_path, "algorithm=grpo", "trainer.fork=other")
    assert logged(forked) == [1] and not (forked.path / "trackers.json").exists()


def test_weights_of_another_form_cannot_be_forked_either(tmp_path: Path) -> None:
    made(tmp_path, 1)
    for word in ("model.tiny.num_layers=9", "learner.lora.rank=8"):
        with pytest.raises(ValueError, match="its checkpoint was written with"):
            resumed(tmp_path, word, "trainer.fork=other")


def test_a_run_that_has_ended_is_known(tmp_path: Path) -> None:
    run = made(tmp_path, 19, 20)
    assert not run.finished(20)
    run.write_summary({})
    assert run.finished(20) and not run.finished(21)
    again = resumed(tmp_path, "trainer.steps=30")
    assert not (again.path / "summary.json").exists(), "it has not ended any more"


@pytest.mark.parametrize("left", ["nothing", "an evaluation", "a checkpoint of step 0"])
def test_the_folder_of_a_start_that_failed_is_used_again(tmp_path: Path, left: str) -> None:
    run = made(tmp_path)
    if left == "an evaluation":
        (run.path / "metrics.jsonl").write_text('{"step": 0, "eval/pass_at_1": 0.5}\n')
    if left == "a checkpoint of step 0":
        with run.checkpoint(RunState(step=0), 2) as folder:
            (folder / "learner").write_text("0")
    (run.path / "notes.txt").write_text("the user's")
    again = made(tmp_path, words=("trainer.seed=5",))
    assert again.path == run.path and again.newest_checkpoint() is None
    assert yaml.safe_load((run.path / "config.yaml").read_text())["trainer"]["seed"] == 5
    assert not (run.path / "metrics.jsonl").exists()
    assert (run.path / "notes.txt").read_text() == "the user's"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_steps_without_a_checkpoint_are_moved_aside(tmp_path: Path) -> None:
    run = made(tmp_path)
    (run.path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    again = made(tmp_path)
    assert not (again.path / "metrics.jsonl").exists()
    assert (tmp_path / "run.attempt1" / "metrics.jsonl").exists()


def test_a_run_with_a_checkpoint_is_never_taken(tmp_path: Path) -> None:
    made(tmp_path, 1)
    with pytest.raises(ValueError, match=r"holds a run already; .*trainer\.resume="):
        made(tmp_path)


def test_a_folder_that_no_run_began_is_left_alone(tmp_path: Path) -> None:
    """It has a config.yaml: a run of an older version, or a project of the user's."""
    (tmp_path / "run" / "trees").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("a: 1\n")
    with pytest.raises(ValueError, match="holds a run already"):
        made(tmp_path)
    assert (tmp_path / "run" / "trees").is_dir()


HOLD = """
import sys
from elpo_ray.runs.lock import FolderLock
from pathlib import Path
lock = FolderLock(Path(sys.argv[1]))
lock.take("key")
print("taken", flush=True)
sys.stdin.read()
"""


def test_a_folder_in_which_a_process_works_is_left_alone_until_it_ends(tmp_path: Path) -> None:
    made(tmp_path)
    other: Any = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert other.stdout.readline() == "taken\n"
        with pytest.raises(ValueError, match="holds a run already"):
            made(tmp_path)
        settings = config(tmp_path, "trainer.run_name=run")
        late = RunFolder(tmp_path / "run")
        resumed = replace(settings.trainer, resume=str(tmp_path / "run"))
        with pytest.raises(ValueError, match=rf"process {other.pid} is at work in"):
            late.begin(replace(settings, trainer=resumed))
    finally:
        other.kill()
        other.communicate()
    run = made(tmp_path, 1)
    assert logged(run) == [1]


def test_a_run_at_work_is_not_resumed_by_another_process(tmp_path: Path) -> None:
    made(tmp_path, 1)
    other: Any = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        other.stdout.readline()
        with pytest.raises(ValueError, match=r"trainer\.resume=.*is at work in .*wait until"):
            resumed(tmp_path)
    finally:
        other.kill()
        other.communicate()
    assert resumed(tmp_path).changes == []
