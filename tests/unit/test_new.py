"""`elpo new`: a project that works as it stands, and the example that is the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from elpo_ray.config.compose import composed
from elpo_ray.new.__main__ import main
from elpo_ray.training.checks import check

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("new") / "demo"
    assert main([str(folder)]) == 0
    return folder


def files(folder: Path) -> dict[str, str]:
    skipped = ("__pycache__", ".pytest_cache", "runs")
    return {
        path.name: path.read_text(encoding="utf-8")
        for path in folder.iterdir()
        if path.name not in skipped
    }


def test_the_shop_among_the_examples_is_this_project(project: Path) -> None:
    assert files(project) == files(ROOT / "examples" / "shop")


def test_its_run_is_sound(project: Path) -> None:
    config = composed([str(project / "agent.yaml")])
    check(config)
    assert config.model.path is None and config.task.modules == [str(project)]


def test_its_own_test_passes(project: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q"],
        cwd=project, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_it_is_as_short_as_promised(project: Path) -> None:
    assert len((project / "shop.py").read_text().splitlines()) <= 40
    assert len((project / "agent.yaml").read_text().splitlines()) <= 15


def test_a_folder_that_holds_something_is_refused(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(project)]) == 2
    (tmp_path / "file").touch()
    assert main([str(tmp_path / "file")]) == 2
    assert main([str(tmp_path / "file" / "below")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all("name a" in line for line in lines)
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty")]) == 0


def test_the_folder_is_printed_as_a_shell_takes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sp ace"
    assert main([str(folder)]) == 0
    assert f"cd '{folder}' && elpo train agent.yaml" in capsys.readouterr().out
