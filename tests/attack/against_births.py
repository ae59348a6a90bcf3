"""Attack 107 and those after it: branches that die at their birth or soon after, states that show themselves
to nobody, and what an honest cell can leave that makes a branch hard to begin."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from against_branches_again import own_doing
from catalogue import PRELUDE, attack

from sandbox.results import Kind

if TYPE_CHECKING:
    from host import World

LONELY = f"{PRELUDE}import time\nbranch = sys.modules['sandbox.branch']\nprint(os.urandom(8))\n"
"""A state that does not come out the same again."""
DIES_ONCE_BORN = (
    "born = branch._be_born\nbranch._be_born = lambda *order: (born(*order), ctypes.string_at(0))"
)


@attack(107, "dies as soon as it is born")
async def dies_once_born(world: World) -> None:
    async with world.session() as trunk:
        own_doing(await trunk.call(LONELY + DIES_ONCE_BORN))
        crowd = [await world.patient.open(at=trunk.state) for _ in range(10)]
        for _ in range(6):
            for result in await asyncio.gather(*(session.call("1") for session in crowd)):
                assert result.kind is Kind.KILLED, result
        for session in crowd:
            await session.close()
