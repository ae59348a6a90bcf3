"""`elpo`: the same commands under one name, and their completion in a shell."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from elpo_ray.cli import COMMANDS


def elpo(*arguments: str, line: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "elpo_ray.cli", *arguments],
        env={**os.environ, "COMP_LINE": line},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_command_is_a_module_and_is_listed() -> None:
    printed = elpo().stdout
    for name, entry in COMMANDS.items():
        assert importlib.util.find_spec(entry.module) is not None, name
        assert f"{name} " in printed and entry.summary in printed


def test_a_command_is_run_with_its_arguments_and_exit_code() -> None:
    fixture = "tests/fixtures/figure4.jsonl"
    one, other = elpo("credit", fixture), elpo("credit", fixture, "algorithm=grpo")
    assert (one.returncode, other.returncode) == (0, 0)
    assert json.loads(one.stdout.splitlines()[0])["nodes"]
    assert one.stdout != other.stdout
    refused = elpo("train", "+experiment=nope")
    assert refused.returncode == 2 and "experiment=nope" in refused.stderr


def test_an_unknown_command_is_named_with_the_known_ones() -> None:
    refused = elpo("trian")
    assert refused.returncode == 2
    assert "'trian'" in refused.stderr and "train" in refused.stderr


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("elpo tr", {"train"}),
        ("elpo ", set(COMMANDS)),
        ("elpo train trainer.st", {"trainer.steps="}),
        ("elpo train algorithm=elp", {"algorithm=elpo", "algorithm=elpo_no_bel"}),
        ("elpo credit x", set()),
        ("elpo nothing x", set()),
    ],
)
def test_the_shell_learns_how_a_line_may_go_on(line: str, expected: set[str]) -> None:
    words = set(elpo("-sc", "query=bash", line=line).stdout.split())
    assert words >= expected
    assert bool(words) == bool(expected)


def test_the_completion_script_is_for_elpo() -> None:
    script = elpo("-sc", "install=bash").stdout
    assert script.rstrip().endswith("hydra_bash_completion elpo")
