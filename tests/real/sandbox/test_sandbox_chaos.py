"""Sandboxes under fire: processes are killed at random moments, and nothing is left or wrong."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from processes import children, eventually, family

from sandbox.limits import Limits
from sandbox.results import Kind, SandboxFailure
from sandbox.supervisor import Sandbox, Session

pytestmark = pytest.mark.real

LIMITS = Limits(wall_s=8, cpu_s=8, memory_mib=256)
CELL = (
    "import time\nx += 1\nopen('note', 'w').write(str(x))\ntime.sleep(0.01)\nx, open('note').read()"
)


@dataclass
class Siege:
    """Sessions that count, and somebody who kills."""

    sandbox: Sandbox
    mine: set[int]
    """Processes that were there before."""
    until: float
    wrong: list[object] = field(default_factory=list)
    good: int = 0
    failures: int = 0

    async def opened(self) -> Session:
        while True:
            try:
                session = await self.sandbox.open("x = 0")
                break
            except SandboxFailure:
                self.failures += 1
        return session

    async def count(self) -> None:
        """One session after the other, each of which must count on whatever it lost."""
        while time.monotonic() < self.until:
            session, expected = await self.opened(), 1
            for _ in range(12):
                started = time.monotonic()
                result = await session.call(CELL)
                took = time.monotonic() - started - result.queue_s
                if result.kind is Kind.OK:
                    self.good += 1
                    if result.value != repr((expected, str(expected))):
                        self.wrong.append(result)
                    expected += 1
                else:
                    self.failures += 1
                    if result.kind is not Kind.SANDBOX_FAILURE:
                        self.wrong.append(result)
                if took > LIMITS.wall_s + 1:
                    self.wrong.append((took, result))
            await session.close()

    async def kill(self, victims: Callable[[set[int]], set[int]], source: random.Random) -> int:
        """Kill one of the `victims` among the spawner's processes every now and then."""
        killed = 0
        while time.monotonic() < self.until:
            await asyncio.sleep(source.uniform(0.05, 0.6))
            found = sorted(victims(children(os.getpid()) - self.mine))
            if found:
                os.kill(source.choice(found), signal.SIGKILL)
                killed += 1
        return killed


def outer(spawners: set[int]) -> set[int]:
    return spawners


def inner(spawners: set[int]) -> set[int]:
    """In namespaces, process 1; else the spawner itself."""
    return {child for pid in spawners for child in children(pid)} or spawners


def sessions(spawners: set[int]) -> set[int]:
    return {member for pid in inner(spawners) for member in family(pid)}


def descriptors() -> list[str]:
    """What is open here."""
    found = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    return [os.readlink(link) for link in found if os.path.lexists(link)]


@pytest.mark.parametrize(
    "seconds", [7, pytest.param(200, marks=pytest.mark.long)], ids=["short", "long"]
)
@pytest.mark.parametrize("victims", [sessions, inner, outer])
async def test_kills_at_random_moments_leave_nothing_behind(
    victims: Callable[[set[int]], set[int]],
    seconds: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mine, before = children(os.getpid()), descriptors()
    sandbox = Sandbox(LIMITS, sessions=8)
    siege = Siege(sandbox, mine, time.monotonic() + seconds)
    await siege.opened()
    killing = asyncio.create_task(siege.kill(victims, random.Random(7)))
    async with asyncio.timeout(seconds + 60):
        await asyncio.gather(*(siege.count() for _ in range(3)))
        killed = await killing
    await sandbox.close()
    assert not siege.wrong, siege.wrong[:3]
    assert killed > 3 and siege.good > 3, (killed, siege.good)

    await eventually(lambda: len(descriptors()) <= len(before), "descriptors are left")
    await eventually(lambda: children(os.getpid()) == mine, "processes are left")
    assert not os.listdir(tmp_path)
