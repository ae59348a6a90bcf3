"""Attacks 81 to 90: limits that must count what is used, and honest code that must not go wrong."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from against_branches_again import own_doing
from catalogue import PRELUDE, attack

from sandbox.limits import MAX_CODE_BYTES
from sandbox.results import KEPT, Kind

if TYPE_CHECKING:
    from host import World


@attack(81, "runs between calls by a timer")
async def runs_between(world: World) -> None:
    timers = (
        "import signal, time\nfired = []\nsignal.signal(signal.SIGCONT, lambda *_: None)\n"
        "for number in (signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF):\n"
        "    signal.signal(number, lambda *_: fired.append(time.time()))\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)\n"
        "event = (ctypes.c_int * 16)(0, 0, 18, 0)\ntimer = ctypes.c_void_p()\n"
        "libc.timer_create(1, event, ctypes.byref(timer)), ctypes.get_errno()"
    )
    async with world.session() as session:
        result = await session.call(PRELUDE + timers)
        assert result.value == "(-1, 1)", result
        ended = time.time()
        await asyncio.sleep(0.6)
        result = await session.call(f"[at for at in fired if at > {ended} + 0.1]")
        assert result.value == "[]", result


UNCOUNTED = (
    "for n in range(9):\n    fd = os.open(f'f{n}', os.O_CREAT | os.O_RDWR)\n"
    "    if libc.fallocate(fd, 1, ctypes.c_long(0), ctypes.c_long(15 << 20)):\n"
    "        raise OSError(ctypes.get_errno(), 'fallocate')\n    os.close(fd)",
    "kept = []\nfor n in range(9):\n    kept.append(os.open('f', os.O_CREAT | os.O_RDWR))\n"
    "    os.unlink('f')\n    os.write(kept[-1], bytes(8 << 20))",
    "kept = [os.open('.', os.O_TMPFILE | os.O_RDWR) for n in range(9)]\n"
    "for fd in kept: os.write(fd, bytes(8 << 20))",
    "import mmap\nkept = []\nfor n in range(9):\n    fd = os.open('f', os.O_CREAT | os.O_RDWR)\n"
    "    os.unlink('f')\n    os.write(fd, bytes(8 << 20))\n"
    "    kept.append(mmap.mmap(fd, 8 << 20, access=mmap.ACCESS_COPY))\n    os.close(fd)",
)


@attack(82, "keeps files that do not count")
async def uncounted_files(world: World) -> None:
    for code in UNCOUNTED:
        result = await world.call(PRELUDE + code)
        assert result.kind is Kind.OUTPUT or "[Errno 95]" in result.traceback, (code, result)


@attack(83, "keeps memory that does not count")
async def uncounted_memory(world: World) -> None:
    take = (
        "import mmap\nx, flags = None, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS\n"
        "x = mmap.mmap(-1, 96 << 20, flags)\n"
        "x.madvise(mmap.MADV_HUGEPAGE)\nfor at in range(0, 96 << 20, 4096): x[at] = 1"
    )
    before = world.patient.gauges()["snapshot_bytes"]
    async with world.session() as session:
        for _ in range(4):
            assert (await session.call(take)).snapshot == KEPT
        counted = world.patient.gauges()["snapshot_bytes"] - before
        assert counted > 3 * (96 << 20), counted >> 20


STALLS = """
import time
branch = sys.modules['sandbox.branch']
old_take_over = branch.take_over
def take_over(*order):
    os.write(3, b'x')
    time.sleep(60)
    old_take_over(*order)
branch.take_over = take_over
"""


@attack(84, "holds processors by forks that do not end")
async def stalls(world: World) -> None:
    async with world.session() as honest:
        await honest.call("x = 41")
        evil = [await world.patient.open() for _ in range(4)]
        for session in evil:
            await session.call(PRELUDE + STALLS)
        stalled = [asyncio.create_task(session.call("1")) for session in evil]
        await asyncio.sleep(0.3)
        started = time.monotonic()
        assert (await honest.call("x + 1")).value == "42"
        assert time.monotonic() - started < 4
        for result in await asyncio.gather(*stalled):
            own_doing(result)
        for session in evil:
            await session.close()


STREAMS = (
    "import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer)",
    "import io, sys\nsys.stdout = io.StringIO()\nsys.stdout = sys.__stdout__",
    "import sys\nsys.stdout.detach()",
    "import sys\nsys.stdout.close()",
    "import sys\nsys.stdout.buffer.detach()",
    "import sys\nsys.stdout = sys.__stdout__ = None",
)


@attack(85, "wraps, replaces and detaches its streams")
async def streams(world: World) -> None:
    for code in STREAMS:
        async with world.session() as session:
            done = await session.call(f"x = 41\n{code}")
            assert done.kind in (Kind.OK, Kind.ERROR) and done.state_kept, (code, done)
            for _ in range(2):
                result = await session.call("print('seen')\nx + 1")
                assert (result.stdout, result.value) == ("seen\n", "42"), (code, result)
        wrapped = await world.call(f"{code}\nif sys.stdout: print('seen')")
        assert wrapped.stdout == "seen\n" or code in STREAMS[2:], (code, wrapped)


@attack(86, "forgets to cancel its alarm")
async def forgotten_alarm(world: World) -> None:
    for handler in ("lambda *_: fired.append(1)", "signal.SIG_DFL"):
        async with world.session() as session:
            within = await session.call(
                "import signal, time\nfired = []\n"
                "signal.signal(signal.SIGALRM, lambda *_: fired.append(0))\n"
                "signal.setitimer(signal.ITIMER_REAL, 0.05)\ntime.sleep(0.3)\nfired"
            )
            assert within.value == "[0]", within
            await session.call(f"signal.signal(signal.SIGALRM, {handler})\nsignal.alarm(1)")
            await asyncio.sleep(1.3)
            for _ in range(2):
                result = await session.call("fired")
                assert (result.value, result.restored_by) == ("[0]", "fresh"), result


@attack(87, "sends a cell that is too long")
async def too_long(world: World) -> None:
    async with world.session() as session:
        await session.call("x = 41")
        result = await session.call("#" * (MAX_CODE_BYTES + 1))
        assert (result.kind, result.error_type) == (Kind.ERROR, "ValueError"), result
        state = session.state
        assert (await session.call("x + 1")).value == "42"
    async with world.session(at=state) as rebuilt:
        assert (await rebuilt.call("x + 1")).value == "42"


@attack(88, "copies and moves files as libraries do")
async def copies_files(world: World) -> None:
    code = (
        "import os, shelve, shutil\nopen('a', 'w').write('text')\nos.mkdir('d')\n"
        "shutil.copy('a', 'b')\nshutil.copy2('a', 'c')\nshutil.copytree('d', 'e')\n"
        "os.rename('a', 'd/a')\nshutil.move('b', 'e')\n"
        "with shelve.open('kept') as kept: kept['k'] = 1\n"
        "with shelve.open('kept') as kept: got = kept['k']\n"
        "got, open('d/a').read(), open('e/b').read(), open('c').read(), os.path.exists('a')"
    )
    result = await world.call(code)
    assert result.value == "(1, 'text', 'text', 'text', False)", result


@attack(89, "raises exceptions of hostile classes")
async def hostile_exceptions(world: World) -> None:
    meta = "class M(type):\n    @property\n    def NAME(cls): raise SystemExit(9)\n"
    for name in ("__name__", "__qualname__", "__module__", "__mro__", "__str__", "__dict__"):
        code = meta.replace("NAME", name) + "class E(Exception, metaclass=M): pass\nraise E('said')"
        result = await world.call(code)
        assert (result.kind, result.state_kept) == (Kind.ERROR, True), (name, result)
    for body in ("1 / 0", "return 5", "raise SystemExit(9)", "raise self"):
        code = (
            f"class E(Exception):\n    def __str__(self): {body}\n    __repr__ = __str__\nraise E"
        )
        result = await world.call(code)
        assert (result.kind, result.error_type) == (Kind.ERROR, "E"), (body, result)


@attack(90, "keeps files open that it reads")
async def reads_on(world: World) -> None:
    async with world.session() as trunk:
        kept = await trunk.call("import os\nf = open(os.__file__, 'rb', buffering=0)\nf.read(10)")
        assert kept.snapshot == KEPT, kept
        state, seen = trunk.state, list[object]()
        async with world.session(at=state) as one, world.session(at=state) as two:
            for session in (one, two, one, two, trunk):
                result = await session.call("f.tell(), f.read(10)")
                assert result.restored_by in ("fork", "fresh") and result.snapshot == KEPT, result
                seen.append(result.value)
        assert seen[0] == seen[1] == seen[4] != seen[2] == seen[3], seen
