"""One confined family of processes: the first, and all that were forked from it.

They share a user, a ruleset and a filter, and end when the first ends. Invariant: such a process
forks once for each time that it was asked to here, and at no other time; the kernel stops every
attempt and asks.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import select
import struct
from contextlib import suppress

from sandbox.launch import SpawnerClient
from sandbox.process import Ends, Refused, SessionProcess, Tampered
from sandbox.results import SandboxFailure
from sandbox.workdir import TreeFolder

_RECEIVE, _ANSWER = 0xC0502100, 0xC0182101
_NOTICE_BYTES = 80
_CONTINUE = 1
_EPERM = 1


class Lineage:
    """Made by `begin`; belongs to one event loop."""

    def __init__(self, client: SpawnerClient, first: SessionProcess, folder: TreeFolder) -> None:
        self._loop = asyncio.get_running_loop()
        self._client = client
        self.first = first
        self._folder = folder
        self._cleaning: set[asyncio.Future[None]] = set()
        self._members = {first.pid: first}
        self._asked: set[int] = set()
        """Process ids that may fork once."""
        self._closing: asyncio.Task[None] | None = None
        first.end.add_done_callback(lambda _: self.close())
        if first.listener >= 0:
            self._loop.add_reader(first.listener, self._on_attempt)

    @classmethod
    async def begin(cls, client: SpawnerClient, folders: int) -> Lineage:
        """A new family, of which `folders` can work at a time. Raises SandboxFailure."""
        first, folder = await client.spawn(folders)
        return cls(client, first, folder)

    @property
    def closed(self) -> bool:
        return self._closing is not None

    @property
    def forks(self) -> bool:
        """Whether this machine lets forks be decided from outside."""
        return self.first.listener >= 0

    async def fork(self, parent: SessionProcess) -> SessionProcess:
        """A branch that is in the state of `parent`, which must be alone in itself.

        Raises SandboxFailure; the whole family is then gone if its code tampered with the fork.
        """
        folder = self._folder.take()
        if folder is None:
            raise Refused("no work folder is free")
        try:
            ends = Ends()
        except OSError as error:
            self._folder.give_back(folder)
            raise SandboxFailure(f"no branch: {error}") from error
        branch = SessionProcess(ends, folder)
        self._asked.add(parent.pid)
        try:
            parent.order_fork(ends, folder)
            ends.sent()
            await self._client.adopt(branch, self.first)
        except BaseException as error:
            await self._discard(branch, error)
            if isinstance(error, OSError):
                raise SandboxFailure(f"no branch: {error}") from error
            raise
        finally:
            self._asked.discard(parent.pid)
            parent.pause()
        self._members[branch.pid] = branch
        branch.end.add_done_callback(lambda _: self._on_end(branch))
        return branch

    def retire(self, process: SessionProcess) -> None:
        """It will only be forked: give up what printing needs, and hide its folder from the code
        of its branches, which may have noted where it was."""
        if process.retire():
            with suppress(FileNotFoundError):  # it died meanwhile
                process.folder = self._folder.rename(process.folder)

    async def _discard(self, branch: SessionProcess, error: BaseException) -> None:
        """End a branch that came to nothing, with all others if it may not be what it seems."""
        branch.kill()
        if isinstance(error, Tampered):
            self.close()
        elif isinstance(error, Refused):  # nobody has ever worked in it
            self._folder.give_back(branch.folder)

    def _on_end(self, member: SessionProcess) -> None:
        self._members.pop(member.pid, None)
        if self._closing is None:
            cleaning = self._loop.run_in_executor(None, self._folder.give_back, member.folder)
            self._cleaning.add(cleaning)
            cleaning.add_done_callback(self._cleaning.discard)

    def close(self) -> asyncio.Task[None]:
        """Kill everybody; the task ends when all are gone, with their folders. Idempotent."""
        if self._closing is None:
            self._closing = self._loop.create_task(self._vanish())
        return self._closing

    async def _vanish(self) -> None:
        self._client.kill_tree(self.first)
        members = list(self._members.values())
        await asyncio.gather(*(member.kill() for member in members))
        if self.forks:
            self._loop.remove_reader(self.first.listener)
            os.close(self.first.listener)
            self.first.listener = -1
        await asyncio.gather(*self._cleaning)
        await asyncio.to_thread(self._folder.remove)

    def _on_attempt(self) -> None:
        """A process wants to fork: once if it was asked to."""
        notice = bytearray(_NOTICE_BYTES)
        try:
            fcntl.ioctl(self.first.listener, _RECEIVE, notice)
        except OSError:  # it died meanwhile; perhaps they all did, and nobody can ask again
            self._stop_listening_to_nobody()
            return
        number, pid = struct.unpack_from("=QI", notice)
        wanted = pid in self._asked
        self._asked.discard(pid)
        answer = struct.pack("=QqiI", number, 0, *((0, _CONTINUE) if wanted else (-_EPERM, 0)))
        try:
            fcntl.ioctl(self.first.listener, _ANSWER, answer)
        except OSError:
            return  # it died meanwhile
        if not wanted and pid in self._members:
            self._members[pid].accuse("tried to start a process by the sandbox's own way")

    def _stop_listening_to_nobody(self) -> None:
        poll = select.poll()
        poll.register(self.first.listener, 0)
        if poll.poll(0):
            self._loop.remove_reader(self.first.listener)
