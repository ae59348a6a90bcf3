"""What a person meets: the prompt, programs that may not start, pools of threads."""

from __future__ import annotations

import asyncio
import os
import pty
import select
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from sandbox.limits import Limits
from sandbox.png import size_of
from sandbox.supervisor import Sandbox, Session

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="module")]

LIMITS = Limits(wall_s=60, cpu_s=60)
"""Generous in time: a busy machine fails no test."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sandbox() -> AsyncIterator[Sandbox]:
    async with Sandbox(LIMITS) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def session(sandbox: Sandbox) -> AsyncIterator[Session]:
    made = await sandbox.open()
    yield made
    await made.close()


async def prompt(*arguments: str, text: str = "") -> tuple[int | None, str, str]:
    """Exit status, output and errors of `python -m sandbox`."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sandbox", *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(text.encode()), 120)
    return process.returncode, out.decode(), err.decode()


async def test_the_prompt_saves_figures() -> None:
    text = "import matplotlib.pyplot as plt\nplt.plot([1, 2]); plt.show()\n"
    status, said, _ = await prompt(text=text)
    assert status == 0 and said.startswith("[figure 1: 640 x 480, /"), said
    path = Path(said.strip().removesuffix("]").rpartition(" ")[2])
    assert size_of(path.read_bytes()) == (640, 480)
    path.unlink()
    path.parent.rmdir()


CTRL_C = "\x03"


def typed(*steps: tuple[str, str]) -> list[str]:
    """What a prompt at a terminal says to each line that is typed, up to the words that end it."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-m", "sandbox"])
    said = []
    try:
        for keys, end in (("", ">>> "), *steps):
            if keys == CTRL_C:
                time.sleep(2)  # a terminal forgets what was typed before it and not read yet
            os.write(terminal, keys.encode())
            said.append("")
            until = time.monotonic() + 60
            while not said[-1].endswith(end) and time.monotonic() < until:
                if select.select([terminal], [], [], 1)[0]:
                    said[-1] += os.read(terminal, 4096).decode()
        return said
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(terminal)


async def test_ctrl_c_at_the_prompt_keeps_the_session() -> None:
    said = await asyncio.to_thread(
        typed,
        ("x = 41\n", ">>> "),
        ("print('begun')\n", ">>> "),
        ("while True: pass\n\n", "\r\n\r\n"),
        (CTRL_C, ">>> "),
        ("for i in range(3):\n", "... "),
        (CTRL_C, ">>> "),
        ("x + 1\n", ">>> "),
    )
    assert "tier " in said[0] and "landlock" in said[0]
    assert "[killed] interrupted" in said[4]
    assert said[-1].splitlines()[1] == "42", said


@pytest.mark.parametrize("name", ["nosuchmodule", "sandbox.nosuch", ".x", "a b", ""])
async def test_the_prompt_refuses_an_unknown_module_in_one_line(name: str) -> None:
    status, said, errors = await prompt("math", name)
    assert (status, said) == (2, "")
    assert errors.count("\n") == 1 and repr(name) in errors


async def test_a_module_that_sessions_cannot_import_is_named_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").touch()
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path.cwd()}")
    status, said, errors = await prompt("only_here")
    assert (status, said) == (1, "")
    assert errors.count("\n") == 1 and "preload: sessions cannot import 'only_here'" in errors


@pytest.mark.parametrize(
    "code",
    [
        "import subprocess\nsubprocess.run(['ls'])",
        "import subprocess\nsubprocess.Popen('ls', shell=True)",
        "import os\nos.system('ls')",
        "import os\nos.popen('ls')",
        "import os\nos.fork()",
        "import os\nos.execv('/bin/ls', ['ls'])",
        "import os\nos.posix_spawn('/bin/ls', ['ls'], {})",
        "import os\nos.spawnlp(os.P_WAIT, 'ls', 'ls')",
        "import multiprocessing as m\nm.Process(target=print).start()",
        "import multiprocessing as m\nm.Pool(2)",
        "import multiprocessing as m\nm.Manager()",
        "import multiprocessing as m\nm.get_context('spawn').Pool(2)",
        "from concurrent.futures import ProcessPoolExecutor as P\nP(2).submit(print)",
        "import asyncio\nawait asyncio.create_subprocess_exec('ls')",
    ],
)
async def test_programs_and_processes_are_plainly_not_allowed(session: Session, code: str) -> None:
    result = await session.call(code)
    assert result.error_type == "PermissionError", result
    assert "not allowed here: the sandbox starts no programs and no processes" in result.traceback


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("with m.pool.ThreadPool(3) as p: got = p.map(str, range(5))\ngot", str(list("01234"))),
        ("import multiprocessing.dummy as d\nwith d.Pool(2) as p: p = p.map(abs, [-1])\np", "[1]"),
        ("q = m.Queue(1)\nq.put(7)\nq.get(timeout=9)", "7"),
        ("lock = m.RLock()\nwith lock:\n    with lock: got = lock.acquire(False)\ngot", "True"),
        ("s = m.BoundedSemaphore(1)\n[s.acquire(timeout=0.1) for _ in '12']", "[True, False]"),
        ("s = m.Semaphore(0)\ns.acquire(False), s.release(), s.get_value()", "(False, None, 1)"),
        ("e = m.Event()\nt = threading.Thread(target=e.set)\nt.start()\ne.wait(9)", "True"),
    ],
)  # fmt: skip
async def test_what_multiprocessing_does_among_threads_works(
    session: Session, code: str, value: str
) -> None:
    await session.call("import threading, multiprocessing as m, multiprocessing.pool")
    result = await session.call(code)
    assert result.value == value, result


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("m.BoundedSemaphore(1).release()", "ValueError"),
        ("m.RLock().release()", "AssertionError"),
        ("m.Lock().release()", "ValueError"),
    ],
)
async def test_locks_among_threads_find_the_same_mistakes(
    session: Session, code: str, error: str
) -> None:
    result = await session.call(f"import multiprocessing as m\n{code}")
    assert result.error_type == error, result
