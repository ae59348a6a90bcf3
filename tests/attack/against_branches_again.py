"""Attacks 71 to 80: a process that lies to its supervisor while it is branched.

What is wanted each time: no branch sees anything of another one, nothing is the sandbox's failure,
and no sibling loses a call."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING

from catalogue import PRELUDE, attack
from processes import eventually, family, state_of

from sandbox.results import CallResult, Kind

if TYPE_CHECKING:
    from host import World


def own_doing(result: CallResult) -> None:
    """Whatever came of it is the code's, not the sandbox's failure."""
    assert result.kind is not Kind.SANDBOX_FAILURE, result


async def _look(world: World, make: str, deed: str, look: str) -> list[CallResult]:
    """What two branches of `make` see, of which one did a `deed` before the other was born."""
    async with world.session() as trunk:
        own_doing(await trunk.call(PRELUDE + make))
        state = trunk.state
        async with world.session(at=state) as one, world.session(at=state) as two:
            own_doing(await one.call(deed))
            seen = [await two.call(look), await one.call("'still here'")]
        async with world.session(at=state) as late:
            seen.append(await late.call(look))
    for result in seen:
        own_doing(result)
    assert "still here" in str(seen.pop(1).value) or not seen
    return seen


@attack(71, "puts a file of its own in the place of a given descriptor")
async def replaces_a_descriptor(world: World) -> None:
    for number in (0, 1, 2):
        make = (
            f"os.close({number})\n"
            "assert os.open('note', os.O_RDWR | os.O_CREAT) == NUMBER\nos.write(NUMBER, b'old')"
        ).replace("NUMBER", str(number))
        deed = f"os.pwrite({number}, b'new', 0)"
        look = (
            f"try: got = os.pread({number}, 3, 0)\nexcept OSError: got = b'none'\n"
            "open('got', 'wb').write(got)\ngot"
        )
        for result in await _look(world, make, deed, look):
            assert "new" not in str(result.value) + result.stdout, (number, result)


@attack(72, "stays in the folder of its snapshot")
async def does_not_move(world: World) -> None:
    make = (
        "branch = sys.modules['sandbox.branch']\n"
        "branch._copy_all = branch.Place.settle = lambda *_: None\nos.chdir('.')"
    )
    deed = "open('note', 'w').write('x')"
    for result in await _look(world, make, deed, "os.listdir()"):
        assert result.value == "[]" or not result.state_kept, result
    async with world.session() as trunk:
        await trunk.call(PRELUDE + make)
        fill = "for n in range(10): open(f'big{n}', 'wb').write(bytes(10 << 20))"
        result = await trunk.call(fill)
        assert result.kind is not Kind.OK, result
        own_doing(result)


FOLDERS = """
def folders():
    frame, found = sys._getframe(), set()
    while frame:
        for value in list(frame.f_locals.values()):
            found |= {v for v in (value if isinstance(value, (list, tuple)) else [value])
                      if isinstance(v, str) and v.startswith('/')}
        frame = frame.f_back
    try: found.add(os.readlink('/proc/self/fd/4'))
    except OSError: pass
    return found
known = folders()
"""


@attack(73, "finds the folders of others in the frames above it")
async def reads_frames(world: World) -> None:
    deed = (
        "open('secret', 'w').write('x')\nfor folder in known | folders():\n"
        "    try: open(folder + '/planted.py', 'w').write('planted = 1')\n"
        "    except OSError: pass"
    )
    look = (
        "found = []\nfor folder in known | folders():\n"
        "    try: found.append(open(folder + '/secret').read())\n    except OSError: pass\n"
        "try: import planted\nexcept ImportError: pass\nelse: found.append('planted')\nfound"
    )
    for result in await _look(world, FOLDERS, deed, look):
        assert result.value == "[]", result


KEEPS_A_PIPE = """
branch = sys.modules['sandbox.branch']
old_fork, reading, writing = branch.fork, -1, -1
def fork():
    global reading, writing
    if reading < 0:
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
    return old_fork()
branch.fork = fork
"""
KEEPS_CHANNELS = """
old_close = os.close
os.close = lambda descriptor: None if 4 < descriptor < 64 else old_close(descriptor)
"""
HANDS_ON = """
branch, handed = sys.modules['sandbox.branch'], []
old_take_over = branch.take_over
def take_over(*order):
    handed.extend(os.dup(d) for d in range(5))
    old_take_over(*order)
branch.take_over = take_over
old_closerange, os.closerange = os.closerange, lambda *_: None
"""


@attack(74, "keeps what belongs to a branch")
async def keeps_channels(world: World) -> None:
    deed = "for n in range(5, 64):\n    try: os.write(n, b'from one')\n    except OSError: pass\n1"
    look = (
        "got = []\nfor n in range(5, 64):\n    try:\n        os.set_blocking(n, False)\n"
        "        got.append(os.read(n, 99))\n"
        "        os.write(n, b'forged' * 9)\n    except OSError: pass\ngot"
    )
    for make in (KEEPS_A_PIPE, KEEPS_CHANNELS, HANDS_ON):
        async with world.session() as trunk:
            await trunk.call(PRELUDE + make)
            state = trunk.state
            async with world.session(at=state) as one, world.session(at=state) as two:
                first = await one.call("x = 1\nprint('hers')\nx")
                told = [first, await one.call(deed), await two.call(look)]
                after = await one.call("print('hers')\n2 + 2")
            for result in (*told, after):
                own_doing(result)
                said = f"{result.value} {result.stdout} {result.traceback}"
                assert "from one" not in said and "forged" not in said, (make, result)
            if after.kind is Kind.OK:
                assert (after.stdout, after.value) == ("hers\n", "4"), (make, after)


LIVES_ON = """
branch, born = sys.modules['sandbox.branch'], 0
old_fork = branch.fork
def fork():
    global born
    born += 1
    made = old_fork()
    if made == 0 and born == 1:
        import time
        os.closerange(0, 4), os.closerange(5, 64)
        while True:
            time.sleep(0.01)
            for folder in ('.', '..'):
                try: open(folder + '/planted', 'w').close()
                except OSError: pass
    return made
branch.fork = fork
"""


@attack(75, "leaves an unwatched process behind a refused fork")
async def lives_on(world: World) -> None:
    before = family(os.getpid())
    async with world.session() as trunk:
        await trunk.call(PRELUDE + LIVES_ON)
        for _ in range(2):
            result = await trunk.call("os.listdir()")
            own_doing(result)
            assert result.value in ("[]", None), result

        def all_stopped() -> bool:
            return all(state_of(pid) in "TZ" for pid in family(os.getpid()) - before)

        await eventually(all_stopped, "a process runs that nobody watches")


LOCKS = """
import fcntl, struct
def held():
    request = struct.pack('hhqqi', fcntl.F_WRLCK, 0, 0, 0, 0)
    seen = []
    for path in (os.__file__, '/dev/null'):
        with open(path) as file:
            for ask in (lambda: fcntl.fcntl(file, fcntl.F_GETLK, request),
                        lambda: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)):
                try: seen.append(ask())
                except OSError as error: seen.append(error.errno)
    return seen
"""


@attack(76, "signals to others by locks, flags and counts")
async def quiet_channels(world: World) -> None:
    lock = (
        "kept = [open(os.__file__), open('/dev/null', 'r+')]\nfor file in kept:\n"
        "    for ask in (fcntl.flock, fcntl.lockf):\n"
        "        try: ask(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n        except OSError: pass"
    )
    async with world.session() as one, world.session() as two:
        await one.call(PRELUDE + LOCKS)
        before = (await two.call(PRELUDE + LOCKS + "held()")).value
        await one.call(lock)
        assert (await two.call("held()")).value == before is not None
        if world.patient.isolation == "strong":
            look = "[n for n in range(1, 999) if n != os.getpid() and os.path.exists(f'/proc/{n}')]"
            assert (await two.call(look)).value == "[]"
    flags = "fcntl.fcntl(0, fcntl.F_GETFL)"
    deed = "fcntl.fcntl(0, fcntl.F_SETFL, os.O_NONBLOCK | os.O_APPEND)"
    seen = await _look(world, "import fcntl", deed, f"import fcntl\n{flags}")
    assert {result.value for result in seen} == {"0"}, seen


ENDINGS = {
    "its CPU limit": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))",
    "a raw CPU limit": (
        "limit = (ctypes.c_ulong * 2)(1, 1)\n"
        "if libc.setrlimit(0, limit) and libc.prlimit(0, 0, limit, None):\n"
        "    raise OSError(ctypes.get_errno(), 'limit')"
    ),
    "a timer": (
        "event = (ctypes.c_int * 16)(0, 0, 9, 0)\ntimer = ctypes.c_void_p()\n"
        "if libc.timer_create(1, event, ctypes.byref(timer)):\n"
        "    raise OSError(ctypes.get_errno(), 'timer')\n"
        "libc.timer_settime(timer, 0, (ctypes.c_long * 4)(0, 0, 0, 200_000_000), None)"
    ),
    "a limit on file sizes": "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))",
}


@attack(77, "has itself killed by a limit or timer that it set")
async def has_itself_killed(world: World) -> None:
    for name, code in ENDINGS.items():
        for spin in ("while True: pass", "open('f', 'w').write('x')\nwhile True: pass"):
            own_doing(await world.call(f"{PRELUDE}{code}\n{spin}", hasty=True))
            async with world.session(hasty=True) as session:
                own_doing(await session.call(PRELUDE + code))
                result = await session.call(spin)
                assert result.kind in (Kind.TIMEOUT, Kind.KILLED, Kind.ERROR), (name, result)


@attack(78, "dies between two calls, of what cannot be repeated")
async def dies_between(world: World) -> None:
    for code in ENDINGS.values():
        async with world.session() as session:
            own_doing(await session.call(f"{PRELUDE}x = os.urandom(4)\nprint(x)\n{code}"))
            await asyncio.sleep(0.4)
            for _ in range(2):
                own_doing(await session.call("x"))


BREAKS_FORKS = {
    "a byte on every channel": (
        "for n in range(5, 64):\n        try: os.write(n, b'x')\n        except OSError: pass\n"
        "    return -1"
    ),
    "an exit": "os._exit(0)",
    "a signal": "ctypes.string_at(0)",
    "nothing": "return -1",
    "two forks": "old_fork()\n    return old_fork()",
}


@attack(79, "breaks its fork while a sibling works")
async def breaks_forks(world: World) -> None:
    for name, how in BREAKS_FORKS.items():
        async with world.session() as trunk:
            await trunk.call("x = 41")
            state = trunk.state
            async with world.session(at=state) as honest, world.session(at=state) as evil:
                working = asyncio.create_task(
                    honest.call("import time\ntime.sleep(1.5)\nprint('done')\nx + 1")
                )
                await evil.call(
                    f"{PRELUDE}branch = sys.modules['sandbox.branch']\nold_fork = branch.fork\n"
                    f"def fork():\n    {how}\nbranch.fork = fork"
                )
                own_doing(await evil.call("1"))
                result = await working
                assert (result.value, result.stdout) == ("42", "done\n"), (name, result)
                assert (await honest.call("x")).value == "41"


@attack(80, "has more threads than a sibling can bear")
async def hoards_threads(world: World) -> None:
    hoard = (
        "import threading\ngo, made = threading.Event(), 0\nthreading.stack_size(64 << 10)\ntry:\n"
        "    while made < 2000:\n        threading.Thread(target=go.wait, daemon=True).start()\n"
        "        made += 1\nexcept RuntimeError: pass\nmade"
    )
    async with world.session() as trunk:
        await trunk.call("x = 41")
        state = trunk.state
        hoards = [await world.patient.open(at=state) for _ in range(4)]
        for session in hoards:
            made = await session.call(hoard)
            assert made.kind is Kind.OK and 10 < int(made.value or 0) < 100, made
        async with world.session(at=state) as late:
            started = time.monotonic()
            assert (await late.call("x + 1")).value == "42"
            assert time.monotonic() - started < 10
        for session in hoards:
            await session.close()
