"""What the sandbox says and does where layers are missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox.results import CallResult, Kind, SandboxUnavailable
from sandbox.supervisor import Sandbox

pytestmark = pytest.mark.attack

PROGRAM = """
import asyncio, sys
sys.path[:0] = sys.argv[1:3]
import surroundings
surroundings.{surroundings}()
from sandbox.results import SandboxUnavailable
from sandbox.supervisor import Sandbox

async def main():
    try:
        await Sandbox(isolation={required!r}).open()
    except SandboxUnavailable as error:
        print("refused:", error)
    async with Sandbox(isolation={required!r}, allow_degraded=True) as sandbox:
        session = await sandbox.open()
        result = await session.call("1 + 1")
        print(result.isolation, result.value)
asyncio.run(main())
"""
HERE = Path(__file__).resolve().parent


def said_with(surroundings: str, required: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(surroundings=surroundings, required=required),
         str(HERE.parents[1]), str(HERE)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("surroundings", "required", "why", "without"),
    [
        ("without_landlock", "standard", "landlock: landlock_create_ruleset (ENOSYS); needs Linux "
         "5.13", "weak"),
        ("without_seccomp", "standard", "seccomp: prctl(PR_SET_SECCOMP) (EINVAL); needs a kernel "
         "with CONFIG_SECCOMP_FILTER", "weak"),
        ("like_a_container", "strong", "namespaces: unshare(user) (EPERM); only `strong` needs "
         "them: give root CAP_SYS_ADMIN", "standard"),
    ],
)  # fmt: skip
def test_a_missing_layer_is_refused_by_name_unless_degraded_is_allowed(
    surroundings: str, required: str, why: str, without: str
) -> None:
    said = said_with(surroundings, required)
    assert f"cannot isolate code to the tier '{required}'" in said and why in said
    assert said.splitlines()[-1] == f"{without} 2"


async def call_behind_bubblewrap() -> CallResult:
    async with Sandbox(isolation="strong", bubblewrap=True) as sandbox:
        session = await sandbox.open(tree="t")
        await session.call("seen = [1]")
        branch = await sandbox.open(at=session.state, tree="t")
        await session.call("seen.append(2)")
        return await branch.call("import os; seen, os.path.exists('/etc/passwd')")


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="there is no bwrap")
async def test_bubblewrap_makes_the_walls_of_strong_and_states_branch_behind_them() -> None:
    result = await call_behind_bubblewrap()
    assert (result.kind, result.value) == (Kind.OK, "([1], False)")
    assert (result.isolation, result.restored_by) == ("strong", "fork")


@pytest.mark.parametrize(
    ("program", "why"),
    [(None, "there is no bwrap on the path"), ("echo no namespaces here >&2; exit 1", "no name")],
)
async def test_bubblewrap_that_does_not_work_is_refused_by_name(
    program: str | None, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if program is not None:
        (tmp_path / "bwrap").write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxUnavailable, match=rf"bubblewrap: {why}.*apt install bubblewrap"):
        await call_behind_bubblewrap()


def test_an_unknown_tier_is_refused() -> None:
    with pytest.raises(ValueError, match=r"isolation='weak': use \"strong\" or \"standard\""):
        Sandbox(isolation="weak")


CHECK = """
import sys
sys.path[:0] = sys.argv[1:3]
import surroundings
getattr(surroundings, sys.argv[3])()
from sandbox.check import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("surroundings", "status", "lines"),
    [
        (None, 0, ["Landlock                standard, strong      yes"]),
        ("like_a_container", 0, ["network namespace       strong                no: unshare",
                                 "namespaces: only `strong` needs them", "tier: standard"]),
        ("without_landlock", 1, ["standard, strong      no: landlock_create_ruleset (ENOSYS)",
                                 "landlock: needs Linux 5.13", "tier: weak"]),
    ],
)  # fmt: skip
def test_the_report_names_what_works(
    surroundings: str | None, status: int, lines: list[str]
) -> None:
    program = ["-c", CHECK, str(HERE.parents[1]), str(HERE), str(surroundings)]
    done = subprocess.run(
        [sys.executable, *(program if surroundings else ["-m", "sandbox.check"])],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=HERE.parents[1],
    )
    assert done.returncode == status, done
    for line in lines:
        assert line in done.stdout, done.stdout
