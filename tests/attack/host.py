"""A supervisor under attack: a process of its own, so that its surroundings can be chosen.

`python host.py [user] [container | bubblewrap]` reads the number of an attack a line and answers
each with a line of JSON: `null`, or what went wrong. Besides the attack's own expectation it checks
after each that the canary is untouched, that the next call works, and that no process is left.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import socket
import sys
import tempfile
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import surroundings

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from processes import eventually, family, working_in  # noqa: E402

from sandbox.limits import Limits  # noqa: E402
from sandbox.results import CallResult, SessionState  # noqa: E402
from sandbox.supervisor import Sandbox, Session  # noqa: E402

PATIENT = Limits(wall_s=30, cpu_s=30, memory_mib=256)
"""Generous in time: a busy machine fails no test."""
HASTY = Limits(wall_s=1, cpu_s=1, memory_mib=256)
"""For attacks that shall run into a limit."""


@dataclass
class World:
    """What attacks see of the host: two sandboxes, and things that must stay out of reach."""

    folder: Path
    patient: Sandbox
    hasty: Sandbox
    tcp: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))
    secret: str = field(default_factory=lambda: secrets.token_hex(8))
    idle: tuple[int, int] = (0, 0)
    """Processes, and files, while no session is open."""

    @property
    def canary(self) -> str:
        """A file that everybody may read and write, were it not for the sandbox."""
        return str(self.folder / "open to all" / "canary")

    @property
    def port(self) -> int:
        """Where something listens on the loopback interface."""
        return int(self.tcp.getsockname()[1])

    @asynccontextmanager
    async def session(
        self, hasty: bool = False, at: SessionState | None = None
    ) -> AsyncIterator[Session]:
        session = await (self.hasty if hasty else self.patient).open(at=at)
        try:
            yield session
        finally:
            await session.close()

    async def call(self, code: str, hasty: bool = False) -> CallResult:
        """Run one cell in a session of its own, then look if that session goes on."""
        async with self.session(hasty) as session:
            await session.call("before = 41")
            result = await session.call(code)
            after = await session.call("before + 1")
            assert after.value == "42", (result, after)
            assert {result.isolation, after.isolation} == {self.patient.isolation}
        return result

    async def begin(self) -> None:
        os.environ["SECRET_TOKEN"] = self.secret
        (self.folder / "open to all").mkdir()
        (self.folder / "open to all").chmod(0o777)
        Path(self.canary).write_text(self.secret)
        Path(self.canary).chmod(0o666)
        assert self.patient.isolation == ""
        await self.call("1")
        await self.call("1", hasty=True)
        await asyncio.sleep(0.2)
        self.idle = self.remains()

    def remains(self) -> tuple[int, int]:
        """Processes, and files in reach of sessions, that are there now."""
        files = sum(len(names) + len(inner) for _, inner, names in os.walk(self.folder))
        return len(family(os.getpid())), files

    def is_idle(self) -> bool:
        """Whether nothing is left of any session."""
        return all(map(int.__le__, self.remains(), self.idle))

    async def aftermath(self) -> None:
        """What must hold after any attack."""
        assert Path(self.canary).read_text() == self.secret
        found = os.stat(self.canary)
        assert found.st_mode & 0o777 == 0o666 and found.st_mtime > 0
        assert os.listdir(self.folder / "open to all") == ["canary"]
        for hasty in (False, True):
            assert (await self.call("1 + 1", hasty)).value == "2"
        await eventually(self.is_idle, f"processes or files are left, beyond {self.idle}", 30)
        left = working_in(self.folder) - family(os.getpid())
        assert not left, f"processes ran away: {left}"


async def serve() -> None:
    folder = Path(tempfile.mkdtemp(prefix="attacked-"))
    folder.chmod(0o755)
    tempfile.tempdir = str(folder)
    from catalogue import ATTACKS

    try:
        walls = "bubblewrap" in sys.argv
        async with (
            Sandbox(PATIENT, bubblewrap=walls) as patient,
            Sandbox(HASTY, bubblewrap=walls) as hasty,
        ):
            world = World(folder, patient, hasty)
            await world.begin()
            print(json.dumps({"isolation": patient.isolation}), flush=True)
            while line := await asyncio.to_thread(sys.stdin.readline):
                error = None
                try:
                    async with asyncio.timeout(120):
                        await ATTACKS[int(line)].run(world)
                        await world.aftermath()
                except Exception:  # reported to the test, which fails
                    error = traceback.format_exc()
                print(json.dumps(error), flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    if "user" in sys.argv:
        try:
            surroundings.ordinary_user([ROOT, Path(sys.prefix), Path(sys.base_prefix)])
        except surroundings.Absent as absent:
            print(json.dumps({"absent": str(absent)}), flush=True)
            return
    if "bubblewrap" in sys.argv and shutil.which("bwrap") is None:
        print(json.dumps({"absent": "there is no bwrap"}), flush=True)
        return
    if "container" in sys.argv:
        surroundings.like_a_container()
    os.chdir("/")
    asyncio.run(serve())


if __name__ == "__main__":
    main()
