"""A mixture of experts through a whole run, and what comes out of it: its export, loaded by
transformers and by vLLM, says what the run's engine said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from elpo_ray.chat.template import Chat
from elpo_ray.config import Config
from elpo_ray.config.model import TinyArchitecture
from elpo_ray.config.run import ClusterConfig
from elpo_ray.tools.catalog import schemas
from elpo_ray.types import Sampling
from tests.real.engines import exact, running
from tests.real.runs import command, metrics, train

pytestmark = pytest.mark.real

STEPS, CONTEXT = 2, 384
"""The run's steps, and its tokens of context."""
CONFIG = Config(cluster=ClusterConfig(gpus=False))
TOOLS = schemas(CONFIG.task, CONFIG.sandbox)
CHECKED = TinyArchitecture.qwen3_moe


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(each, marks=() if each is CHECKED else pytest.mark.long, id=each.value)
        for each in TinyArchitecture
    ],
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    train(
        folder,
        folder / "cache",
        "trainer.run_name=run",
        f"trainer.steps={STEPS}",
        "trainer.inputs_per_step=8",
        "learner.minibatch_inputs=4",
        "task.countdown.demonstrations=2560",  # it then solves some problems
        f"model.tiny.architecture={request.param.value}",
    )
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    """The weights after the first step, with which the second one's trees were grown."""
    done = command("export", str(run), str(run.parent / "out"), "step=1")
    assert done.returncode == 0, done.stderr
    return run.parent / "out"


def test_engine_and_learner_agree_in_a_run(run: Path) -> None:
    rows = metrics(run)
    assert [row["step"] for row in rows] == [1, 2]
    assert any(row["grad_norm"] > 0 for row in rows)
    for row in rows:
        assert abs(row["mismatch_k3"]) < 1e-6
        assert row["mismatch_ratio_max"] < 1 + 1e-3


def first_turns(run: Path, step: int) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """The messages of each tree of a step, with each turn that followed them at once."""
    lines = (run / "trees" / f"step_{step:05d}.jsonl").read_text().splitlines()
    trees = [json.loads(line) for line in lines]
    return [(t["messages"], node) for t in trees for node in t["nodes"] if node["parent"] == 0]


def check_turns(run: Path, step: int, folder: Path) -> None:
    """The turns of a step are those of the model in `folder`, prompts rendered by its template."""
    chat = Chat.from_folder(str(folder), TOOLS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    assert model.dtype == torch.float32
    turns = first_turns(run, step)[:16]
    assert len(turns) >= 4
    for messages, node in turns:
        assert node["weight_version"] == step - 1
        prompt = list(chat.prompt_ids(messages))
        logprobs, _ = exact(model, prompt, tuple(node["token_ids"]), 1.0)
        assert node["token_logprobs"] == pytest.approx(logprobs, abs=1e-4)


def test_an_export_says_what_the_run_said(run: Path, exported: Path) -> None:
    check_turns(run, 2, exported)


async def test_vllm_loads_an_export(run: Path, exported: Path) -> None:
    chat = Chat.from_folder(str(exported), TOOLS)
    model = AutoModelForCausalLM.from_pretrained(exported, dtype="auto").eval()
    prompt = list(chat.prompt_ids(first_turns(run, 2)[0][0]))
    async with running(exported, CONTEXT) as engine:
        turn = await engine.generate(prompt, Sampling(temperature=1.0, max_tokens=64, seed=0))
    logprobs, _ = exact(model, prompt, turn.token_ids, 1.0)
    assert turn.logprobs == pytest.approx(logprobs, abs=1e-4)
    assert AutoTokenizer.from_pretrained(exported).decode(turn.token_ids)
    assert f"| steps | 1 of {STEPS}, " in (exported / "README.md").read_text()


@pytest.mark.long
def test_a_run_begins_with_the_newest_weights_of_another(run: Path) -> None:
    train(
        run.parent,
        run.parent / "cache",
        "trainer.run_name=next",
        "trainer.steps=1",
        f"model.path={run}",
        "cold_start.enabled=false",
    )
    newest = run / "checkpoints" / "step_00002" / "model"
    check_turns(run.parent / "next", 1, newest)
