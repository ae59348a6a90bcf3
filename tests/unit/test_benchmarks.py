"""The command line of the benchmark for GPUs, on a machine that has none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu

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
