"""The command line of the benchmark for GPUs, on a machine that has none."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu, learner

ROOT = Path(__file__).resolve().parents[2]


def typed(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "benchmarks/gpu.py", *words]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("words", [(), ("--seconds", "5"), ("engine",), ("share", "rollout")])
def test_without_a_gpu_it_ends_in_one_line(words: tuple[str, ...]) -> None:
    done = typed(*words)
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert "needs an NVIDIA GPU" in line and "--tiny" in line


def test_without_a_part_all_parts_are_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []
    parts = {name: lambda _, name=name: ran.append(name) or {} for name in gpu.PARTS}
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny"])
    monkeypatch.setenv("ELPO_GPU_TESTS", "")
    assert gpu.main() == 0
    assert ran == ["update", "engine", "share", "rollout"]
    assert capsys.readouterr().out.count('"part"') == 4


def test_the_help_and_a_wrong_part_name_the_parts() -> None:
    assert "update, engine, share, rollout; none = all" in typed("--help").stdout
    done = typed("updates")
    assert done.returncode == 2 and "updates: no such part; use one of update" in done.stderr


def test_the_learners_benchmark_runs_the_parts_that_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = {"speedup": 2.0, "share_of_predicted": 0.9}
    monkeypatch.setattr(learner, "alone", lambda work: {"peak_mb": 1.0})
    monkeypatch.setattr(learner, "compare", lambda case, *_: {"case": case.name, "chosen": run})

    def parts(only: str) -> tuple[bool, list[str]]:
        asked = argparse.Namespace(only=only, trees=None, rounds=1, seconds=1.0)
        report = learner.measured(asked, gpu=False)
        return "head_150k_vocabulary_8k_rows" in report, [c["case"] for c in report["updates"]]

    assert parts("divided") == (False, ["ELPO, divided"])
    assert parts("head") == (True, [])
    head, every = parts("")
    assert head and len(every) == 7
    assert '"part": "head"' in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--only x: no such part; use some of head, quickstart-"):
        parts("x")


def test_a_pass_that_dies_does_not_hang_the_learners_benchmark() -> None:
    with pytest.raises(EOFError):
        learner.alone(os._exit, 1)
