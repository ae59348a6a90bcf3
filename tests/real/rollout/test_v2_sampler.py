"""The entropies of vLLM's second model runner, which drives GPUs, in its own sampler on CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.real


def test_the_sampler_of_the_second_model_runner_returns_exact_entropies() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.real.rollout.v2_sampler"],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for found in json.loads(done.stdout.splitlines()[-1]).values():
        assert found["logp"] < 1e-4 and found["entropy"] < 1e-4, found
        assert found["alone_and_in_a_crowd"] and found["marked"] and found["greedy"], found
        assert found["different_tokens"] > 8, found
