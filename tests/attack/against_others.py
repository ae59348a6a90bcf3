"""Attacks 91 to 99: what all processes share without having been given it, who pays for a state
that cannot be repeated, and what nobody looked at when files were counted."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from against_branches_again import BREAKS_FORKS, own_doing
from catalogue import PRELUDE, attack

from sandbox.results import Kind

if TYPE_CHECKING:
    from host import World

FUTEX = """
import threading, time
NUMBER = 202 if os.uname().machine == 'x86_64' else 98
address = ctypes.cast(libc.getpid, ctypes.c_void_p).value & ~4095
word = ctypes.c_uint32.from_address(address).value
def futex(operation, value, seconds=0):
    limit = (ctypes.c_long * 2)(seconds, 0)
    return libc.syscall(NUMBER, ctypes.c_void_p(address), ctypes.c_long(operation),
                        ctypes.c_long(value), limit, None, ctypes.c_long(-1))
"""


@attack(91, "signals by futexes of a file that all have mapped")
async def futexes(world: World) -> None:
    async with world.session() as trunk, world.session() as stranger:
        await stranger.call(PRELUDE + FUTEX)
        await trunk.call(PRELUDE + FUTEX)
        async with world.session(at=trunk.state) as one, world.session(at=trunk.state) as two:
            for wait, wake in ((0, 1), (9, 10)):
                waiting = asyncio.create_task(one.call(f"futex({wait}, word, 2)"))
                await asyncio.sleep(0.5)
                for other in (two, stranger):
                    result = await other.call(f"futex({wake}, 9)")
                    assert result.value in ("0", "-1"), (wait, result)
                own_doing(await waiting)


OTHERS = """
import time
def tell(pid):
    told = []
    for ask in (lambda: time.clock_gettime(~pid << 3 | 2), lambda: time.clock_getres(~pid << 3 | 2),
                lambda: os.getpgid(pid), lambda: os.getsid(pid), lambda: os.sched_getscheduler(pid),
                lambda: os.sched_getparam(pid), lambda: os.sched_getaffinity(pid)):
        try: told.append(ask())
        except OSError: pass
    header = (ctypes.c_uint * 2)(0x20080522, pid)
    if libc.capget(header, ctypes.create_string_buffer(24)) == 0: told.append('capabilities')
    return told
"""


@attack(92, "asks the kernel about the processes of others")
async def asks_about_others(world: World) -> None:
    async with world.session() as trunk, world.session() as stranger:
        await trunk.call(PRELUDE + OTHERS)
        state = trunk.state
        async with world.session(at=state) as one, world.session(at=state) as two:
            for other in (one, stranger):
                busy = asyncio.create_task(
                    other.call("import os, time\ntime.sleep(1)\nos.getpid()")
                )
                await asyncio.sleep(0.3)
                around = await two.call("import os\nme = os.getpid()\nrange(me - 99, me + 99)")
                own_doing(around)
                told = await two.call("[n for n in range(1, me + 99) if n != me and tell(n)]")
                assert told.value == "[]", told
                own_doing(await busy)


@attack(93, "watches what all share")
async def watches(world: World) -> None:
    look = (
        "import os\nfolder = os.path.dirname(os.path.dirname(os.readlink('/proc/self/fd/4')))\n"
        "seen = [n for n in range(99) if os.path.exists(f'{folder}/{n}')]\n"
        "for name, ask in (('room', lambda: os.statvfs('.')), ('room', lambda: os.fstatvfs(4))):\n"
        "    try: ask()\n    except OSError: pass\n    else: seen.append(name)\n"
        "if libc.sysinfo(ctypes.create_string_buffer(256)) == 0: seen.append('memory')\n"
        "at = ctypes.c_void_p(ctypes.cast(libc.getpid, ctypes.c_void_p).value & ~4095)\n"
        "if libc.mincore(at, ctypes.c_long(4096), ctypes.create_string_buffer(8)) == 0:\n"
        "    seen.append('page cache')\nseen"
    )
    async with world.session() as other:
        await other.call("1")
        result = await world.call(PRELUDE + look)
        assert result.value == "[]", result


UNREPEATABLE = "import os\nchance = os.urandom(8)\nprint(chance)\n"
HOLDS = (
    "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()",
    "ends = os.pipe()",
)
LAST_WORDS = ("while True: pass", "os._exit(0)", "import ctypes\nctypes.string_at(0)")


@attack(94, "ends the only process of a state that cannot be repeated")
async def ends_the_only_process(world: World) -> None:
    for hold in HOLDS:
        for last in LAST_WORDS:
            async with world.session(hasty=True) as session:
                own_doing(await session.call(UNREPEATABLE + hold))
                own_doing(await session.call(last))
                for _ in range(2):
                    result = await session.call("1")
                    assert result.kind is Kind.KILLED, (hold, last, result)


async def _neither_forks_nor_repeats(world: World, hold: str) -> None:
    async with world.session() as trunk:
        own_doing(await trunk.call(UNREPEATABLE + hold))
        async with world.session(at=trunk.state) as branch:
            for session in (branch, trunk, branch):
                own_doing(await session.call("1"))
    async with world.session() as trunk:
        own_doing(await trunk.call(UNREPEATABLE + hold))
        state = trunk.state
        assert (await trunk.call("1")).value == "1"
        async with world.session(at=state) as late:
            own_doing(await late.call("1"))


@attack(98, "leaves a state that can neither be forked nor repeated")
async def neither_forks_nor_repeats(world: World) -> None:
    for hold in HOLDS:
        await _neither_forks_nor_repeats(world, hold)


BREAKS_QUIETLY = {
    **BREAKS_FORKS,
    "a child that hides": (
        "made = old_fork()\n    if made == 0:\n        import time\n"
        "        os.closerange(0, 4), os.closerange(5, 64)\n        time.sleep(60)\n    return made"
    ),
    "a child that ends": "made = old_fork()\n    if made == 0: os._exit(0)\n    return made",
}


@attack(95, "does not fork a state that cannot be repeated")
async def does_not_fork(world: World) -> None:
    for name, how in BREAKS_QUIETLY.items():
        async with world.session() as session:
            own_doing(
                await session.call(
                    f"{PRELUDE}{UNREPEATABLE}branch = sys.modules['sandbox.branch']\n"
                    f"old_fork = branch.fork\ndef fork():\n    {how}\nbranch.fork = fork"
                )
            )
            for _ in range(2):
                result = await session.call("1")
                assert result.kind is not Kind.SANDBOX_FAILURE, (name, result)
    async with world.session() as session:
        silent = "sys.modules['sandbox.branch'].show_owner = lambda _: __import__('time').sleep(60)"
        touched = f"{PRELUDE}{UNREPEATABLE}open('touched', 'w').close()\n{silent}"
        async with world.session(at=session.state) as honest:
            working = asyncio.create_task(honest.call("import time\ntime.sleep(2)\n1"))
            await asyncio.sleep(0.2)
            own_doing(await session.call(touched))
            assert (await working).value == "1"
        async with world.session(at=session.state) as other:
            own_doing(await other.call("1"))
    async with world.session() as trunk:
        await trunk.call("x = 1")
        state = trunk.state
        evil = f"{PRELUDE}{UNREPEATABLE}sys.modules['sandbox.branch'].take_over = lambda *_: "
        for ends in ("os._exit(0)", "(__import__('time').sleep(0.1), os._exit(0))"):
            async with world.session(at=state) as one, world.session(at=state) as two:
                own_doing(await one.call(evil + "os._exit(0)"))
                own_doing(await two.call(evil + ends))
                for result in await asyncio.gather(one.call("1"), two.call("1")):
                    own_doing(result)


@attack(96, "has so many threads that a sibling gets none")
async def takes_all_threads(world: World) -> None:
    hoard = (
        "import threading\ngo, made = threading.Event(), 0\nthreading.stack_size(64 << 10)\n"
        "while made < 60:\n    threading.Thread(target=go.wait, daemon=True).start()\n    made += 1"
    )
    async with world.session() as trunk:
        await trunk.call("x = 41")
        state = trunk.state
        hoards = [await world.patient.open(at=state) for _ in range(8)]
        for session in hoards:
            own_doing(await session.call(hoard))
        async with world.session(at=state) as late:
            result = await late.call(f"{hoard}\nx + 1")
            assert (result.value, result.restored_by) == ("42", "fork"), result
        for session in hoards:
            await session.close()


HOARD = """
import threading, time
def hoard():
    kept = []
    for _ in range(8):
        kept.append(os.open('h', os.O_CREAT | os.O_RDWR))
        os.unlink('h')
        os.write(kept[-1], bytes(8 << 20))
    return kept
def map_a_bit(path, length):
    libc.mmap.restype = ctypes.c_void_p
    for _ in range(8):
        fd = os.open(path, os.O_CREAT | os.O_RDWR)
        os.unlink(path)
        os.write(fd, bytes(8 << 20))
        libc.mmap(None, ctypes.c_long(length), 1, 2, fd, ctypes.c_long(0))
        os.close(fd)
go, done = threading.Event(), threading.Event()
def aside(first):
    def run():
        first()
        hoard()
        done.set()
        go.wait()
    threading.Thread(target=run, daemon=True).start()
"""
ANSWERS = """
wire, nonce, frame = sys.modules['sandbox.wire'], b'', sys._getframe()
while frame:
    found = frame.f_locals.get('nonce')
    nonce, frame = found if isinstance(found, bytes) else nonce, frame.f_back
reply = wire.pack_reply(nonce, wire.Reply(wire.Kind.OK, 'forged', None, '', ()))
def answer():
    hoard()
    os.write(3, reply)
    time.sleep(99)
threading.Thread(target=answer).start()
libc.syscall(60 if os.uname().machine == 'x86_64' else 93, ctypes.c_long(0))
"""
OWN_DESCRIPTORS = """
number, flags = (56, 0x50B00) if os.uname().machine == 'x86_64' else (220, 0x50B00)
stack = ctypes.create_string_buffer(1 << 16)
end = ctypes.c_void_p((ctypes.addressof(stack) + (1 << 16) - 64) & ~15)
made = libc.syscall(number, ctypes.c_long(flags), end, None, None, None)
"""
HIDES = (
    "aside(lambda: libc.close_range(99, 99, 2))\ndone.wait(9)",
    "map_a_bit('h', 4096)",
    "os.mkdir('d')\nmap_a_bit('d/h', 8 << 20)",
    ANSWERS,
)


@attack(97, "hides files from whoever counts")
async def hides_files(world: World) -> None:
    for code in HIDES:
        async with world.session() as session:
            await session.call(f"{PRELUDE}{HOARD}import os.path")
            result = await session.call(code)
            assert result.kind in (Kind.OUTPUT, Kind.KILLED), (code, result)
    async with world.session() as session:
        await session.call(f"{PRELUDE}{HOARD}os.mkdir('d')")
        result = await session.call("map_a_bit('d/h', 8 << 20)")
        assert result.kind is Kind.OUTPUT, result
    result = await world.call(f"{PRELUDE}{OWN_DESCRIPTORS}made, ctypes.get_errno()")
    assert result.value == "(-1, 11)", result


@attack(99, "keeps files without a name in many states")
async def nameless_files_in_states(world: World) -> None:
    keep = (
        "fd = os.open('h', os.O_CREAT | os.O_RDWR)\nos.unlink('h')\n"
        "os.posix_fallocate(fd, 0, 12 << 20)",
        "fd = os.open('h', os.O_CREAT | os.O_RDWR)\nos.unlink('h')\n"
        "os.posix_fallocate(fd, 0, 12 << 20)\nlibc.mmap.restype = ctypes.c_void_p\n"
        "libc.mmap(None, ctypes.c_long(4096), 1, 2, fd, ctypes.c_long(0))\nos.close(fd)",
    )
    for code in keep:
        before = world.patient.gauges()["snapshot_bytes"]
        sessions = [await world.patient.open() for _ in range(4)]
        for session in sessions:
            assert (await session.call(PRELUDE + code)).kind is Kind.OK
        counted = world.patient.gauges()["snapshot_bytes"] - before
        assert counted > 4 * (12 << 20), (code, counted >> 20)
        for session in sessions:
            await session.close()
