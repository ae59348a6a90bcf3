"""Evaluation end to end: tiny model, Ray, vLLM and sandbox on problems of AIME's form; a server on
the loopback in the place of the engine; a checkpoint of every kind of sharding as the model."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import Server, server_says, tool_call
from safetensors.torch import load_file

from elpo_ray.config import Config
from elpo_ray.config.compose import measured_tasks
from elpo_ray.config.learner import ColdStartConfig, LearnerConfig, OptimizerConfig
from elpo_ray.config.measure import AnalyzeConfig, EvaluateConfig, Split
from elpo_ray.config.model import ModelConfig, Precision, TinyModelConfig
from elpo_ray.config.run import ClusterConfig
from elpo_ray.config.task import CountdownConfig, TaskConfig
from elpo_ray.evaluation.bench import Bench
from elpo_ray.learner.backend import LearnerSettings, RankProcess
from elpo_ray.learner.export import convert_checkpoint
from elpo_ray.learner.loss import Objective
from elpo_ray.learner.rank import LearnerRank
from elpo_ray.models.base import base_model
from elpo_ray.tasks import make_task
from tests.real.ranks import one_row, run_ranks
from tests.real.runs import ROOT, command

pytestmark = pytest.mark.real
PROBLEMS = [("What is 3 + 4?", "7"), ("What is 6 * 7?", "42"), ("What is 10 - 9?", "1")]
SMALL = ["tasks=[aime24]", "n=4", "ks=[2,4]", "+task.max_turns=3", "+task.max_turn_tokens=24",
         "problems=3", "engine.enforce_eager=true", "sampling.top_p=1.0"]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [{"id": i, "problem": p, "answer": a} for i, (p, a) in enumerate(PROBLEMS)]
    (folder / "aime24.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained tiny model, with tokenizer and template."""
    cache = str(tmp_path_factory.mktemp("cache"))
    config = Config(
        model=ModelConfig(
            max_context=600,
            tiny=TinyModelConfig(hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2),
        ),
        task=TaskConfig(countdown=CountdownConfig(demonstrations=100), max_turn_tokens=64),
        cold_start=ColdStartConfig(cache=cache),
    )
    return base_model(config, make_task(config.task, 0))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_folder_is_evaluated_and_an_interrupted_evaluation_completed(
    model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    call = [f"model={model}", f"data_dir={data}", f"out={out}", "max_context=600", *SMALL]
    done = command("evaluate", *call)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    samples = out / "aime24" / "samples.jsonl"
    first = lines(samples)
    assert len({(row["problem"], row["index"]) for row in first}) == len(first) == 12
    assert len({json.dumps(row["transcript"]) for row in first}) > 3, "seeds differ"
    numbers = json.loads((out / "summary.json").read_text())["aime24"]
    assert (numbers["problems"], numbers["samples"], numbers["missing"]) == (3, 12, 0)
    assert set(numbers["pass_at_k"]) == {"2", "4"}
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["identity"]["model"]["chat_template"] and manifest["sessions"][0]["versions"]
    assert (out / "report.html").exists() and (out / "report.png").exists()
    assert len(lines(out / "aime24" / "problems.jsonl")) == 3

    kept = samples.read_text().splitlines(keepends=True)[:7]
    samples.write_text("".join(kept) + '{"problem": "cut o')
    done = command("evaluate", *call)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    again = lines(samples)
    assert again[:7] == first[:7] and len(again) == 12
    same = {(r["problem"], r["index"]): r["transcript"] for r in first}
    assert all(same[r["problem"], r["index"]] == r["transcript"] for r in again), "fixed seeds"

    done = command("evaluate", *call, "sampling.temperature=0.5")
    assert done.returncode == 2 and "sampler.temperature=1.0, not 0.5" in done.stderr


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


def test_a_server_is_evaluated_through_the_same_stack(
    server: Server, data: Path, tmp_path: Path
) -> None:
    one = [
        server_says(None, tool_call("print(6 * 7)"), tokens=9),
        server_says(r"It is \boxed{42}.", tokens=6),
    ]
    server.script = one * 3
    out = tmp_path / "out"
    done = command(
        "evaluate", f"model={server.url}", f"data_dir={data}", f"out={out}", "tasks=[aime24]",
        "problems=3", "n=1", "ks=[]", "engine.max_num_seqs=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = lines(out / "aime24" / "samples.jsonl")
    assert [(row["answer"], row["success"]) for row in rows] == [
        ("42", False), ("42", True), ("42", False)
    ]  # fmt: skip
    assert rows[0]["transcript"][0]["observation"].strip() == "42", "run in the sandbox"
    assert rows[0]["tokens"] == 15 and rows[0]["tool_kinds"] == {"ok": 1}
    assert server.asked[1]["messages"][-1]["role"] == "tool"


def test_ctrl_c_says_what_is_kept_and_the_same_command_goes_on(
    server: Server, data: Path, tmp_path: Path
) -> None:
    server.script = [server_says(r"It is \boxed{42}.", tokens=6)] * 300
    server.delay_s = 0.2
    out = tmp_path / "out"
    words = [
        f"model={server.url}", f"data_dir={data}", f"out={out}", "tasks=[aime24]", "problems=3",
        "n=20", "ks=[]", "engine.max_num_seqs=1", "cluster=local",
    ]  # fmt: skip
    running = subprocess.Popen(
        [sys.executable, "-m", "elpo_ray.evaluate", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    samples = out / "aime24" / "samples.jsonl"
    deadline = time.monotonic() + 180
    while not samples.exists() or samples.read_text().count("\n") < 3:
        assert running.poll() is None and time.monotonic() < deadline, running.communicate()
        time.sleep(0.1)
    second = command("evaluate", *words)  # while the first is at work
    assert second.returncode == 2 and f"process {running.pid} is at work" in second.stderr
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does
    _, err = running.communicate(timeout=60)
    kept = len(lines(samples))
    assert running.returncode == 130 and err.count("\n") == 1, err
    assert f"interrupted: {kept} of 60 samples are kept in {out}; run the same command" in err
    server.delay_s = 0.0
    done = command("evaluate", *words)
    assert done.returncode == 0, done.stderr
    assert len(lines(samples)) == 60


def test_mistakes_are_told_before_anything_starts(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elpo_ray.evaluation.bench.gpus_here", lambda: 8)
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    (bare / "chat_template.jinja").unlink()
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    for named, said in (
        ({"model": str(bare)}, "no chat template"),
        ({"max_context": 16}, "tokens of prompt"),
        ({"data_dir": str(tmp_path / "nowhere")}, "data_dir="),
        ({"tasks": ["nope"]}, "nope: use some of"),
        ({"task": {"max_turn": 3}}, "task.max_turn: unknown key"),
    ):
        asked = {"model": str(model), "tasks": ["aime24"], "data_dir": str(data)} | named
        config = EvaluateConfig(**asked)
        with pytest.raises(ValueError, match=re.escape(said)):
            Bench.prepare(config, measured_tasks(config))


def test_an_analysis_may_take_training_problems(model: Path) -> None:
    held_out, trained = (
        AnalyzeConfig(
            model=str(model),
            tasks=["countdown"],
            max_context=600,
            problems=3,
            split=split,
            cluster=ClusterConfig(gpus=False),
        )
        for split in Split
    )
    ids = [
        [problem.id for problem in Bench.prepare(each, measured_tasks(each)).problems["countdown"]]
        for each in (held_out, trained)
    ]
    assert ids == [[f"eval-{i}" for i in range(3)], [f"train-{i}" for i in range(3)]]


def test_localization_is_analyzed_on_countdown(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    call = [
        f"model={model}", f"out={out}", "tasks=[countdown]", "max_context=600", "problems=2",
        "rollouts=4", "failures=1", "xs=[1,2]", "repeats=2", "engine.enforce_eager=true",
    ]  # fmt: skip
    done = command("analyze", "analysis=localization", *call)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert [row["problem"] for row in lines(out / "countdown" / "samples.jsonl")]
    assert (out / "report.html").exists() and (out / "summary.json").exists()
    again = command("analyze", "analysis=localization", *call)
    assert again.returncode == 0, "nothing is missing: no engine starts"


def save_and_export(process: RankProcess, model: Path, folder: Path, stage: int) -> None:
    """One step, which one DeepSpeed rank writes as a checkpoint and as a model."""
    learner = LearnerConfig(zero_stage=stage, optimizer=OptimizerConfig(lr=1e-2))
    settings = LearnerSettings(model=ModelConfig(precision=Precision.fp32), learner=learner)
    rank = LearnerRank(model, settings, process, total_steps=1)
    list(rank.update(one_row(), Objective.nll))
    rank.save(folder / "checkpoint")
    rank.export(folder / "exported")


@pytest.mark.parametrize("stage", [1, 3])
def test_a_checkpoint_becomes_a_model_folder(model: Path, tmp_path: Path, stage: int) -> None:
    """It is put together without DeepSpeed."""
    run_ranks(save_and_export, 1, tmp_path / "work", model, tmp_path, stage)
    target = tmp_path / "model"
    target.mkdir()
    convert_checkpoint(tmp_path / "checkpoint", model, target)
    want = load_file(tmp_path / "exported" / "model.safetensors")
    have = load_file(target / "model.safetensors")
    assert want.keys() == have.keys()
    assert all(torch.equal(want[name], have[name]) for name in want)
    before = load_file(model / "model.safetensors")
    assert any(not torch.equal(before[name], have[name]) for name in have), "it was trained"
    assert (target / "tokenizer.json").exists() and (target / "chat_template.jinja").exists()
