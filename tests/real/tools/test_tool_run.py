"""The smallest run with tools of a user's own: a function and an environment beside each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from elpo_ray.dump import read_line

pytestmark = pytest.mark.real
ROOT = Path(__file__).resolve().parents[3]
TOOLS = '''
import os


def price(item: str) -> int:
    """What an item costs.

    Args:
        item: one word
    """
    print("asked for a price")
    return {"tea": 3, "cake": 5}[item] + int(os.environ["PRICE_SECRET"] != "hush") \\
        + int("OTHER_SECRET" in os.environ)


class Cart:
    def reset(self, budget: int, **row) -> str:
        self.left = budget
        return f"budget: {budget}"

    def add(self, item: str, count: int = 1) -> str:
        """Put an item into the cart.

        Args:
            item: one word
            count: how many
        """
        self.left -= count * {"tea": 3, "cake": 5}[item]
        return f"left: {self.left}"

    def reward(self) -> bool:
        return self.left == 0
'''
AGENT = """
task:
  train_file: train.jsonl
  eval_file: eval.jsonl
  demonstrations_file: demonstrations.jsonl
  tools: ["till:price", "till:Cart"]
  env: [PRICE_SECRET]
  max_turns: 6
  eval_problems: 4
model: tiny
model.max_context: 512
model.tiny: {hidden_size: 64, intermediate_size: 128, num_layers: 2, num_heads: 2, num_kv_heads: 2}
cold_start: {enabled: true, epochs: 6, batch_size: 16, optimizer: {lr: 5.0e-3}}
algorithm.growth.n_total: 6
learner: {zero_stage: 1, minibatch_inputs: 2, optimizer: {lr: 1.5e-4, weight_decay: 0}}
trainer: {steps: 2, inputs_per_step: 4}
engine: {enforce_eager: true}
"""


def call(name: str, said: str, **arguments: object) -> list[dict[str, object]]:
    function = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return [
        {"role": "assistant", "content": "", "tool_calls": [function]},
        {"role": "tool", "content": said},
    ]


def demonstration(budget: int) -> dict[str, object]:
    messages: list[dict[str, object]] = [
        {"role": "user", "content": f"spend all\n\nbudget: {budget}"}
    ]
    messages += call("price", "3", item="tea")
    messages += call("add", f"left: {budget - 3}", item="tea", count=1)
    return {"messages": [*messages, {"role": "assistant", "content": "done"}]}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("till")
    (folder / "till.py").write_text(TOOLS)
    (folder / "agent.yaml").write_text(AGENT)
    rows = {
        "train": [{"prompt": "spend all", "budget": b} for b in (3, 5, 6, 8)],
        "eval": [{"prompt": "spend all of it", "budget": b} for b in (3, 5, 6, 8)],
        "demonstrations": [demonstration(b) for b in (3, 5, 6, 8) for _ in range(40)],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def elpo(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    variables = {"PYTHONPATH": str(ROOT), "OTHER_SECRET": "for nobody"} | variables
    return subprocess.run(
        [sys.executable, "-m", "elpo_ray.cli", *words],
        capture_output=True, text=True, timeout=500, cwd=folder, env={**os.environ, **variables},
    )  # fmt: skip


def test_a_run_with_a_function_and_an_environment(project: Path) -> None:
    words = ("train", "agent.yaml", "trainer.run_name=run")
    done = elpo(project, *words, PRICE_SECRET="hush")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = project / "runs" / "run"
    nodes, prompts = [], []
    for file in sorted((run / "trees").glob("*.jsonl")):
        for line in file.read_text().splitlines():
            tree = read_line(line)
            prompts.append(tree.messages[-1]["content"])
            nodes += tree.nodes
    assert all(prompt.startswith("spend all\n\nbudget: ") for prompt in prompts)
    seen = {(n.extra.get("tool"), n.extra.get("observation")) for n in nodes}
    assert ("price", "3") in seen, "the named variable is seen, and no other one"
    assert any(tool == "add" and str(said).startswith("left: ") for tool, said in seen)
    assert any('"count": 1' in node.extra.get("arguments", "") for node in nodes)
    scores = [node.score for node in nodes if node.score is not None]
    assert {score.reward for score in scores} <= {0.0, 1.0} and all(s.graded for s in scores)
    assert any(score.success for score in scores), "a budget of 3 is easily spent"
    for path in run.rglob("*"):
        if path.is_file():
            assert b"hush" not in path.read_bytes(), f"{path} holds the secret"


def test_what_is_wrong_is_said_in_one_line_before_anything_starts(project: Path) -> None:
    done = elpo(project, "train", "agent.yaml")
    assert done.returncode == 2 and "task.env=['PRICE_SECRET']: PRICE_SECRET not set" in done.stderr
    (project / "bare.jsonl").write_text('{"prompt": "spend"}\n')
    done = elpo(project, "train", "agent.yaml", "task.train_file=bare.jsonl", PRICE_SECRET="hush")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "reset wants budget, which problem train-0 does not have" in done.stderr
