"""The whole house at its smallest: main, Ray, vLLM, DeepSpeed, sandbox; interrupted and resumed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jsonschema
import pytest

from elpo_ray.dump import read_tree
from launch.monitoring.dashboard import grafana

pytestmark = pytest.mark.real
ROOT = Path(__file__).resolve().parents[3]
SMALL = [
    "+experiment=quickstart",
    "task.countdown.numbers=3",
    "task.countdown.demonstrations=192",
    "task.eval_problems=8",
    "model.tiny.hidden_size=64",
    "model.tiny.intermediate_size=128",
    "model.tiny.num_layers=2",
    "model.tiny.num_heads=2",
    "model.tiny.num_kv_heads=2",
    "algorithm.growth.n_total=6",
    "trainer.inputs_per_step=2",
    "learner.minibatch_inputs=1",
    "trainer.checkpoint_every=1",
    "trainer.background_checkpoints=true",
    "trainer.steps=2",
]


def command(
    folder: Path, cache: Path, *overrides: str, settings: Sequence[str] = SMALL
) -> list[str]:
    return [
        sys.executable, "-m", "elpo_ray.main", *settings, f"trainer.run_dir={folder}",
        f"cold_start.cache={cache}", *overrides,
    ]  # fmt: skip


def train(folder: Path, cache: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, cache, *overrides), capture_output=True, text=True, cwd=ROOT, timeout=420
    )


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    done = train(folder, cache, "trainer.run_name=elpo")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "pass@1 before" in done.stdout
    return folder / "elpo"


def test_a_run_leaves_everything_it_promises(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["experiment"] == "quickstart" and summary["algorithm"] == "elpo"
    assert (summary["steps"], summary["inputs"], summary["rollouts"]) == (2, 4, 24)
    assert summary["budget_per_input"] == 6 and summary["weight_version"] == 2
    for key in ("pass_at_1_before", "pass_at_1_after", "localization_accuracy", "wall_seconds"):
        assert key in summary
    assert {"grow", "update", "sync"} <= set(summary["seconds_by_phase"])
    assert (finished / "config.yaml").exists()
    assert (finished / "checkpoints" / "step_00002" / "state.json").exists()
    rows = metrics(finished)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["rollouts"] == 12 and row["tokens_generated"] > 0


def test_the_dashboard_asks_the_driver_for_what_it_reports(finished: Path) -> None:
    text = json.dumps(grafana()) + (ROOT / "launch" / "monitoring" / "rules.yaml").read_text()
    names = set(re.findall(r"ray_elpo_(?!worker_|sandbox_|learner_)(\w+)", text))
    assert names <= {re.sub(r"\W", "_", key) for key in metrics(finished)[0]}


def test_dumped_trees_fit_the_schema_and_the_budget(finished: Path) -> None:
    schema = json.loads((ROOT / "docs" / "tree.schema.json").read_text())
    for step in (1, 2):
        lines = (finished / "trees" / f"step_{step:05d}.jsonl").read_text().splitlines()
        assert len(lines) == 2
        for line in lines:
            dump = json.loads(line)
            jsonschema.validate(dump, schema)
            tree = read_tree(dump)
            assert len(tree.leaves()) == tree.budget == 6
            assert sum(entry["charged"] for entry in tree.ledger) == 6
            versions = {node.get("weight_version") for node in dump["nodes"][1:]}
            assert versions == {step - 1}, "the trees of a step come from the weights before it"


def test_the_credit_command_reads_dumped_trees(finished: Path) -> None:
    trees = finished / "trees" / "step_00001.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "elpo_ray.credit", str(trees)],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert len(done.stdout.splitlines()) == 2


def test_a_finished_run_can_be_continued_with_more_steps(finished: Path, cache: Path) -> None:
    done = train(finished.parent, cache, f"trainer.resume={finished}", "trainer.steps=3")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert [row["step"] for row in metrics(finished)] == [1, 2, 3]
    assert json.loads((finished / "summary.json").read_text())["rollouts"] == 36


def test_ctrl_c_writes_a_checkpoint_and_the_run_goes_on(tmp_path: Path, cache: Path) -> None:
    """Interrupted, then killed without warning, then resumed to the end: no step is lost."""
    run = tmp_path / "cut"
    overrides = ("trainer.run_name=cut", "trainer.steps=40", "algorithm=grpo")
    process = start(tmp_path, cache, *overrides)
    wait_for_steps(run, 1, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, out[-3000:] + err[-3000:]
    assert "trainer.resume=" in out
    before = len(metrics(run))

    process = start(tmp_path, cache, f"trainer.resume={run}", "trainer.steps=40", "algorithm=grpo")
    wait_for_steps(run, before + 1, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)

    done = train(
        tmp_path, cache, f"trainer.resume={run}", f"trainer.steps={before + 3}", "algorithm=grpo"
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert [row["step"] for row in metrics(run)] == list(range(1, before + 4))
    assert json.loads((run / "summary.json").read_text())["algorithm"] == "grpo"


def start(
    folder: Path, cache: Path, *overrides: str, settings: Sequence[str] = SMALL
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(folder, cache, *overrides, settings=settings), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True,
    )  # fmt: skip


def wait_for_steps(run: Path, steps: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if (run / "metrics.jsonl").exists() and len(metrics(run)) >= steps:
            return
        time.sleep(0.2)
    raise AssertionError(f"no {steps} steps within 300 s")
