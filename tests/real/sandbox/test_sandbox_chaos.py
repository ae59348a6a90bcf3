"""Sandboxes under fire: processes are killed at random moments, and nothing is left or wrong."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from processes import children, eventually, family

from sandbox.limits import Limits
from sandbox.results import Kind, SandboxFailure, SessionState
from sandbox.supervisor import Sandbox, Session

pytestmark = pytest.mark.real

LIMITS = Limits(wall_s=8, cpu_s=8, memory_mib=256)
CELL = (
    "import time\nx += 1\nopen('note', 'w').write(str(x))\ntime.sleep(0.01)\nx, open('note').read()"
)


Victims = Callable[[set[int], bool], set[int]]
"""Chooses among the spawners' processes; the flag says whether they are in namespaces."""


@dataclass
class Siege:
    """Sessions that count and branch, and somebody who kills."""

    sandbox: Sandbox
    mine: set[int]
    """Processes that were there before."""
    until: float
    source: random.Random
    wrong: list[object] = field(default_factory=list)
    good: int = 0
    failures: int = 0

    async def opened(self, setup: str = "x = 0", at: SessionState | None = None) -> Session:
        """Opened at last: until then the only exception is the documented one."""
        while True:
            try:
                return await self.sandbox.open("" if at else setup, at)
            except SandboxFailure:
                self.failures += 1

    async def count(self) -> None:
        """One session after the other, each of which must count on whatever it lost, and so must
        branches from where they have been."""
        while time.monotonic() < self.until:
            session, reached = await self.opened(), list[SessionState]()
            for expected in range(1, 7):
                await self.step(session, expected)
                reached.append(session.state)
            past = self.source.randrange(len(reached))
            branches = [await self.opened(at=reached[past]) for _ in range(2)]
            await asyncio.gather(*(self.step(branch, past + 2) for branch in branches))
            await asyncio.gather(*(each.close() for each in (session, *branches)))

    async def step(self, session: Session, expected: int) -> None:
        """One call, made again as often as the sandbox fails."""
        while True:
            started = time.monotonic()
            result = await session.call(CELL)
            took = time.monotonic() - started - result.queue_s
            if took > LIMITS.wall_s + 1:
                self.wrong.append((took, result))
            if result.kind is not Kind.SANDBOX_FAILURE:
                break
            self.failures += 1
            if time.monotonic() > self.until + 30:
                self.wrong.append(("no way on", result))
                return
        self.good += 1
        if result.kind is not Kind.OK or result.value != repr((expected, str(expected))):
            self.wrong.append((expected, result))

    async def kill(self, victims: Victims) -> int:
        """Kill one of the `victims` among the spawner's processes every now and then."""
        killed = 0
        while time.monotonic() < self.until:
            await asyncio.sleep(self.source.uniform(0.01, 0.6))
            found = sorted(
                victims(children(os.getpid()) - self.mine, self.sandbox.isolation == "strong")
            )
            if found:
                with suppress(ProcessLookupError):  # it ended by itself
                    os.kill(self.source.choice(found), signal.SIGKILL)
                    killed += 1
        return killed


def outer(spawners: set[int], walled: bool) -> set[int]:
    return spawners


def inner(spawners: set[int], walled: bool) -> set[int]:
    """In namespaces, process 1; else the spawner itself."""
    return {child for pid in spawners for child in children(pid)} if walled else spawners


def sessions(spawners: set[int], walled: bool) -> set[int]:
    return {member for pid in inner(spawners, walled) for member in family(pid)}


def descriptors() -> list[str]:
    """What is open here."""
    found = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    return [os.readlink(link) for link in found if os.path.lexists(link)]


@pytest.mark.parametrize(
    "seconds", [7, pytest.param(200, marks=pytest.mark.long)], ids=["short", "long"]
)
@pytest.mark.parametrize("victims", [sessions, inner, outer])
async def test_kills_at_random_moments_leave_nothing_behind(
    victims: Victims,
    seconds: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed: int = 7,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mine, before = children(os.getpid()), descriptors()
    sandbox = Sandbox(LIMITS, sessions=12)
    source = random.Random(seed)
    siege = Siege(sandbox, mine, time.monotonic() + seconds, source)
    asyncio.get_running_loop().set_exception_handler(lambda _, said: siege.wrong.append(said))
    await (await siege.opened()).close()
    killing = asyncio.create_task(siege.kill(victims))
    async with asyncio.timeout(seconds + 60):
        await asyncio.gather(*(siege.count() for _ in range(3)))
        killed = await killing
    await sandbox.close()
    gc.collect()  # exceptions that nobody waited for are reported now
    assert not siege.wrong, siege.wrong[:3]
    assert killed > 3 and siege.good > 3, (killed, siege.good)
    print(f"{killed} kills, {siege.good} calls, {siege.failures} failures, each made good")

    await eventually(lambda: len(descriptors()) <= len(before), "descriptors are left")
    await eventually(lambda: children(os.getpid()) == mine, "processes are left")
    assert not os.listdir(tmp_path)
