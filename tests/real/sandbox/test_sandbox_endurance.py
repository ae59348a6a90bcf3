"""Many mixed calls with branches: every value is right, nothing is left, and memory stays flat."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from processes import children, eventually, family

from sandbox.limits import Limits
from sandbox.results import Kind
from sandbox.supervisor import Sandbox, Session

pytestmark = pytest.mark.real

LIMITS = Limits(wall_s=1, cpu_s=1, memory_mib=256)
GROWTH_BYTES = 24 << 20
"""That allocators and caches may keep beyond what they had after the first fifth of the calls."""
COUNT = "n += 1\nn"
ASIDE = (
    (COUNT, Kind.OK),
    (COUNT, Kind.OK),
    (COUNT, Kind.OK),
    ("n += 1\nopen('note', 'w').write('x' * 9000)\nprint('y' * 9000)\nn", Kind.OK),
    ("import threading\nn += 1\nt = threading.Thread(target=int)\nt.start()\nt.join()\nn", Kind.OK),
    ("undefined", Kind.ERROR),
    ("kept = bytearray(1 << 30)", Kind.MEMORY),
    ("raise SystemExit(3)", Kind.EXITED),
)
FATAL = (
    ("import os\nos._exit(1)", Kind.EXITED),
    ("import ctypes\nctypes.string_at(0)", Kind.KILLED),
    ("print('z' * (2 << 20))", Kind.OUTPUT),
    ("import os\nos.write(3, b'?' * 99)", Kind.KILLED),
    ("while True: pass", Kind.TIMEOUT),
)


@dataclass
class March:
    """So many calls, in trees of sessions that branch."""

    sandbox: Sandbox
    left: int
    source: random.Random
    failures: int = 0

    async def go(self) -> None:
        while self.left > 0:
            tree = f"tree {self.source.random()}"
            trunk, reached, n = await self.sandbox.open("n = 0", tree=tree), [], 0
            for _ in range(10):
                n = await self.step(trunk, n)
                reached.append((trunk.state, n))
            for state, before in self.source.sample(reached, 3):
                branch = await self.sandbox.open(at=state)
                for _ in range(3):
                    before = await self.step(branch, before)
                await branch.close()
            await trunk.close()
            await self.sandbox.release(tree)

    async def step(self, session: Session, n: int) -> int:
        """One call of any kind; what `n` is then."""
        self.left -= 1
        code, kind = self.source.choice(FATAL if self.source.random() < 0.02 else ASIDE)
        result = await session.call(code)
        assert result.kind is kind, (code, result)
        counts = code.endswith("\nn")
        assert not counts or result.value == str(n + 1), (code, n, result)
        return n + counts


def resident(others: set[int]) -> int:
    """Bytes of this process and of all below it, but for the `others`, which earlier tests left."""
    found = 0
    for pid in family(os.getpid()) - others | {os.getpid()}:
        with suppress(psutil.NoSuchProcess):
            found += psutil.Process(pid).memory_info().rss
    return found


@pytest.mark.parametrize(
    "calls", [400, pytest.param(10_000, marks=pytest.mark.long)], ids=["short", "long"]
)
async def test_many_calls_leave_nothing(
    calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mine, others = children(os.getpid()), family(os.getpid())
    before = len(os.listdir("/proc/self/fd"))
    async with Sandbox(LIMITS, sessions=8) as sandbox:
        source, sizes, idle = random.Random(11), list[int](), list[int]()
        for _ in range(5):
            march = March(sandbox, calls // 5, source)
            await asyncio.gather(*(march.go() for _ in range(3)))
            gc.collect()
            await eventually(lambda: len(family(os.getpid()) - others) <= 2, "processes are left")
            idle.append(len(os.listdir("/proc/self/fd")))
            sizes.append(resident(others))
        assert len(set(idle)) == 1, idle
        assert max(sizes) - sizes[0] < GROWTH_BYTES, [size >> 20 for size in sizes]
        files = [name for _, folders, names in os.walk(tmp_path) for name in (*folders, *names)]
        assert len(files) <= 2, files  # the root of the work folders and the canary
        assert sandbox.gauges()["failures"] == 0
    print(f"{calls} calls, resident MiB after each fifth: {[size >> 20 for size in sizes]}")
    await eventually(lambda: len(os.listdir("/proc/self/fd")) <= before, "descriptors are left")
    await eventually(lambda: children(os.getpid()) == mine, "processes are left")
    assert not os.listdir(tmp_path)
