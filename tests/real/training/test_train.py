"""The smallest run of everything: main, Ray, vLLM, DeepSpeed, sandbox.

One run is looked at from all sides, which was interrupted, killed and resumed: see `Story`.
"""

import json
import re
import subprocess
import sys

import jsonschema
import pytest

from elpo_ray.dump import read_tree
from launch.monitoring.dashboard import grafana
from tests.real.runs import ROOT, Story, log_of, metrics

pytestmark = pytest.mark.real


def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(story: Story) -> None:
    assert story.interrupted_code == 130
    assert f"trainer.resume={story.folder}" in story.interrupted_said.replace("\n", "")
    assert story.checkpoints[-1] == f"step_{story.interrupted_after:05d}"


def test_a_run_that_was_interrupted_and_killed_loses_no_step(story: Story) -> None:
    assert 1 <= story.interrupted_after < story.killed_after < story.steps
    assert [row["step"] for row in metrics(story.folder)] == list(range(1, story.steps + 1))


def test_a_run_leaves_everything_it_promises(story: Story) -> None:
    summary = json.loads((story.folder / "summary.json").read_text())
    assert summary["experiment"] == "quickstart" and summary["algorithm"] == "elpo"
    steps = story.steps
    assert (summary["steps"], summary["inputs"]) == (steps, 2 * steps)
    assert summary["rollouts"] == 12 * steps
    assert summary["budget_per_input"] == 6 and summary["weight_version"] == steps
    for key in ("pass_at_1_before", "pass_at_1_after", "localization_accuracy", "wall_seconds"):
        assert key in summary
    assert {"grow", "update", "sync"} <= set(summary["seconds_by_phase"])
    assert (story.folder / "config.yaml").exists()
    assert (story.folder / "checkpoints" / f"step_{steps:05d}" / "state.json").exists()
    assert "pass@1 before" in story.said
    for row in metrics(story.folder):
        assert row["rollouts"] == 12 and row["tokens_generated"] > 0


def test_the_dashboard_asks_the_driver_for_what_it_reports(story: Story) -> None:
    text = json.dumps(grafana()) + (ROOT / "launch" / "monitoring" / "rules.yaml").read_text()
    names = set(re.findall(r"ray_elpo_(?!worker_|sandbox_|learner_)(\w+)(?!\w|\.)", text))
    keys = {key for row in log_of(story.folder) for key in row}
    assert names <= {re.sub(r"\W", "_", key) for key in keys}


def test_held_out_pass_at_1_is_logged_before_between_and_after(story: Story) -> None:
    rows = {row["step"]: row for row in log_of(story.folder) if "eval/pass_at_1" in row}
    assert {0, story.steps} <= rows.keys() and all(
        step % 5 == 0 for step in rows.keys() - {story.steps}
    )
    for row in rows.values():
        assert 0 <= row["eval/pass_at_1_low"] <= row["eval/pass_at_1"] <= row["eval/pass_at_1_high"]
        assert row["eval/problems"] == 8
    summary = json.loads((story.folder / "summary.json").read_text())
    assert summary["pass_at_1_before"] == rows[0]["eval/pass_at_1"]
    assert summary["pass_at_1_after"] == rows[story.steps]["eval/pass_at_1"]


def test_every_configuration_is_kept_with_its_first_step(story: Story) -> None:
    kept = sorted((story.folder / "configs").glob("step_*.yaml"))
    assert kept[0].name == "step_00001.yaml" and "steps: 40" in kept[0].read_text()
    assert f"steps: {story.steps}" in kept[-1].read_text()
    assert f"goes on with trainer.steps={story.steps} (was 40)" in story.said


def test_dumped_trees_fit_the_schema_and_the_budget(story: Story) -> None:
    schema = json.loads((ROOT / "docs" / "tree.schema.json").read_text())
    for step in range(1, story.steps + 1):
        lines = (story.folder / "trees" / f"step_{step:05d}.jsonl").read_text().splitlines()
        assert len(lines) == 2
        for line in lines:
            dump = json.loads(line)
            jsonschema.validate(dump, schema)
            tree = read_tree(dump)
            assert len(tree.leaves()) == tree.budget == 6
            assert sum(entry["charged"] for entry in tree.ledger) == 6
            versions = {node.get("weight_version") for node in dump["nodes"][1:]}
            assert versions == {step - 1}, "the trees of a step come from the weights before it"


def test_the_credit_command_reads_dumped_trees(story: Story) -> None:
    trees = story.folder / "trees" / "step_00001.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "elpo_ray.credit", str(trees), "--json"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert len(done.stdout.splitlines()) == 2
