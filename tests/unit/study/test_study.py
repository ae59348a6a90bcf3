"""Studies: what a file asks for, that no run is made twice, and what the report says."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from elpo_ray.config import CONF_DIR
from elpo_ray.study.__main__ import main
from elpo_ray.study.conduct import (
    Conductor,
    at_once,
    finished,
    result_of,
    sample_command,
    train_command,
)
from elpo_ray.study.figures import area, common_budget, difference, estimate, value_at
from elpo_ray.study.plan import Cell, Samples, Study
from elpo_ray.study.record import Point, Record, held_out
from elpo_ray.study.report import markdown, numbers

SMALL = {"experiment": "quickstart", "arms": ["grpo", "elpo"], "seeds": 2, "baseline": "grpo"}


def written(folder: Path, values: Any, name: str = "small.yaml") -> Path:
    path = folder / name
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values, sort_keys=False))
    return path


def study_of(folder: Path, **values: Any) -> Study:
    return Study.read(written(folder, SMALL | values))


# --- the file ---


def test_every_arm_meets_every_task_and_seed(tmp_path: Path) -> None:
    study = study_of(tmp_path, tasks={"easy": None, "hard": {"task.countdown.numbers": 4}})
    names = [cell.name for cell in study.cells]
    assert names[:4] == ["easy-grpo-0", "easy-elpo-0", "hard-grpo-0", "hard-elpo-0"]
    assert len(set(names)) == 8 and names[4:] == [name[:-1] + "1" for name in names[:4]]
    by_name = {cell.name: cell.config for cell in study.cells}
    assert by_name["hard-elpo-1"].task.countdown.numbers == 4
    assert by_name["hard-elpo-1"].trainer.seed == 1
    assert by_name["easy-grpo-0"].algorithm.name == "grpo"


def test_arms_are_algorithms_or_any_overrides(tmp_path: Path) -> None:
    arms = {"grpo": None, "low": {"algorithm": "elpo", "algorithm.credit.lam": 0.25, "seeds": [7]}}
    study = study_of(tmp_path, arms=arms, set={"trainer.steps": 3})
    assert [cell.name for cell in study.cells if cell.arm == "low"] == ["quickstart-low-7"]
    low = study.cells[1].config
    assert (low.algorithm.credit.lam, low.trainer.steps) == (0.25, 3)


def test_some_runs_can_be_chosen_by_name(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    assert [c.name for c in study.only(["*-elpo-*"]).cells] == [
        "quickstart-elpo-0", "quickstart-elpo-1"
    ]  # fmt: skip
    both = study.only(["quickstart-grpo-1", "*-0"])
    assert len(both.cells) == 3 and both.baseline == "grpo"
    with pytest.raises(ValueError, match=r"--only \*-gppo-\*: no run .* quickstart-grpo-0"):
        study.only(["*-0", "*-gppo-*"])


def test_a_grid_crosses_any_keys(tmp_path: Path) -> None:
    grid = {"learner.optimizer.lr": [1e-4, 2e-4], "algorithm.growth.max_tool_calls": [[], [4, 5]]}
    tasks = {"t": {"arms": ["elpo"], "seeds": 1}}
    study = study_of(tmp_path, grid=grid, tasks=tasks, baseline=None)
    found = {
        (c.config.learner.optimizer.lr, tuple(c.config.algorithm.growth.max_tool_calls))
        for c in study.cells
    }
    assert len(study.cells) == 4 and found == {
        (lr, calls) for lr in (1e-4, 2e-4) for calls in ((), (4, 5))
    }
    assert [cell.arm for cell in study.cells[:2]] == [
        "elpo,lr=0.0001,max_tool_calls=none",
        "elpo,lr=0.0001,max_tool_calls=4+5",
    ]


def test_a_study_may_begin_with_a_run_file(tmp_path: Path) -> None:
    written(tmp_path, {"task": "countdown", "model": "tiny", "cluster": "local"}, "mine.yaml")
    values = {"file": "mine.yaml", "arms": ["grpo"], "set": {"task.max_turns": 9}}
    study = Study.read(written(tmp_path, values))
    assert study.cells[0].name == "mine-grpo-0"
    assert study.cells[0].config.task.max_turns == 9


@pytest.mark.parametrize("path", sorted((CONF_DIR / "study").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_studies_of_the_project_are_sound(path: Path) -> None:
    study = Study.read(path)
    assert all(
        c.config.trainer.inputs_per_step // c.config.learner.minibatch_inputs == 8
        for c in study.cells
    ), "eight optimizer steps a batch"
    assert len({cell.name for cell in study.cells}) == len(study.cells)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"arm": ["grpo"]}, "arm: unknown key; did you mean arms?"),
        ({"zebra": 1}, "zebra: unknown key; use some of experiment, file"),
        ({"arms": None}, r"arms: name at least one algorithm, as in [grpo, elpo]"),
        ({"arms": []}, "arms: name at least one algorithm"),
        ({"arms": ["grpp"]}, "arms.grpp: no algorithm of that name, and no overrides; did you"),
        ({"arms": {"grpo": 3}}, "arms.grpo=3: give keys with values"),
        ({"arms": "grpo"}, "arms=grpo: give a list of names, or names with overrides"),
        ({"arms": ["a b"]}, "arms: 'a b' names files; use letters"),
        ({"arms": ["../grpo"]}, "arms: '../grpo' names files; use letters"),
        (
            {"arms": {"x": {"algorithm.credit.lamb": 1}}, "baseline": None},
            "arm x on quickstart: algorithm.credit.lamb=1: unknown key; did you mean algorithm",
        ),
        (
            {"arms": {"x": {"algorithm.credit.lam": 2}}, "baseline": None},
            "arm x on quickstart: algorithm.credit.lam=2.0: use a value in [0, 1]",
        ),
        ({"set": {"trainer.steps": 0}}, "arm grpo on quickstart: trainer.steps=0: use 1 or more"),
        ({"set": {"trainer.seed": 3}}, "set.trainer.seed: the study sets it; leave it out"),
        ({"set": {"trainer.resume": "runs/x"}}, "set.trainer.resume: the study sets it"),
        ({"set": ["a"]}, "set=['a']: give keys with values"),
        ({"grid": {"trainer.steps": 3}}, "grid.trainer.steps=3: give a list of values"),
        ({"grid": {"trainer.steps": []}}, "grid.trainer.steps=[]: give a list of values"),
        ({"tasks": {"t": {"arms": ["dapo"]}}}, "tasks.t.arms: no arm dapo; use some of grpo, elpo"),
        ({"tasks": {"t": {"arms": "grpo"}}}, "tasks.t.arms=grpo: give a list of arms"),
        ({"tasks": {"t": {"seeds": "x"}}}, "tasks.t.seeds=x: give how many, or a list"),
        ({"tasks": []}, "tasks=[]: give a list of names"),
        ({"seeds": 0}, "seeds=0: give how many, or a list of different whole numbers"),
        ({"seeds": [1, 1]}, "seeds=[1, 1]: give how many"),
        ({"seeds": [-1]}, "seeds=[-1]: give how many"),
        ({"seeds": True}, "seeds=True: give how many"),
        ({"seeds": 1.5}, "seeds=1.5: give how many"),
        ({"samples": 3}, "samples=3: give keys with values"),
        ({"samples": {"m": 3}}, "samples.m: unknown key"),
        ({"samples": {"n": 0}}, "samples.n=0: give a whole number above 0"),
        ({"samples": {"n": 4, "problems": 0}}, "samples.problems=0: give a whole number"),
        ({"samples": {"n": 4, "ks": [8]}}, "samples.ks=[8]: give a list of whole numbers from 1"),
        ({"baseline": "dapo"}, "baseline=dapo: no such arm; use one of grpo, elpo"),
        ({"experiment": "quick"}, "experiment=quick: no such option; choose one of"),
        ({"file": "x.yaml"}, "file: leave it out, or leave out experiment"),
        (
            {"arms": {"grpo": {"seeds": [5]}}, "tasks": {"t": {"seeds": [1]}}},
            "seeds: no arm has a seed in common",
        ),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], values: dict[str, Any], message: str
) -> None:
    path = written(tmp_path, SMALL | values)
    assert main([str(path), "list"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said
    assert f"elpo_ray.study: {path}: " in said and message in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arms: [grpo\n", "line 2: not YAML"),
        ("- grpo\n", "not keys with values"),
        ("\xff\xfe", "cannot be read"),
        ("", "arms: name at least one algorithm"),
    ],
)
def test_a_file_that_is_no_study_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(text.encode("latin-1"))
    assert main([str(path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said
    assert main([str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: no such file" in capsys.readouterr().err


# --- the runs ---

RUN = """
import json, pathlib, sys, time
folder, seed, fails, seconds = pathlib.Path(sys.argv[1]), *map(float, sys.argv[2:])
folder.mkdir(parents=True, exist_ok=True)
with (folder.parent / "calls").open("a") as calls:
    calls.write(f"{folder.name} {time.time()}\\n")
tries = folder / "tries"
tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
print("working")
time.sleep(seconds)
if len(tries.read_text()) <= fails:
    sys.exit("broken")
rows = [{"step": i, "rollouts": 4, "total/leaves": 4 * i, "total/tokens_generated": 100 * i,
         "total/train_seconds": 2.0 * i, "turns_per_rollout": 3.5} for i in (1, 2)]
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
(folder / "summary.json").write_text(json.dumps(
    {"pass_at_1_before": 0.4, "pass_at_1_after": 0.5 + seed / 10, "localization_accuracy": None}))
"""


def acted(fails: dict[str, int] | None = None, seconds: float = 0.0) -> Any:
    """Runs that are over at once; those named fail so often."""

    def command(cell: Cell, folder: Path) -> list[str]:
        count = (fails or {}).get(cell.name, 0)
        return [sys.executable, "-c", RUN, str(folder), str(cell.seed), str(count), str(seconds)]

    return command


def conduct(study: Study, folder: Path, jobs: int = 2, **acting: Any) -> Conductor:
    conductor = Conductor(study, folder / "runs", folder / "results", jobs, acted(**acting))
    conductor.run(lambda: None)
    return conductor


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elpo_ray.study.conduct.POLL_S", 0.05)


def calls(folder: Path) -> list[str]:
    text = (folder / "runs" / "small" / "calls").read_text()
    return [line.split()[0] for line in text.splitlines()]


def test_a_finished_run_is_never_made_again(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    done = conduct(study, tmp_path)
    assert {one.state for one in done.progress} == {"done"}
    assert sorted(calls(tmp_path)) == sorted(cell.name for cell in study.cells)
    shutil.rmtree(tmp_path / "runs")
    result_of(tmp_path / "results", study, study.cells[1]).unlink()
    conduct(study, tmp_path)
    assert calls(tmp_path) == [study.cells[1].name]


def test_a_record_says_what_made_it(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    conduct(study, tmp_path)
    cell = study.cells[0]
    record = finished(cell, result_of(tmp_path / "results", study, cell))
    assert record is not None and record.digest == cell.digest
    assert record.settings["learner.minibatch_inputs"] == 8
    assert "algorithm=grpo" in record.command and record.machine["cores"] == os.cpu_count()
    assert [point.pass_at_1 for point in record.held_out] == [0.4, 0.5]
    assert record.held_out[1].tokens == 200 and record.metrics["rollouts"] == [4, 4]


def test_other_settings_are_not_taken_for_the_same_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conduct(study_of(tmp_path), tmp_path)
    path = written(tmp_path, SMALL | {"set": {"trainer.steps": 7}})
    where = ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    for what in ("run", "list", "report"):
        assert main([str(path), what, *where]) == 2
        said = capsys.readouterr().err
        assert "made with trainer.steps=20, not 7; remove it" in said and said.count("\n") == 1
    same = written(
        tmp_path, SMALL | {"set": {"logging.progress": False, "trainer.keep_checkpoints": 9}}
    )
    assert main([str(same), "list", *where]) == 0


def test_a_run_that_fails_is_tried_again_and_then_left_behind(tmp_path: Path) -> None:
    study = study_of(tmp_path, seeds=1)
    one, two = (cell.name for cell in study.cells)
    done = conduct(study, tmp_path, fails={one: 2, two: 99})
    states = {each.cell.name: (each.state, each.tries, each.note) for each in done.progress}
    assert states == {one: ("done", 3, ""), two: ("failed", 3, "exit code 1: broken")}
    assert [cell.name for cell in study.cells
            if finished(cell, result_of(tmp_path / "results", study, cell))] == [one]  # fmt: skip


def test_several_run_at_once_but_no_cold_start_is_made_twice(tmp_path: Path) -> None:
    study = study_of(tmp_path, seeds=2)
    conduct(study, tmp_path, jobs=4, seconds=1.5)
    begun = (tmp_path / "runs" / "small" / "calls").read_text().split()
    at = dict(zip(begun[::2], map(float, begun[1::2]), strict=True))
    first, second = ([at[f"quickstart-{arm}-{s}"] for s in (0, 1)] for arm in ("grpo", "elpo"))
    assert abs(first[0] - first[1]) < 1.5, "two seeds at once"
    assert all(b - a > 1.4 for a, b in zip(first, second, strict=True)), "a seed's arms in turn"


def test_ctrl_c_reaches_the_runs_under_way_and_waits_for_them(tmp_path: Path) -> None:
    study = study_of(tmp_path, seeds=1)
    script = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
# Where tests run in the background it is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    folder.mkdir(parents=True)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.3)
    (folder / "checkpoint").touch()
"""

    def command(cell: Cell, folder: Path) -> list[str]:
        return [sys.executable, "-c", script, str(folder)]

    conductor = Conductor(study, tmp_path / "runs", tmp_path / "results", 1, command)
    folder = conductor.progress[0].folder

    def interrupt() -> None:
        if folder.exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conductor.run(interrupt)
    assert (folder / "checkpoint").exists()
    assert not conductor.progress[0].result.exists()


def test_a_half_run_goes_on_and_one_without_a_checkpoint_begins_anew(tmp_path: Path) -> None:
    study = study_of(tmp_path, grid={"trainer.steps": [3, 4]}, baseline=None)
    cell, folder = study.cells[0], tmp_path / "runs" / "a,b=1"
    new = train_command(cell, folder)
    assert f'trainer.run_name="{folder.name}"' in new and "trainer.seed=0" in new
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    assert train_command(cell, folder) == new and not folder.exists()
    checkpoint = folder / "checkpoints" / "step_00005"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    assert f'trainer.resume="{folder}"' in train_command(cell, folder) and folder.exists()


def test_a_command_line_is_what_was_checked(tmp_path: Path) -> None:
    """The words of a cell, as `elpo train` reads them, give the cell's configuration."""
    grid = {"algorithm.growth.max_tool_calls": [[4, 5]], "task.reward.format_penalty": [0.5]}
    study = study_of(tmp_path, grid=grid, seeds=[3], baseline=None)
    words = train_command(study.cells[0], tmp_path / "x")[3:]
    done = subprocess.run(
        [sys.executable, "-m", "elpo_ray.main", *words, "--cfg", "job"],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    shown = yaml.safe_load(done.stdout)
    assert shown["algorithm"]["growth"]["max_tool_calls"] == [4, 5]
    assert (shown["trainer"]["seed"], shown["task"]["reward"]["format_penalty"]) == (3, 0.5)


def test_every_run_has_a_log_of_its_own(tmp_path: Path) -> None:
    grid = {"learner.optimizer.lr": [1.5e-4, 1.5, 1.6e-4]}
    study = study_of(tmp_path, arms=["grpo"], baseline=None, grid=grid, seeds=1)
    conductor = Conductor(study, tmp_path, tmp_path)
    assert len({one.log for one in conductor.progress}) == 3
    for one in conductor.progress:
        assert one.log.name == f"{one.folder.name}.log"


def test_at_least_one_run_fits(tmp_path: Path) -> None:
    config = study_of(tmp_path).cells[0].config
    assert at_once(config) >= 1
    assert at_once(replace(config, cluster=replace(config.cluster, sandbox_actors=10_000))) == 1


# --- the figures ---


def test_intervals_are_those_of_the_t_tests() -> None:
    from scipy import stats

    draw = random.Random(1)
    ones = {seed: draw.random() for seed in range(6)}
    others = {seed: draw.random() for seed in range(1, 8)}
    shared = sorted(ones.keys() & others.keys())
    found = difference(ones, others)
    paired = stats.ttest_rel([ones[s] for s in shared], [others[s] for s in shared])
    low, high = paired.confidence_interval(0.95)
    assert found is not None and found.count == 5 and found.half is not None
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert estimate([]) is None
    alone = estimate([0.5])
    assert alone is not None and (alone.mean, alone.half) == (0.5, None)


def test_areas_are_those_of_the_straight_lines() -> None:
    points = [(0.0, 0.4), (10.0, 0.5), (30.0, 0.9)]
    for until in (3.0, 10.0, 17.0, 30.0):
        grid = np.linspace(0, until, 20_001)
        values = np.interp(grid, *zip(*points, strict=True))
        assert area(points, until) == pytest.approx(float(values.mean()), abs=1e-4)
        assert value_at(points, until) == pytest.approx(float(values[-1]))
    assert area(points, 31.0) is None and value_at(points, 31.0) is None
    assert common_budget([points, points[:2]]) == 10.0
    assert common_budget([]) is None


def test_held_out_values_are_read_from_the_log_or_the_summary() -> None:
    steps = [{"step": i, "rollouts": 1, "total/leaves": 10.0 * i} for i in (1, 2)]
    summary = {"pass_at_1_before": 0.1, "pass_at_1_after": 0.3}
    assert [(p.step, p.pass_at_1, p.leaves) for p in held_out(steps, summary)] == [
        (0, 0.1, 0.0), (2, 0.3, 20.0),
    ]  # fmt: skip
    rows = [{"step": 0, "eval/pass_at_1": 0.2}, *steps,
            {"step": 1, "eval/pass_at_1": 0.25, "total/leaves": 10.0}]  # fmt: skip
    assert [(p.step, p.pass_at_1, p.leaves) for p in held_out(rows, summary)] == [
        (0, 0.2, 0.0), (1, 0.25, 10.0), (2, 0.3, 20.0),
    ]  # fmt: skip


def test_what_is_sampled_is_what_the_command_reads(tmp_path: Path) -> None:
    """`elpo evaluate` understands the command line, up to the model, which is not there."""
    study = study_of(tmp_path, samples={"n": 8, "problems": 5}, set={"task.countdown.numbers": 4})
    assert study.samples == Samples(8, (4,), 5)
    folder = tmp_path / "run"
    folder.mkdir()
    words = sample_command(study.cells[0], folder, tmp_path / "out", study.samples)
    root = Path(__file__).parents[3]
    done = subprocess.run([*words, "check_only=true"], capture_output=True, text=True, cwd=root)
    assert done.returncode == 2 and "no config.json" in done.stderr and done.stderr.count("\n") == 1
    written = yaml.safe_load((folder / "quickstart.yaml").read_text())
    assert written["task"]["countdown"]["numbers"] == 4


def test_a_trained_model_is_sampled_before_the_record_is_written(tmp_path: Path) -> None:
    study = study_of(tmp_path, samples={"n": 8}, seeds=1)
    script = "import json, pathlib, sys; out = pathlib.Path(sys.argv[1]); out.mkdir(); "
    script += "(out / 'summary.json').write_text(json.dumps({'t': {'pass_at_k': {'4': 0.5}}}))"

    def sampler(cell: Cell, folder: Path, out: Path, samples: Samples) -> list[str]:
        assert (folder / "summary.json").exists(), "it is trained"
        return [sys.executable, "-c", script, str(out)]

    conductor = Conductor(study, tmp_path / "runs", tmp_path / "results", 2, acted(), sampler)
    conductor.run(lambda: None)
    for cell in study.cells:
        record = finished(cell, result_of(tmp_path / "results", study, cell))
        assert record is not None and record.samples == {"pass_at_k": {"4": 0.5}}
    assert len(calls(tmp_path)) == 2, "each is trained once"


# --- the report ---


def record_of(study: Study, cell: Cell, after: float, tokens: float) -> Record:
    points = [Point(0, 0.4, 0, 0, 0), Point(2, after, 8, tokens, 4)]
    return Record(
        study=study.name, task=cell.task, arm=cell.arm, seed=cell.seed, digest=cell.digest,
        settings={}, command=[], commit="", machine={},
        summary={"pass_at_1_before": 0.4, "pass_at_1_after": after, "localization_accuracy": 0.9},
        held_out=points, metrics={"turns_per_rollout": [4.0, 5.0]},
    )  # fmt: skip


def test_the_report_compares_at_equal_leaves_and_at_equal_tokens(tmp_path: Path) -> None:
    """elpo ends 10 points ahead, but with twice the tokens: at equal tokens it is 5 points behind
    what it ends with."""
    study = study_of(tmp_path, seeds=3)
    spread = [-0.02, 0.0, 0.02]
    records = [
        record_of(study, cell, (0.5 if cell.arm == "grpo" else 0.6) + spread[cell.seed],
                  100 if cell.arm == "grpo" else 200)
        for cell in study.cells
    ]  # fmt: skip
    found = numbers(study, records)["tasks"]["quickstart"]
    elpo = found["arms"]["elpo"]
    assert elpo["after"]["mean"] == pytest.approx(0.6)
    assert elpo["after"]["half"] == pytest.approx(4.303 * 0.02 / 3**0.5, rel=1e-3)
    assert elpo["less_baseline"]["after"]["mean"] == pytest.approx(0.1)
    assert elpo["less_baseline"]["after"]["half"] == pytest.approx(0.0, abs=1e-9)
    assert found["common_budgets"]["tokens"] == 100
    assert elpo["at_tokens"]["mean"] == pytest.approx(0.5)
    assert elpo["less_baseline"]["at_tokens"]["mean"] == pytest.approx(0.0)
    assert elpo["area_leaves"]["mean"] == pytest.approx(0.5)
    text = markdown(numbers(study, records), ["quickstart-elpo-9"])
    assert "| elpo | 3 | 40.0 ± 0.0 | 60.0 ± 5.0 | +10.0 ± 0.0 |" in text
    assert "Not finished: quickstart-elpo-9." in text and "90.0 ± 0.0 | 3.50 |" in text


def test_an_arm_that_spends_little_does_not_cut_short_the_comparison_of_others(
    tmp_path: Path,
) -> None:
    """At the 10 tokens of the frugal arm, grpo and elpo are alike; at the 100 that these two
    reached, they are not."""
    study = study_of(tmp_path, arms=["grpo", "elpo", "elpo_no_bel"])
    after = {"grpo": 0.5, "elpo": 0.6, "elpo_no_bel": 0.4}
    tokens = {"grpo": 100, "elpo": 100, "elpo_no_bel": 10}
    records = [record_of(study, cell, after[cell.arm], tokens[cell.arm]) for cell in study.cells]
    found = numbers(study, records)["tasks"]["quickstart"]
    assert found["common_budgets"]["tokens"] == 10
    apart = {arm: row["less_baseline"] for arm, row in found["arms"].items()}
    assert apart["elpo"]["at_tokens"]["mean"] == pytest.approx(0.1)
    assert apart["elpo_no_bel"]["at_tokens"]["mean"] == pytest.approx(0.4 - 0.41)


def test_the_report_has_pass_at_k_where_models_were_sampled(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    records = [
        replace(
            record_of(study, cell, 0.5, 100),
            samples={"pass_at_k": {"4": 0.5 + cell.seed / 10, "16": 0.9}, "major_at_k": None},
        )
        for cell in study.cells
    ]
    text = markdown(numbers(study, records), [])
    assert "| arm | Pass@4 | Pass@16 |" in text and "| grpo | 55.0 ± 63.5 | 90.0 ± 0.0 |" in text
    assert "Major" not in markdown(numbers(study, records[:1]), [])


def test_the_command_writes_text_numbers_and_curves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = study_of(tmp_path)
    where = ["--results", str(tmp_path / "results"), "--out", str(tmp_path / "out")]
    path = str(tmp_path / "small.yaml")
    assert main([path, "report", *where]) == 2
    assert "no finished run of this study" in capsys.readouterr().err
    conduct(study, tmp_path)
    result_of(tmp_path / "results", study, study.cells[3]).unlink()
    assert main([path, "report", *where]) == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "report.md", "report.json", "quickstart.svg",
    }  # fmt: skip
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["missing"] == ["quickstart-elpo-1"]
    assert found["tasks"]["quickstart"]["arms"]["grpo"]["seeds"] == [0, 1]
    picture = (tmp_path / "out" / "quickstart.svg").read_bytes()
    assert main([path, "report", *where]) == 0
    assert (tmp_path / "out" / "quickstart.svg").read_bytes() == picture


def test_a_damaged_record_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = study_of(tmp_path)
    result = result_of(tmp_path / "results", study, study.cells[0])
    result.parent.mkdir(parents=True)
    for text in ("{", "[]", "{}", '{"held_out": [{}]}'):
        result.write_text(text)
        path = str(tmp_path / "small.yaml")
        assert main([path, "list", "--results", str(tmp_path / "results")]) == 2
        said = capsys.readouterr().err
        assert "no record of a run" in said and said.count("\n") == 1
