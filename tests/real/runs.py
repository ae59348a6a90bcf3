"""Runs of the training command, as small as they can be: started, waited for, read."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from processes import ended, family

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "+experiment=quickstart",
    "task.countdown.numbers=3",
    "model.tiny.hidden_size=64",
    "model.tiny.intermediate_size=128",
    "model.tiny.num_layers=2",
    "model.tiny.num_heads=2",
    "model.tiny.num_kv_heads=2",
]
"""The quickstart on a model that learns nothing, and fast."""
SMALL = [
    *TINY,
    "task.countdown.demonstrations=192",
    "task.eval_problems=8",
    "algorithm.growth.n_total=6",
    "trainer.inputs_per_step=2",
    "learner.minibatch_inputs=1",
    "trainer.checkpoint_every=1",
    "trainer.background_checkpoints=true",
    "trainer.steps=2",
]


def command(name: str, *overrides: str, timeout: float = 420) -> subprocess.CompletedProcess[str]:
    """`python -m elpo_ray.NAME` with these keys, from start to end."""
    return subprocess.run(
        [sys.executable, "-m", f"elpo_ray.{name}", *overrides],
        capture_output=True, text=True, cwd=ROOT, timeout=timeout,
    )  # fmt: skip


def start(
    folder: Path, cache: Path, *overrides: str, settings: Sequence[str] = SMALL
) -> subprocess.Popen[str]:
    """A run of the training command in a process group of its own."""
    words = [*settings, f"trainer.run_dir={folder}", f"cold_start.cache={cache}", *overrides]
    return subprocess.Popen(
        [sys.executable, "-m", "elpo_ray.main", *words], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True,
    )  # fmt: skip


def train(folder: Path, cache: Path, *overrides: str) -> str:
    """A run that ends well; what it said on its standard output."""
    overrides = (f"trainer.run_dir={folder}", f"cold_start.cache={cache}", *overrides)
    done = command("main", *SMALL, *overrides)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def metrics(run: Path) -> list[dict[str, float]]:
    """The rows of a run's steps so far."""
    return [row for row in log_of(run) if row["step"] > 0]


def log_of(run: Path) -> list[dict[str, float]]:
    """All rows of a run's log so far; the last may still be being written."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_for_steps(run: Path, steps: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if (run / "metrics.jsonl").exists() and len(metrics(run)) >= steps:
            return
        time.sleep(0.2)
    raise AssertionError(f"no {steps} steps within 300 s")


@dataclass(frozen=True, kw_only=True)
class Story:
    """A run that Ctrl-C stopped, that kill -9 ended when it went on, and that came to its end."""

    folder: Path
    interrupted_code: int
    interrupted_said: str
    interrupted_after: int
    """Steps in its log then."""
    checkpoints: list[str]
    """Their names then."""
    killed_after: int
    """Steps in its log when all its processes were killed."""
    steps: int
    """In all."""
    said: str
    """Standard output of its last part."""


def tell(folder: Path, cache: Path) -> Story:
    """Make this run in `folder`: one cold start, which `cache` keeps, three starts, some steps."""
    run = folder / "elpo"
    process = start(folder, cache, "trainer.run_name=elpo", "trainer.steps=40")
    wait_for_steps(run, 1, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=240)
    assert process.returncode > 0, out[-3000:] + err[-3000:]
    interrupted_after = len(metrics(run))
    kept = sorted(path.parent.name for path in (run / "checkpoints").glob("step_*/state.json"))

    resumed = start(folder, cache, f"trainer.resume={run}", "trainer.steps=40")
    wait_for_steps(run, interrupted_after + 1, resumed)
    left = family(resumed.pid)
    os.killpg(resumed.pid, signal.SIGKILL)
    resumed.communicate(timeout=60)
    asyncio.run(ended(left, within_s=60))
    killed_after = len(metrics(run))

    steps = killed_after + 1
    said = train(folder, cache, f"trainer.resume={run}", f"trainer.steps={steps}")
    return Story(
        folder=run,
        interrupted_code=process.returncode,
        interrupted_said=out,
        interrupted_after=interrupted_after,
        checkpoints=kept,
        killed_after=killed_after,
        steps=steps,
        said=said,
    )
