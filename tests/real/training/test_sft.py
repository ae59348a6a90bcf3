"""The cold start as a command: real learner, run and model folder; the evaluation finds them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.real
ROOT = Path(__file__).resolve().parents[3]
SMALL = [
    "+experiment=quickstart",
    "task.countdown.numbers=3",
    "task.countdown.demonstrations=96",
    "model.tiny.hidden_size=64",
    "model.tiny.intermediate_size=128",
    "model.tiny.num_layers=2",
    "model.tiny.num_heads=2",
    "model.tiny.num_kv_heads=2",
    "trainer.checkpoint_every=4",
    "trainer.run_name=sft",
    "logging.wandb=disabled",
]


def run(command: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"elpo_ray.{command}", *overrides],
        capture_output=True, text=True, cwd=ROOT, timeout=420,
    )  # fmt: skip


def test_a_cold_start_of_its_own_becomes_a_model(tmp_path: Path) -> None:
    done = run("sft", *SMALL, f"trainer.run_dir={tmp_path}", f"cold_start.cache={tmp_path}/cache")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = tmp_path / "sft"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [4, 6], "96 conversations in batches of 16"
    assert rows[1]["loss"] < rows[0]["loss"]
    assert {"model.safetensors", "tokenizer.json"} <= {f.name for f in (folder / "model").iterdir()}
    assert len(list((folder / "checkpoints").glob("step_*/state.json"))) == 2

    found = run("evaluate", f"model={folder}", "tasks=[countdown]", "n=4", "check_only=true")
    assert found.returncode == 0, found.stderr
    assert str(folder / "model") in found.stdout and "384 tokens of context" in found.stdout
