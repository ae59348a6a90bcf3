"""Every example trains for real: a step or two with a model that learns nothing, and fast."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import elpo_ray as elpo

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "examples"
SMALL: dict[str, Any] = {
    "model.tiny": {"hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "num_heads": 2,
                   "num_kv_heads": 2},
    "cold_start": {"epochs": 1, "batch_size": 8},
    "trainer": {"steps": 1, "inputs_per_step": 2},
    "learner.minibatch_inputs": 2,
    "algorithm.growth.n_total": 6,
    "task.eval_problems": 4,
    "task.eval_samples": 1,
    "logging": {"wandb": "disabled", "progress": False},
}  # fmt: skip


def words(settings: dict[str, Any], prefix: str = "") -> list[str]:
    """Settings as a command line has them."""
    found = []
    for key, value in settings.items():
        inner = isinstance(value, dict)
        found += words(value, f"{prefix}{key}.") if inner else [f"{prefix}{key}={value}"]
    return found


def train(example: str, cache: Path, folder: Path, **settings: Any) -> elpo.Run:
    places = {"cold_start.cache": str(cache), "trainer.run_dir": str(folder)}
    return elpo.train(EXAMPLES / example / "agent.yaml", **{**SMALL, **places, **settings})


def results(run: elpo.Run) -> Counter[str]:
    """How often each kind of result came back from a tool of the run's trees."""
    trees = [tree for trees in run.trees.values() for tree in trees]
    nodes = [node for tree in trees for node in tree.nodes]
    return Counter(node.extra["tool_kind"] for node in nodes if "tool_kind" in node.extra)


def test_the_shop_trains_from_any_folder(cache: Path, tmp_path: Path) -> None:
    """By the command, from a folder that has nothing to do with it."""
    places = [f"cold_start.cache={cache}", "trainer.run_name=shop"]
    done = subprocess.run(
        [sys.executable, "-m", "elpo_ray.cli", "train", str(EXAMPLES / "shop" / "agent.yaml"),
         *words(SMALL), *places],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = elpo.Run(tmp_path / "runs" / "shop")
    assert [row["step"] for row in run.metrics] == [1]
    assert run.summary["rollouts"] == 12
    assert json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[0])


def test_a_growth_rule_trains(cache: Path, tmp_path: Path) -> None:
    run = train("growth_rule", cache, tmp_path)
    assert run.metrics[0]["rollouts"] == 12
    assert (run.export(tmp_path / "model") / "config.json").is_file()


def test_a_credit_rule_trains(cache: Path, tmp_path: Path) -> None:
    run = train("credit_rule", cache, tmp_path)
    assert run.metrics[0]["rollouts"] == 12


@pytest.mark.parametrize(
    ("example", "package"),
    [("search_agent", "bm25s"), ("frozen_lake", "gymnasium"), ("mcp_server", "mcp")],
)
def test_ready_made_tools_train(example: str, package: str, cache: Path, tmp_path: Path) -> None:
    importlib.import_module(package)
    learned = {"epochs": 4, "batch_size": 8, "optimizer": {"lr": 6e-3}}
    run = train(example, cache, tmp_path, cold_start=learned)
    assert run.metrics[0]["rollouts"] == 12
    found = results(run)
    assert found["ok"] + found["error"] > 0, f"the tool was never reached: {found}"
