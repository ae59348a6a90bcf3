"""What the sandbox leaves out to be quick, and that it still sees what it must see."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from sandbox import branching
from sandbox.holdings import _state_of


@pytest.mark.parametrize("wait_s", [0.0, 0.001, 0.01])
async def test_a_file_made_and_removed_right_after_the_look_is_noticed(
    tmp_path: Path, wait_s: float
) -> None:
    for _ in range(50):
        (tmp_path / "earlier").touch()
        (tmp_path / "earlier").unlink()
        await asyncio.sleep(wait_s)
        before = _state_of(str(tmp_path))
        (tmp_path / "file").touch()
        (tmp_path / "file").unlink()
        assert before is None or _state_of(str(tmp_path)) != before


async def test_a_folder_that_nobody_has_changed_for_a_while_is_known_to_be_the_same(
    tmp_path: Path,
) -> None:
    await asyncio.sleep(0.05)
    before = _state_of(str(tmp_path))
    assert before is not None and _state_of(str(tmp_path)) == before


def test_the_spawner_hears_of_ends_but_not_of_stops() -> None:
    code = """
        import os, signal
        from sandbox.spawner import _hear_of_ends

        _hear_of_ends()
        reading, writing = os.pipe2(os.O_NONBLOCK)
        signal.set_wakeup_fd(writing)
        child = os.fork()
        if child == 0:
            signal.pause()
        stop, go_on = (signal.SIGSTOP, os.WSTOPPED), (signal.SIGCONT, os.WCONTINUED)
        for number, state in (stop, go_on, stop):
            os.kill(child, number)
            os.waitid(os.P_PID, child, state)
        try:
            heard = os.read(reading, 9)
        except BlockingIOError:
            heard = b""
        assert not heard, heard
        os.kill(child, signal.SIGKILL)
        os.waitid(os.P_PID, child, os.WEXITED)
        assert os.read(reading, 9) == bytes([signal.SIGCHLD])
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=30)


async def test_a_fork_that_takes_long_gives_its_place_to_others_meanwhile() -> None:
    running = asyncio.Semaphore(1)
    await running.acquire()

    async def fork() -> str:
        async with asyncio.timeout(5):
            await running.acquire()
        running.release()
        return "branch"

    assert await branching._unhurried(fork(), running) == "branch"  # type: ignore[arg-type, comparison-overlap]
    assert running.locked(), "it has its place again"


async def test_a_branch_that_nobody_waits_for_any_longer_is_killed() -> None:
    running, killed = asyncio.Semaphore(1), list[str]()
    await running.acquire()

    class Branch:
        def kill(self) -> None:
            killed.append("branch")

    async def fork() -> Branch:
        async with asyncio.timeout(5):
            await running.acquire()  # the place that was given up
        return Branch()

    waiting = asyncio.ensure_future(branching._unhurried(fork(), running))  # type: ignore[arg-type]
    await asyncio.sleep(0.3)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert killed == ["branch"]
    for _ in ("by the one that was cancelled", "by the other one"):
        running.release()
        await asyncio.sleep(0)
    await running.acquire()
    assert running.locked(), "there is one place, as before"
