"""A wheel in an environment of its own trains from an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from wheels import build

from tests.real.runs import SMALL

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has this package from the wheel, and what it depends on
    from this interpreter."""
    folder = tmp_path_factory.mktemp("wheel")
    home = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    python = home / "bin" / "python"
    places = home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    (places / "site-packages" / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(build(folder))], check=True, timeout=120)
    return home / "bin"


def run(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A program of the environment in `folder`, with no path to this checkout."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(installed / words[0]), *words[1:]]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=420
    )


def test_a_wheel_trains_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    where = run(installed, tmp_path, "python", "-c", "import elpo_ray; print(elpo_ray.__file__)")
    assert where.stdout.startswith(str(installed.parent)), where.stdout + where.stderr
    done = run(installed, tmp_path, "elpo", "train", *SMALL, "trainer.steps=1")
    assert done.returncode == 0, done.stdout + done.stderr
    (metrics,) = (tmp_path / "runs").glob("quickstart-elpo-*/metrics.jsonl")
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert any("loss" in step for step in steps)
    for phase in ("starting Ray", "cold start", "starting the engines", "evaluating"):
        assert f"\n{phase} …\n" in done.stdout, done.stdout
    assert "Ray: ray status --address=" in done.stdout


def test_a_wheel_writes_a_job_that_runs_its_own_python(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "elpo", "launch", "slurm", "site=cpu", "--", *SMALL)
    assert done.returncode == 0, done.stderr
    assert f"{installed}/python -m launch.start" in done.stdout
