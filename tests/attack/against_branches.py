"""Attacks 62 to 67 and 69: what branches could leak to each other, and the death of the host."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

from catalogue import PRELUDE, attack
from host import ROOT
from processes import ended, eventually, family, working_in

from sandbox.results import Kind, SessionState
from sandbox.supervisor import Sandbox, Session

if TYPE_CHECKING:
    from host import World

ACROSS, FEWER = 1000, 200
"""Attacks a tree, of those that run at the same time: many as an ordinary user in a container and
as root in the open, fewer in the other surroundings, for time's sake."""


@attack(62, "leaks files to a sibling branch")
async def leaks_files(world: World) -> None:
    async with world.session() as trunk:
        await trunk.call("import os\nopen('common', 'w').write('old.')\nwhere = os.getcwd()")
        state = trunk.state
        async with world.session(at=state) as one, world.session(at=state) as two:
            await one.call("open('secret', 'w').write('1')\nopen('common', 'r+').write('new!')")
            assert (await two.call("os.listdir(), open('common').read()")).value == (
                "(['common'], 'old.')"
            )
            assert (await one.call("open('common').read()")).value == "'new!'"


LEAKS = {
    "a mapped file": (
        "import mmap\ntry: shared = mmap.mmap(os.open('common', os.O_RDWR), 4)\n"
        "except OSError: shared = bytearray(b'old.')",
        "shared[:1] = b'x'",
        "bytes(shared[:1])",
    ),
    "a mapped file without descriptor": (
        "libc.mmap.restype = ctypes.c_void_p\nfd = os.open('common', os.O_RDWR)\n"
        "got = libc.mmap(None, 4096, 3, 1, fd, ctypes.c_long(0))\nos.close(fd)\n"
        "got = None if got == ctypes.c_void_p(-1).value else got\n"
        "shared = (ctypes.c_char * 4).from_address(got) if got else bytearray(b'old.')",
        "shared[:1] = b'x'",
        "bytes(shared[:1])",
    ),
    "shared memory": (
        "import mmap\ntry: shared = mmap.mmap(-1, 4096)\n"
        "except OSError: shared = bytearray(b'o')\nshared[:1] = b'o'",
        "shared[:1] = b'x'",
        "bytes(shared[:1])",
    ),
    "/dev/zero": (
        "import mmap\ntry: shared = mmap.mmap(os.open('/dev/zero', os.O_RDWR), 4096)\n"
        "except OSError: shared = bytearray(b'o')\nshared[:1] = b'o'",
        "shared[:1] = b'x'",
        "bytes(shared[:1])",
    ),
    "an open folder": (
        "folder = os.open('.', os.O_RDONLY)",
        "fd = os.open('common', os.O_WRONLY, dir_fd=folder)\nos.write(fd, b'x')\nos.close(fd)",
        "open('common', 'rb').read(1)",
    ),
    "an open folder, denied": (
        "import gc\nfolder = os.open('.', os.O_RDONLY)\n"
        "for o in gc.get_objects():\n    if type(o).__name__ == 'Runner':\n"
        "        o._beyond = type('Poll', (), {'poll': lambda *_: []})()",
        "fd = os.open('common', os.O_WRONLY, dir_fd=folder)\nos.write(fd, b'x')\nos.close(fd)",
        "open('common', 'rb').read(1)",
    ),
    "the true name of the folder": (
        "try: true = os.readlink('/proc/self/fd/4')\nexcept OSError: true = os.path.realpath('.')",
        "for path in (true, where):\n    try: open(path + '/common', 'r+').write('x')\n"
        "    except OSError: pass",
        "open('common', 'rb').read(1)",
    ),
    "the true name of the folder, found again": (
        "try: true = os.readlink('/proc/self/fd/4')\nexcept OSError: true = os.path.realpath('.')",
        "for path in (true, where):\n    try: open(path + '/note', 'w').write('x')\n"
        "    except OSError: pass",
        "found = []\nfor path in (true, where):\n    try: found += open(path + '/note').read()\n"
        "    except OSError: pass\n''.join(found).encode() or b'o'",
    ),
    "a pipe": (
        "reading, writing = os.pipe()\nos.set_blocking(reading, False)",
        "os.write(writing, b'x')",
        "try: got = os.read(reading, 1)\nexcept BlockingIOError: got = b'o'\ngot",
    ),
}
"""By what two branches may have something in common: how it is made, one's deed, another's look."""


@attack(70, "leaves a channel between branches")
async def leaves_a_channel(world: World) -> None:
    leaks = []
    for name, (make, deed, look) in LEAKS.items():
        async with world.session() as trunk:
            await trunk.call(
                PRELUDE + "open('common', 'w').write('old.')\nwhere = os.getcwd()\n" + make
            )
            state = trunk.state
            async with world.session(at=state) as one, world.session(at=state) as two:
                await one.call(deed)
                seen = [await two.call(look)]
            async with world.session(at=state) as late:
                seen.append(await late.call(look))
        if [result.value for result in seen] != ["b'o'"] * 2:
            leaks.append((name, seen))
    assert not leaks, leaks


@attack(63, "shares an open file with a sibling branch")
async def shares_files(world: World) -> None:
    async with world.session() as trunk:
        await trunk.call("open('text', 'w').write('abcdef')\nfile = open('text')\nfile.read(2)")
        state = trunk.state
        await trunk.call("first = file.read(2)")
        async with world.session(at=state) as one, world.session(at=state) as two:
            for session in (one, two):
                result = await session.call("file.buffer.raw.tell(), file.read()")
                assert result.value == "(6, 'cdef')", result


@attack(64, "draws other chances in a branch than in a replay")
async def chances(world: World) -> None:
    async with world.session() as trunk:
        await trunk.call("import random\nrandom.random()")
        state = trunk.state
        seen = [(await trunk.call("random.random(), random.randrange(10**9)")).value]
        for _ in range(2):
            async with world.session(at=state) as branch:
                seen.append((await branch.call("random.random(), random.randrange(10**9)")).value)
    async with Sandbox(world.patient.limits) as elsewhere:  # nothing of it is here: a replay
        branch = await elsewhere.open(at=state)
        seen.append((await branch.call("random.random(), random.randrange(10**9)")).value)
    assert len(set(seen)) == 1, seen


@attack(65, "holds a lock in a thread when a branch is made")
async def holds_a_lock(world: World) -> None:
    async with world.session() as trunk:
        await trunk.call(
            "import threading\nlock, held = threading.Lock(), threading.Event()\n"
            "def hold():\n    lock.acquire()\n    held.set()\n    threading.Event().wait()\n"
            "threading.Thread(target=hold, daemon=True).start()\nheld.wait()"
        )
        for state in (trunk.state, trunk.state):
            async with world.session(at=state) as branch:
                result = await branch.call("lock.locked(), threading.active_count()")
                assert result.value == "(True, 2)", result
        assert (await trunk.call("threading.active_count()")).value == "2"


@attack(66, "goes 60 calls deep")
async def deep(world: World) -> None:
    async with world.session() as trunk:
        await trunk.call("xs = []")
        states: list[SessionState] = []
        for depth in range(60):
            result = await trunk.call(f"xs.append({depth})\nlen(xs)")
            assert result.value == str(depth + 1), result
            states.append(trunk.state)
        for depth in (0, 30, 59):
            async with world.session(at=states[depth]) as branch:
                assert (await branch.call("len(xs), xs[-1]")).value == f"({depth + 1}, {depth})"


VICTIM = """
import asyncio, sys, tempfile
sys.path.insert(0, sys.argv[1])
tempfile.tempdir = sys.argv[2]
from sandbox.supervisor import Sandbox
async def main():
    sandbox = Sandbox()
    calm, wild = await sandbox.open(), await sandbox.open()
    await calm.call("x = 1")
    call = asyncio.create_task(wild.call("while True: pass"))
    await asyncio.sleep(0.3)
    print("ready", flush=True)
    await asyncio.sleep(99)
asyncio.run(main())
"""


@attack(67, "outlives a supervisor that is killed")
async def outlives(world: World) -> None:
    folder = world.folder / "victim"
    folder.mkdir()
    command = [sys.executable, "-c", VICTIM, str(ROOT), str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert await asyncio.to_thread(process.stdout.readline) == "ready\n"
    members = family(process.pid)
    assert len(members) >= 3
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    patience = max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))
    await ended(members, patience)
    await eventually(lambda: not working_in(folder), "processes ran away", patience)
    await eventually(lambda: not os.listdir(folder), "files are left", 5 * patience)
    folder.rmdir()


MIXTURE = (
    ("print('NAME', NUMBER)\nown, NUMBER", Kind.OK),
    ("open('/etc/passwd')", Kind.ERROR),
    ("import os\nos.fork()", Kind.ERROR),
    ("print('NAME ' * 9000)\nNUMBER", Kind.OK),
    ("open('note', 'w').write('NAME NUMBER')\nopen('note').read()", Kind.OK),
    ("raise SystemExit('NAME NUMBER')", Kind.EXITED),
    ("import os\nos.write(2, b'NAME NUMBER')\n1 / 0", Kind.ERROR),
    ("import socket\nsocket.socket()", Kind.ERROR),
    ("'NAME' * 30_000", Kind.OK),
)
"""What a tree does over and over."""
FATAL = (
    ("import os\nos._exit(0)", Kind.EXITED),
    ("import os\nos.write(3, b'?' * 99)", Kind.KILLED),
)
"""What costs it its process, now and then."""


async def _besiege(session: Session, name: str, other: str, count: int) -> None:
    await session.call(f"own = {name!r}")
    for number in range(count):
        mixture = FATAL if number % 100 == 99 else MIXTURE
        code, kind = mixture[number % len(mixture)]
        result = await session.call(code.replace("NAME", name).replace("NUMBER", str(number)))
        assert result.kind is kind, (code, result)
        said = f"{result.stdout} {result.stderr} {result.value} {result.traceback}"
        assert other not in said, result
        if code.startswith("print('NAME',"):
            assert result.stdout == f"{name} {number}\n"
            assert result.value == f"('{name}', {number})"
    assert (await session.call("own")).value == repr(name)


@attack(69, "mixes attacks in two trees at the same time")
async def two_trees(world: World) -> None:
    strong = world.patient.isolation == "strong"
    count = ACROSS if strong == (os.geteuid() == 0) else FEWER
    async with world.session() as one, world.session() as two:
        await asyncio.gather(
            _besiege(one, "apple", "grape", count), _besiege(two, "grape", "apple", count)
        )
