"""A run on one GPU, from nothing: steps, a kill, and the same run continued; and on two by NCCL."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.gpu.conftest import Tell
from tests.gpu.devices import ON_CPU
from tests.processes import family
from tests.real.runs import ROOT, SMALL, metrics

STEPS = 3 if ON_CPU else 10
KILLED_AFTER = 2 if ON_CPU else 5
TRIED = [*SMALL[1:], "cluster.gpus=false", "engine.max_num_seqs=16"] if ON_CPU else []
"""What makes a run small enough to be tried without a GPU."""
COMMON = ["cluster.dashboard=false", "logging.wandb=disabled", "trainer.eval_every=0"]
GPU_SIZES = ["task.eval_problems=50", "trainer.checkpoint_every=2"]


def begin(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    words = ["+experiment=quickstart", *COMMON, *(TRIED or GPU_SIZES)]
    words += [f"trainer.run_dir={folder}", f"cold_start.cache={folder / 'cache'}"]
    return subprocess.Popen(
        [sys.executable, "-m", "elpo_ray.main", *words, *overrides],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        start_new_session=True,
    )  # fmt: skip


def wait_for(run: Path, steps: int, process: subprocess.Popen[str], tell: Tell) -> None:
    seen, deadline = 0, time.monotonic() + 240
    while seen < steps and time.monotonic() < deadline:
        assert not process.poll(), process.communicate()[0][-4000:]
        rows = metrics(run) if (run / "metrics.jsonl").exists() else []
        for row in rows[seen:]:
            keys = ("step", "seconds/grow", "seconds/update", "seconds/sync", "mismatch_k3")
            tell(**{key: row[key] for key in keys if key in row})
        seen = len(rows)
        time.sleep(0.2)
    assert seen >= steps, f"{seen} steps in 240 s"


def kill(process: subprocess.Popen[str]) -> None:
    """The driver and all that it started, as a node that dies would."""
    members = family(process.pid)
    for pid in [process.pid, *members]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def check_rows(rows: list[dict[str, float]], steps: int) -> None:
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    for row in rows:
        assert math.isfinite(row["loss"]) and row["mismatch_k3"] < 0.02


def test_run_is_killed_and_continued(tmp_path: Path, tell: Tell) -> None:
    """The quickstart, engine and learner on one GPU; it goes on from its newest checkpoint."""
    first = begin(tmp_path, "cluster=gpu1", "trainer.run_name=one", f"trainer.steps={STEPS}")
    began = time.monotonic()
    wait_for(tmp_path / "one", KILLED_AFTER, first, tell)
    tell(killed_after_s=time.monotonic() - began)
    kill(first)
    again = begin(
        tmp_path, "cluster=gpu1", f"trainer.steps={STEPS}", f"trainer.resume={tmp_path / 'one'}"
    )
    output = again.communicate(timeout=300)[0]
    assert again.returncode == 0, output[-4000:]
    rows = metrics(tmp_path / "one")
    tell(steps=len(rows), whole_s=time.monotonic() - began)
    check_rows(rows, STEPS)


def test_run_renders_as_a_slurm_job(tell: Tell) -> None:
    """The same words as a job of one node; no node is needed for that."""
    done = subprocess.run(
        [sys.executable, "-m", "launch", "slurm", "nodes=1", "gpus_per_node=1", "--",
         "+experiment=quickstart", "cluster=gpu1"],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "#SBATCH" in done.stdout and "cluster=gpu1" in done.stdout
    tell(lines=len(done.stdout.splitlines()))


@pytest.mark.two_gpus
def test_nccl_between_two_gpus(tmp_path: Path, tell: Tell) -> None:
    """Needs two: an engine and a learner on a GPU each, weights by NCCL."""
    process = begin(tmp_path, "cluster=gpu2", "trainer.run_name=two", "trainer.steps=2")
    wait_for(tmp_path / "two", 2, process, tell)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output[-4000:]
    check_rows(metrics(tmp_path / "two"), 2)
