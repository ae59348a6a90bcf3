"""Attacks 33 to 51: memory, processes, output, files, time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from catalogue import PRELUDE, attack, ends
from processes import eventually

from sandbox.limits import OUTPUT_KILL_BYTES
from sandbox.results import Kind

if TYPE_CHECKING:
    from host import World

ends(33, "allocates 8 GiB at once", Kind.MEMORY, cells=("bytearray(8 << 30)",))
ends(
    34,
    "allocates little by little",
    Kind.MEMORY,
    cells=(
        "kept = []\nwhile True:\n    kept.append(bytearray(1 << 20))",
        "kept = []\nwhile True:\n    kept.append('x' * len(kept))",
        "kept = {}\nwhile True:\n    kept[len(kept)] = [0.5] * 100",
    ),
    hasty=False,
)
ends(
    37,
    "starts threads without end",
    Kind.OK,
    Kind.MEMORY,
    cells=(
        "import threading\nthreading.stack_size(64 << 10)\nmade = 0\ngo = threading.Event()\n"
        "try:\n    while made < 5000:\n"
        "        threading.Thread(target=go.wait, daemon=True).start()\n        made += 1\n"
        "except RuntimeError: pass\nassert 1 < made < 4000, made\ngo.set()",
    ),
)
ends(41, "prints 150 kB", Kind.OK, cells=("print('x' * 150_000)", "print('y\\n' * 75_000)"))
ends(
    42,
    "fills the disk",
    Kind.ERROR,
    cells=(
        "with open('big', 'wb') as file:\n    while True: file.write(b'x' * (1 << 20))",
        "os.posix_fallocate(os.open('big', os.O_CREAT | os.O_RDWR), 0, 1 << 34)",
    ),
)
ends(
    44,
    "makes a sparse file of 1 TiB",
    Kind.ERROR,
    cells=(
        "os.ftruncate(os.open('big', os.O_CREAT | os.O_RDWR), 1 << 40)",
        "file = open('big', 'wb')\nfile.seek(1 << 40)\nfile.write(b'x')\nfile.flush()",
    ),
)
ends(
    45,
    "opens files until none can be opened",
    Kind.ERROR,
    cells=(
        "kept = []\nwhile True: kept.append(open('/dev/null'))",
        "kept = []\nwhile True: kept.append(os.pipe())",
    ),
)
ends(46, "reads address 0", Kind.KILLED, cells=("ctypes.string_at(0)",))
ends(47, "aborts", Kind.KILLED, cells=("os.abort()", "libc.abort()"))
ends(
    48,
    "recurses without end",
    Kind.ERROR,
    Kind.TIMEOUT,
    cells=("def f(): f()\nf()", "class R:\n    def __repr__(self): return repr(self)\nR()"),
)
ends(49, "hangs in C", Kind.TIMEOUT, cells=("(9 ** 9) ** (9 ** 8)",))
ends(
    50,
    "ignores all signals",
    Kind.TIMEOUT,
    cells=(
        "import signal\nfor n in set(signal.Signals) - {9, 19}:\n"
        "    signal.signal(n, signal.SIG_IGN)\nsignal.pthread_sigmask(0, range(1, 65))\n"
        "while True: pass",
    ),
)
ends(
    51,
    "catches everything in a loop",
    Kind.TIMEOUT,
    cells=("while True:\n  try:\n    while True: pass\n  except BaseException: pass",),
)

FORKS = """
import threading
def fork_and_fill():
    made = 0
    for attempt in range(50):
        for fork in (os.fork, libc.fork, libc.vfork, lambda: libc.syscall(CLONE, 17, 0, 0, 0, 0),
                     lambda: libc.syscall(CLONE, 0x8011, 0, 0, 0, 0)):
            try: made += fork() >= 0
            except OSError: pass
            if made: kept = bytearray(64 << 20); kept[::4096] = b'x' * len(kept[::4096])
    return made
"""


def _forks(then: str) -> str:
    clone = "56 if os.uname().machine == 'x86_64' else 220"
    return PRELUDE + f"CLONE = {clone}\n" + FORKS + then


@attack(35, "forks and allocates")
async def fork_and_allocate(world: World) -> None:
    result = await world.call(_forks("fork_and_fill()"))
    assert result.value == "0" or result.kind in (Kind.MEMORY, Kind.KILLED), result
    await eventually(world.is_idle, "processes are left")
    result = await world.call(
        "import _thread\nkept = []\ndef fill():\n    while True: kept.append(bytearray(1 << 20))\n"
        "for _ in range(4): _thread.start_new_thread(fill, ())\nfill()"
    )
    assert result.kind is Kind.MEMORY or "start new thread" in result.traceback, result


@attack(36, "forks without end")
async def fork_bomb(world: World) -> None:
    result = await world.call("import os\nwhile True: os.fork()")
    assert (result.kind, result.error_type) == (Kind.ERROR, "PermissionError"), result
    result = await world.call(PRELUDE + "while True: raw('fork')")  # by the kernel too
    assert (result.kind, result.error_type) == (Kind.ERROR, "BlockingIOError"), result
    result = await world.call(PRELUDE + "import multiprocessing\nmultiprocessing.Pool(4)")
    assert result.kind is Kind.ERROR, result


@attack(38, "leaves a daemon behind")
async def daemon(world: World) -> None:
    async with world.session() as session:
        daemonize = "if fork_and_fill():\n    import time\n    time.sleep(1000)"
        await session.call(_forks(daemonize))
        await session.call("import threading, time\nticks = []\ndef tick():\n    while True:\n"
                           "        ticks.append(1)\n        time.sleep(0.01)\n"
                           "threading.Thread(target=tick, daemon=True).start()")  # fmt: skip
        await session.call("1")
    await eventually(world.is_idle, "a daemon is left")


@attack(39, "floods its output")
async def flood(world: World) -> None:
    for code in (
        "while True: print('x' * 1000)",
        "import os\nwhile True: os.write(1, b'x' * 9999)",
    ):
        result = await world.call(code, hasty=True)
        assert result.kind is Kind.OUTPUT, result
        assert len(result.stdout) < OUTPUT_KILL_BYTES and result.truncated


@attack(40, "floods both outputs at once")
async def flood_both(world: World) -> None:
    code = (
        "import os, threading\ndef flood(n):\n    while True: os.write(n, b'x' * 60_000)\n"
        "threading.Thread(target=flood, args=(2,), daemon=True).start()\nflood(1)"
    )
    result = await world.call(code, hasty=True)
    assert result.kind is Kind.OUTPUT, result
    assert len(result.stdout) + len(result.stderr) < 2 * OUTPUT_KILL_BYTES


@attack(43, "makes 20,000 files")
async def many_files(world: World) -> None:
    for make in (
        "open(f'f{i}', 'w').close()",
        "os.mkdir('d')\n    os.chdir('d')",
        "os.mkdir(str(i), 0)\n    os.umask(0o777)",
    ):
        async with world.session() as session:
            await session.call("import os")
            result = await session.call(f"for i in range(20_000):\n    {make}")
            assert result.kind in (Kind.OUTPUT, Kind.ERROR), result
            assert (await session.call("os.listdir()")).value == "[]"
