"""What runs before a commit is what `make lint` runs, with the programs of `make install`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / ".pre-commit-config.yaml"
BIN = Path(sys.executable).parent


def test_a_commit_is_checked_as_make_lint_checks() -> None:
    (lint,) = re.findall(r"^lint:.*\n\t(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    checks = [re.sub(r"( --check)?( \.)?$", "", check) for check in lint.split(" && ")]
    (repository,) = yaml.safe_load(CONFIG.read_text())["repos"]
    assert repository["repo"] == "local", "nothing is fetched"
    entries = [hook["entry"].removesuffix(" --force-exclude") for hook in repository["hooks"]]
    assert entries == [check.replace("$(BIN)", ".venv/bin") for check in checks]


def test_the_hooks_stop_a_commit_that_ruff_would_change(tmp_path: Path) -> None:
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(BIN)
    (tmp_path / CONFIG.name).write_bytes(CONFIG.read_bytes())
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    file = tmp_path / "wrong.py"
    file.write_text('"""A module."""\n\nimport os\nx = \'text\'\n')
    for command in (["init", "-q"], ["add", CONFIG.name, file.name]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)

    def run(hook: str) -> subprocess.CompletedProcess[str]:
        command = [str(BIN / "pre-commit"), "run", hook, "--all-files"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    checked, formatted = run("ruff-check"), run("ruff-format")
    assert checked.returncode == 1 and "F401" in checked.stdout, checked.stdout + checked.stderr
    assert formatted.returncode == 1, formatted.stdout + formatted.stderr
    assert file.read_text() == '"""A module."""\n\nimport os\n\nx = "text"\n'
    file.write_text('"""A module."""\n\nx = "text"\n')
    assert [run(hook).returncode for hook in ("ruff-check", "ruff-format")] == [0, 0]
