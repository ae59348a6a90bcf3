"""A machine that has no more of something: the message names the true cause, nothing escapes a
call or a callback, nothing is left, and what was short is made good once it is there again."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from processes import children, eventually

from sandbox.limits import Limits
from sandbox.results import Kind, SandboxFailure
from sandbox.supervisor import Sandbox

pytestmark = pytest.mark.real

LIMITS = Limits(wall_s=20, cpu_s=20, memory_mib=256, file_mib=4, snapshots=8)
TESTS = Path(__file__).resolve().parents[2]
FEW_PROCESSES = """
import asyncio, json, resource, sys
from pathlib import Path
root, tests, most = sys.argv[1], sys.argv[2], int(sys.argv[3])
sys.path[:0] = [root, tests + "/attack"]
import surroundings
surroundings.ordinary_user([Path(root), Path(sys.prefix), Path(sys.base_prefix)])
from sandbox.limits import Limits
from sandbox.results import SandboxFailure
from sandbox.supervisor import Sandbox

async def main():
    escaped, said, values = [], [], []
    asyncio.get_running_loop().set_exception_handler(
        lambda _, what: escaped.append(repr(what.get("exception") or what)))
    async with Sandbox(Limits(memory_mib=256), sessions=16) as sandbox:
        try:
            trunk = await sandbox.open("x = 1")
            for _ in range(3):
                said.append((await trunk.call("x += 1\\nx")).traceback)
            sessions = [await sandbox.open(at=trunk.state) for _ in range(8)]
            for result in await asyncio.gather(*(each.call("x") for each in sessions)):
                said.append(result.traceback)
                values.append(result.value)
            await asyncio.gather(*(each.close() for each in sessions))
        except SandboxFailure as failure:
            said.append(str(failure))
    print(json.dumps({"escaped": escaped, "said": [text for text in said if text],
                      "values": values}))

resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
asyncio.run(main())
"""


@pytest.mark.parametrize("most", [1, 2, 3, 4, 5, 6, 8, 10, 12])
def test_with_few_processes_the_cause_is_named(most: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FEW_PROCESSES, str(TESTS.parent), str(TESTS), str(most)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert not seen["escaped"], seen
    assert all("more processes or threads" in said for said in seen["said"]), seen
    assert set(seen["values"]) <= {"4", None}, seen
    assert "RuntimeError" not in done.stderr, done.stderr


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """While this process may open so many more files."""
    before, taken = resource.getrlimit(resource.RLIMIT_NOFILE), list[int]()
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + count + 1, before[1]))
    with suppress(OSError):
        while True:
            taken.append(os.dup(0))
    for _ in range(count):
        os.close(taken.pop())
    try:
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("left", [0, 1, 3, 6, 10, 15, 20, 25, 30])
async def test_with_few_descriptors_the_cause_is_named(left: int) -> None:
    escaped, mine = list[object](), children(os.getpid())
    asyncio.get_running_loop().set_exception_handler(lambda _, what: escaped.append(what))
    sandbox = Sandbox(LIMITS)
    session = await sandbox.open("x = 1")
    assert (await session.call("x += 1\nx")).value == "2"
    with descriptors_left(left):
        said = list[str]()
        for _ in range(6):
            result = await session.call("x += 1\nx")
            said += [result.traceback] if result.kind is not Kind.OK else []
            try:
                await (await sandbox.open()).call("1")
            except SandboxFailure as failure:
                said.append(str(failure))
        assert said or left > 15
        assert all("may open no more files" in text for text in said), said
    assert (await session.call("type(x).__name__")).value == "'int'"
    await sandbox.close()
    assert not escaped, escaped
    await eventually(lambda: children(os.getpid()) == mine, "processes are left")


async def test_no_state_is_found_fault_with_for_want_of_descriptors() -> None:
    async with Sandbox(LIMITS) as sandbox:
        session = await sandbox.open("import os\nx = 1\nreading = open(os.__file__)")
        assert (await session.call("x += 1\nx")).snapshot == "kept"
        (kept,) = [
            each for each in sandbox._shelf._kept if each.node == session.state.entries[-1].node
        ]
        with descriptors_left(0), pytest.raises(OSError, match="Too many open files"):
            await kept.lineage.look(kept.process)
        assert await kept.lineage.look(kept.process) == ""
        result = await session.call("x")
        assert (result.value, result.replay_reason) == ("2", "")


@pytest.mark.parametrize("left", [0, 1, 2, 3, 5, 8, 12, 20])
async def test_files_in_and_out_name_what_is_short(left: int) -> None:
    async with Sandbox(LIMITS) as sandbox:
        session = await sandbox.open("x = 1")
        await session.put("a", b"before")
        before, failures = session.state, sandbox.metrics.failures
        with descriptors_left(left):
            try:
                await session.put("a", b"after")
            except SandboxFailure as failure:
                assert "may open no more files" in str(failure)
                assert (session.state, sandbox.metrics.failures) == (before, failures + 1)
            try:
                assert await session.get("a") in (b"before", b"after")
            except SandboxFailure as failure:
                assert "may open no more files" in str(failure)
        expected = b"before" if session.state == before else b"after"
        assert await session.get("a") == expected
        assert left > 0 or session.state == before


async def test_without_any_descriptor_no_sandbox_starts_and_the_cause_is_named() -> None:
    for left in range(4):
        sandbox = Sandbox(LIMITS)
        with descriptors_left(left), pytest.raises(SandboxFailure, match="may open no more files"):
            await sandbox.open()
        await sandbox.close()


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system of its own for the work folders, of 6 MiB."""
    libc = ctypes.CDLL(None, use_errno=True)
    where = str(tmp_path).encode()
    if libc.mount(b"tmpfs", where, b"tmpfs", 0, b"size=6m,nr_inodes=2000,mode=711"):
        pytest.skip(f"no file system can be mounted here: {os.strerror(ctypes.get_errno())}")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    libc.umount2(where, 2)


def fill(folder: Path) -> None:
    """Leave no byte of room."""
    with (folder / "ballast").open("ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


async def test_a_full_file_system_is_named_and_made_good(small: Path) -> None:
    sandbox = Sandbox(LIMITS)
    session = await sandbox.open("x = 1")
    assert (await session.call("open('kept', 'w').write('k' * 100_000)")).kind is Kind.OK
    fill(small)
    full = "the file system of the work folders is full"
    for code in ("x", "open('more', 'w').write('m' * 300_000)"):
        result = await session.call(code)  # there is room once the kept state has been given up
        if result.kind is not Kind.OK or "more" in code:
            assert result.kind is Kind.SANDBOX_FAILURE and full in result.traceback, result
        fill(small)
    with pytest.raises(SandboxFailure, match=full):
        await sandbox.open("open('set up', 'w').write('m' * 300_000)")
    fill(small)
    other = Sandbox(LIMITS)
    with pytest.raises(SandboxFailure, match=full):
        await other.open()
    await other.close()
    with pytest.raises(SandboxFailure, match=full):
        await session.put("more", bytes(300_000))
    (small / "ballast").unlink()
    result = await session.call("x, len(open('kept').read())")
    assert result.value == "(1, 100000)", result
    await sandbox.close()
    assert not os.listdir(small)


async def test_no_more_files_are_named_too(small: Path) -> None:
    sandbox = Sandbox(LIMITS)
    session = await sandbox.open("x = 1")
    for number in range(4000):
        try:
            (small / f"ballast{number}").touch()
        except OSError:
            break
    with pytest.raises(SandboxFailure, match="the file system of the work folders is full"):
        await sandbox.open()
    for ballast in small.glob("ballast*"):
        ballast.unlink()
    assert (await session.call("x")).value == "1"
    await sandbox.close()
