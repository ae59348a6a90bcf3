"""The life and death of the sandbox's processes on this machine."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import children, ended, eventually, family

from sandbox.limits import Limits
from sandbox.results import Kind
from sandbox.supervisor import Sandbox

pytestmark = pytest.mark.real

LIMITS = Limits(wall_s=30, cpu_s=30, memory_mib=256)
"""Generous in time: a busy machine fails no test."""


def count_descriptors() -> int:
    """Open ones of this process."""
    return len(os.listdir("/proc/self/fd"))


async def test_closed_sessions_and_sandboxes_say_so() -> None:
    made = Sandbox(LIMITS)
    session = await made.open()
    await session.close()
    await session.close()
    with pytest.raises(ValueError, match="session is closed"):
        await session.call("1")
    await made.close()
    await made.close()
    with pytest.raises(ValueError, match="sandbox is closed"):
        await made.open()


async def test_many_sessions_leave_no_process_descriptor_or_folder() -> None:
    mine = children(os.getpid())
    descriptors = count_descriptors()
    codes = ["1", "import os; os._exit(1)", "import threading, time\n"
             "threading.Thread(target=time.sleep, args=(99,)).start()",
             "import os\nos.umask(0o777)\nos.mkdir('d')\nopen('f', 'w')"]  # fmt: skip
    async with Sandbox(LIMITS, sessions=8) as made:

        async def one(number: int) -> None:
            session = await made.open()
            await session.call(codes[number % len(codes)])
            await session.close()

        session = await made.open()
        (spawner,) = children(os.getpid()) - mine
        assert made._spawner is not None
        root = Path(made._spawner.root)
        await session.close()
        idle, during = len(family(spawner)), count_descriptors()
        await asyncio.gather(*(one(number) for number in range(60)))
        await eventually(lambda: len(family(spawner)) == idle, "sessions are left")
        # those of a process are closed once its end was reported, a little after it is gone
        await eventually(lambda: count_descriptors() <= during, "descriptors are left")
        assert [path.name for path in root.iterdir()] == ["canary"]
    assert children(os.getpid()) == mine
    assert count_descriptors() == descriptors
    assert not root.exists()


async def test_a_cancelled_call_kills_its_process_and_keeps_the_state() -> None:
    async with Sandbox(LIMITS) as made:
        session = await made.open()
        await session.call("x = 5")
        call = asyncio.create_task(session.call("x = 6\nwhile True: pass"))
        await asyncio.sleep(0.3)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert (await session.call("x")).value == "5"


async def test_the_death_of_the_spawner_is_a_failure_and_then_repaired() -> None:
    mine = children(os.getpid())
    async with Sandbox(LIMITS) as made:
        session = await made.open()
        await session.call("x = 7")
        (spawner,) = children(os.getpid()) - mine
        members = family(spawner)
        running = asyncio.create_task(session.call("import time; time.sleep(20)"))
        await asyncio.sleep(0.2)
        os.kill(spawner, signal.SIGKILL)
        result = await running
        assert result.kind is Kind.SANDBOX_FAILURE
        result = await session.call("x")
        assert (result.value, result.restored_by) == ("7", "replay")
        await ended(members)
        assert made.gauges()["calls_sandbox_failure"] == 1


async def test_the_loop_is_never_blocked() -> None:
    async def longest_pause() -> float:
        worst = 0.0
        while not stop.is_set():
            start = time.monotonic()
            await asyncio.sleep(0.005)
            worst = max(worst, time.monotonic() - start)
        return worst

    floods = [
        "print('/a' * 400_000)",
        "while True: print('0x' + 'f' * 999)",
        "print('x' * 500_000)",
    ]
    async with Sandbox(LIMITS, sessions=8) as made:

        async def hostile(code: str) -> None:
            session = await made.open()
            await session.call(code)
            await session.close()

        await hostile("1")
        stop = asyncio.Event()
        pause = asyncio.create_task(longest_pause())
        await asyncio.gather(*(hostile(code) for code in floods * 2))
        stop.set()
        assert await pause < 0.5


async def test_preloaded_modules_are_there() -> None:
    async with Sandbox(LIMITS, preload=["fractions", "numpy"]) as made:
        session = await made.open()
        result = await session.call("import sys\n'numpy' in sys.modules")
        assert result.value == "True"
        await session.call("import numpy as np\nnp.random.rand()")
        await (await made.open(at=session.state)).close()


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [(["nosuchmodule"], 2, "no module named 'nosuchmodule'"), (["--help"], 0, "MODULE")],
)
def test_repl_answers_wrong_arguments_in_a_line(
    arguments: list[str], status: int, said: str
) -> None:
    command = [sys.executable, "-m", "sandbox", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == status and said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


async def test_an_interrupted_cell_ends_and_the_session_goes_on() -> None:
    async with Sandbox(LIMITS) as made:
        session = await made.open()
        await session.call("x = 5")
        assert not session.interrupt()
        call = asyncio.create_task(session.call("print('begun')\nx = 6\nwhile True: pass"))
        while not session.interrupt():
            await asyncio.sleep(0.3)
        result = await call
        assert (result.kind, result.traceback) == (Kind.KILLED, "interrupted")
        assert (await session.call("x")).value == "5"


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("import asyncio\nawait asyncio.sleep(0)\nawait asyncio.sleep(0, 'slept')", "'slept'"),
        ("_ + 1", "42"),
        ("```python\nx = 6\nx * 7\n```", "42"),
        ("```\n'`' * 3\n```", "'```'"),
        ("~~~py\n1 + 1\n~~~\n", "2"),
        ("\n````python copy\n'''\n```\n'''\n````", r"'\n```\n'"),
        ("'''\n```\n'''", r"'\n```\n'"),
        ("help(len)\n1 + 2", "3"),
    ],
)
async def test_cells_are_what_people_write(code: str, value: str) -> None:
    async with Sandbox(LIMITS) as made:
        session = await made.open()
        await session.call("41")
        result = await session.call(code)
        assert result.value == value, result
        assert result.snapshot == "kept"


async def test_programs_are_plainly_not_allowed() -> None:
    async with Sandbox(LIMITS) as made:
        session = await made.open()
        for code in ("import subprocess\nsubprocess.run(['ls'])", "import os\nos.system('ls')"):
            result = await session.call(code)
            assert result.error_type == "PermissionError", result
            assert "not allowed here" in result.traceback


async def test_repl_reads_cells_and_prints_results() -> None:
    text = "x = 20\nfor i in range(2):\n    print(i)\n\nx + 1\n1 / 0\n"
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "sandbox"],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "0\n1\n21\n")
    assert "landlock" in done.stderr and "ZeroDivisionError" in done.stderr
