"""The cold start as a command: real learner, run and model folder; the evaluation finds them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.real.runs import TINY, command

pytestmark = pytest.mark.real
SMALL = [
    *TINY,
    "task.countdown.demonstrations=96",
    "trainer.checkpoint_every=4",
    "trainer.run_name=sft",
    "logging.wandb=disabled",
]


def test_a_cold_start_of_its_own_becomes_a_model(tmp_path: Path) -> None:
    folders = (f"trainer.run_dir={tmp_path}", f"cold_start.cache={tmp_path}/cache")
    done = command("sft", *SMALL, *folders)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = tmp_path / "sft"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [4, 6], "96 conversations in batches of 16"
    assert rows[1]["loss"] < rows[0]["loss"]
    assert {"model.safetensors", "tokenizer.json"} <= {f.name for f in (folder / "model").iterdir()}
    assert len(list((folder / "checkpoints").glob("step_*/state.json"))) == 2

    found = command("evaluate", f"model={folder}", "tasks=[countdown]", "n=4", "check_only=true")
    assert found.returncode == 0, found.stderr
    assert str(folder / "model") in found.stdout and "384 tokens of context" in found.stdout
