"""The images, as far as they can be looked at without an engine."""

from __future__ import annotations

import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "docker").glob("*Dockerfile"))


def instructions(file: Path) -> list[tuple[str, str]]:
    """(instruction, its words) in order, continued lines joined, comments left out."""
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [(a, b) for line in text.splitlines() if line for a, _, b in [line.partition(" ")]]


def test_there_are_two_images() -> None:
    assert [file.name for file in FILES] == ["Dockerfile", "sandbox.Dockerfile"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_hadolint_finds_nothing(file: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([str(hadolint), str(file)], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout.strip(), done.stdout


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_is_copied_is_there_and_not_ignored(file: Path) -> None:
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    sources = [
        source
        for name, words in instructions(file)
        if name == "COPY" and "--from=" not in words
        for source in [w for w in words.split() if not w.startswith("--")][:-1]
    ]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source == "." or source.split("/")[0] in allowed, f"{source} is ignored"
    assert all((ROOT / name).exists() for name in allowed)
    assert not any(fnmatch(name, "runs*") or name == ".git" for name in allowed)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_an_image_is_pinned_and_runs_as_nobody_special(file: Path) -> None:
    found = instructions(file)
    bases = [words.split()[0] for name, words in found if name == "FROM"]
    stages = [words.split()[-1] for name, words in found if name == "FROM"]
    for base in bases:
        assert base in stages or re.search(r":\d+\.\d+\.\d+", base), f"{base} floats"
    last = max(n for n, (name, _) in enumerate(found) if name == "FROM")
    users = [words for name, words in found[last:] if name == "USER"]
    assert users and users[-1] not in ("0", "root")


def test_the_training_image_installs_as_make_does() -> None:
    text = (ROOT / "docker" / "Dockerfile").read_text()
    done = subprocess.run(
        ["make", "--dry-run", "install", "PYTHON=python3", "VENV=/opt/venv", "TARGET=gpu",
         "EXTRAS=gpu"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "/opt/venv/bin/python -m pip install" in done.stdout and "'.[gpu]'" in done.stdout
    assert "make install PYTHON=python3 VENV=/opt/venv TARGET=" in text


def test_the_sandbox_image_has_the_tested_versions() -> None:
    tested = set((ROOT / "requirements" / "cpu.txt").read_text().splitlines())
    pins = (ROOT / "requirements" / "sandbox.txt").read_text().splitlines()
    assert {pin for pin in pins if not pin.startswith("#")} <= tested
