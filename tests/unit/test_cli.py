"""`elpo`: the same commands under one name, and their completion in a shell."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from elpo_ray.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]


def elpo(*arguments: str, line: str = "", cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "elpo_ray.cli", *arguments],
        env={**os.environ, "COMP_LINE": line, "PYTHONPATH": str(ROOT)},
        cwd=cwd,
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
    one = elpo("credit", fixture, "--json")
    other = elpo("credit", fixture, "--json", "algorithm=grpo")
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


@pytest.mark.parametrize(
    "command", ["", "train ", "launch ", "sft ", "doctor ", "evaluate ", "credit "]
)
def test_a_reader_that_goes_leaves_silence(command: str) -> None:
    """The pipe of `… --help | head -1`, closed by its reader before anything is written."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "elpo_ray.cli", *f"{command}--help".split()],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    assert done.stderr == "" and done.returncode in (0, 141)


@pytest.mark.parametrize(
    "module", ["difflib", "omegaconf", "elpo_ray.types", "elpo_ray.config.modules", "hydra"]
)
def test_ctrl_c_during_an_import_ends_quietly(module: str) -> None:
    """The process is interrupted at the import of a module, early or late."""
    program = f"""
import sys

class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            raise KeyboardInterrupt

sys.meta_path.insert(0, Stop())
sys.modules.pop({module!r}, None)
sys.argv = ["elpo", "train", "+experiment=quickstart", "check_only=true"]
from elpo_ray.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130 and done.stderr == "", done.stderr


@pytest.mark.parametrize("words", [["--version"], ["train", "--version"], ["credit", "--version"]])
def test_the_version_is_that_of_the_package(words: list[str]) -> None:
    assert elpo(*words).stdout == f"elpo_ray {importlib.metadata.version('elpo_ray')}\n"


def test_each_command_has_a_help_of_its_own() -> None:
    shown = {name: elpo(name, "--help").stdout for name, e in COMMANDS.items() if e.configured}
    assert len({text.split("\n\n")[0] for text in shown.values()}) == len(shown)
    for name, text in shown.items():
        assert f"elpo {name} " in text, name


def test_several_runs_leave_no_folder_of_hydra(tmp_path: Path) -> None:
    words = ["train", "-m", "+experiment=quickstart", "trainer.steps=0,1"]
    refused = elpo(*words, cwd=tmp_path)
    assert refused.returncode == 2 and "trainer.steps=0: use 1 or more" in refused.stderr
    assert not list(tmp_path.iterdir())


SCRIPT = "import sys; sys.path.pop(0); import elpo_ray.cli; elpo_ray.cli.main()"
"""The console script: unlike `python -m`, it does not put the working folder on the path."""


@pytest.mark.parametrize("neighbour", ["other.py", "random.py"])
def test_modules_of_the_working_folder_are_found(neighbour: str, tmp_path: Path) -> None:
    """What is said of the function shows that its module was loaded."""
    (tmp_path / "mine.py").write_text("def reward(problem, steps): return 1.0\n")
    (tmp_path / neighbour).write_text("raise RuntimeError('a neighbour was imported')\n")
    words = [
        "+experiment=quickstart",
        "task.tools=[code_interpreter,mine:reward]",
        "check_only=true",
    ]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "train", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "task.tools[1]='mine:reward': tool reward has no docstring" in done.stderr
