"""Attacks 107 to 112: branches that die at their birth or soon after, states that show themselves
to nobody, and what an honest cell can leave that makes a branch hard to begin."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from against_branches_again import own_doing
from catalogue import PRELUDE, attack

from sandbox.results import KEPT, FileRefused, Kind

if TYPE_CHECKING:
    from host import World

LONELY = f"{PRELUDE}import time\nbranch = sys.modules['sandbox.branch']\nprint(os.urandom(8))\n"
"""A state that does not come out the same again."""
DIES_ONCE_BORN = (
    "born = branch._be_born\nbranch._be_born = lambda *order: (born(*order), ctypes.string_at(0))"
)


HAS_TROUBLE = "born = branch._be_born\nbranch._be_born = lambda ticket, _: born(ticket, 5)"
"""Its branches are killed by the supervisor, which is no loss from outside."""


@attack(107, "dies as soon as it is born")
async def dies_once_born(world: World) -> None:
    async with world.session() as trunk:
        own_doing(await trunk.call(LONELY + HAS_TROUBLE))
        async with world.session(at=trunk.state) as one, world.session(at=trunk.state) as two:
            for session in (one, two, trunk, one):
                own_doing(await session.call("1"))
    async with world.session() as trunk:
        own_doing(await trunk.call(LONELY + DIES_ONCE_BORN))
        crowd = [await world.patient.open(at=trunk.state) for _ in range(10)]
        for _ in range(6):
            for result in await asyncio.gather(*(session.call("1") for session in crowd)):
                assert result.kind is Kind.KILLED, result
        for session in crowd:
            await session.close()


HIDES_UNBORN = """old = branch.fork
def fork():
    made = old()
    if made == 0:
        os.closerange(0, 64)
        time.sleep(60)
    return -1
branch.fork = fork
"""
DIES_UNBORN = "branch.take_over = lambda *order: (time.sleep({}), os._exit(0))"


@attack(108, "has siblings that die at their birth with it")
async def dies_with_others(world: World) -> None:
    for waits_s in ((0, 0), (0.2, 0.2), (0, 0.3, 0.3), (0.1, 0.4)):
        async with world.session() as trunk:
            await trunk.call("x = 41")
            state = trunk.state
            honest = await world.patient.open(at=state)
            dying = [await world.patient.open(at=state) for _ in waits_s]
            for session, wait_s in zip(dying, waits_s, strict=True):
                own_doing(await session.call(LONELY + DIES_UNBORN.format(wait_s)))
            everybody = [honest, *dying]
            first, *others = await asyncio.gather(*(each.call("x") for each in everybody))
            for session in everybody:
                await session.close()
            assert first.value == "41", (waits_s, first)
            assert {result.kind for result in others} == {Kind.KILLED}, (waits_s, others)
    for delay_s in (0.004, 0.008, 0.01, 0.011, 0.012, 0.013, 0.014, 0.016):
        async with world.session() as trunk:
            await trunk.call("x = 41")
            state = trunk.state
            async with world.session(at=state) as one, world.session(at=state) as two:
                own_doing(await one.call(LONELY + HIDES_UNBORN))
                own_doing(await two.call(LONELY + DIES_UNBORN.format(0.6)))
                hidden = asyncio.create_task(one.call("1"))
                await asyncio.sleep(delay_s)
                for result in (await two.call("1"), await hidden):
                    assert result.kind is Kind.KILLED, (delay_s, result)


SHOWS_NOTHING = (
    "open('f', 'w').write('x')\nkept = os.open('f', 0)\nbranch.show_owner = lambda *_: {}"
)
MUTE = ("None", "os.write(3, b'x' * 500)", "os._exit(3)")


@attack(109, "shows itself to nobody and is wanted by two")
async def wanted_by_two(world: World) -> None:
    for how in MUTE:
        async with world.session() as trunk:
            own_doing(await trunk.call(LONELY + SHOWS_NOTHING.format(how)))
            state = trunk.state
            async with world.session(at=state) as one, world.session(at=state) as two:
                for session in (one, two, one, two, trunk):
                    own_doing(await session.call("1"))


@attack(110, "does not let a file be put into its folder")
async def refuses_files(world: World) -> None:
    for how in (*MUTE, "time.sleep(99)"):
        async with world.session() as session:
            own_doing(await session.call(f"{LONELY}branch.show_owner = lambda *_: {how}"))
            for _ in range(2):
                try:
                    await session.put("f", b"x")
                    await session.get("f")
                except FileRefused:
                    pass
            own_doing(await session.call("1"))


OPENS_MANY = "open('f', 'w').write('x')\nkept = [open(os.__file__) for _ in range({})]\nlen(kept)"
OPENS_ALL = (
    "kept = []\ntry:\n    while True: kept.append(open(os.__file__))\nexcept OSError: pass\n1"
)


@attack(111, "makes folders so deep, and opens so many files, that a copy lacks descriptors")
async def hard_to_copy(world: World) -> None:
    begin, look = "import os\nprint(os.urandom(4))\n", "kept[-1].read(1) != '' and len(kept)"
    for opens in (*map(OPENS_MANY.format, range(50, 59)), f"open('f', 'w').close()\n{OPENS_ALL}"):
        async with world.session() as session:
            made = await session.call(begin + opens)
            assert made.snapshot == KEPT and made.value is not None, (opens, made)
            result = await session.call(look)
            assert result.kind is Kind.OK and int(result.value or 0) >= 50, (opens, result)
    for depth in (28, 29, 40, 60):
        async with world.session() as session:
            made = await session.call(f"{begin}os.makedirs('/'.join('d' * {depth}))")
            assert made.snapshot == KEPT, made
            result = await session.call("sum(len(names) for _, names, _ in os.walk('.'))")
            assert result.value == str(depth), (depth, result)


@attack(112, "asks by a futex whether a thread of others exists")
async def asks_by_futex(world: World) -> None:
    ask = (
        "number = 202 if os.uname().machine == 'x86_64' else 98\n"
        "def ask(operation, task):\n"
        "    word, limit = ctypes.c_uint32(task), (ctypes.c_long * 2)(0, 1)\n"
        "    done = libc.syscall(number, ctypes.byref(word), operation | 128, 0, limit, None, 0)\n"
        "    return ctypes.get_errno() if done < 0 else done\n"
    )
    look = "sorted({ask(operation, task) for operation in (6, 7, 8, 11, 12, 13) "
    look += "for task in range(1, 999)})"
    async with world.session() as other:
        await other.call("1")
        result = await world.call(PRELUDE + ask + look)
        assert result.value == "[38]", result
