"""One confined family of processes: the first, and all that were forked from it.

They share a user, a ruleset and a filter, and end when the first ends. Invariants: such a process
forks once for each time that it was asked to here, and at no other time, and has no more threads
than it may: the kernel stops every attempt and asks. A fork counts only if parent and branch look
afterwards as they must; if not both are killed, and what else came of it. The others go on.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import select
import signal
import struct
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

from sandbox.inspection import Sight, Unseen
from sandbox.launch import SpawnerClient
from sandbox.process import Ends, Refused, SessionProcess, Tampered
from sandbox.results import SandboxFailure
from sandbox.seccomp import STEP_FORK, number_of
from sandbox.shortage import explained
from sandbox.workdir import TreeFolder, aside

_RECEIVE, _ANSWER = 0xC0502100, 0xC0182101
_NOTICE = struct.Struct("=QIII12xQ")
"""Number of the notice, process or thread, flags, system call, first argument; then five more."""
_NOTICE_BYTES = 80
_CONTINUE = 1
UNSEEN = "unseen"
"""What `Lineage.look` says of a process that is gone, or that the kernel does not show."""
_NO_FORK = f"no branch: {explained(OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)))}"
_WINDING_UP_S = 0.05
"""Between looks whether anybody still runs in a family that is to end."""
_SETTLED_S = (0.0, 0.0002, 0.001, 0.005, 0.02, 0.1, 0.4, 1.0)
"""Waits for a parent to give up, after a fork, what it was given for the branch."""


_Seen = TypeVar("_Seen")


class Lineage:
    """Made by `begin`; belongs to one event loop."""

    def __init__(self, client: SpawnerClient, first: SessionProcess, folder: TreeFolder) -> None:
        self._loop = asyncio.get_running_loop()
        self._client = client
        self.first = first
        self._folder = folder
        self._cleaning: set[asyncio.Task[None]] = set()
        self._members = {first.pid: first}
        first.undisturbed = self.undisturbed
        self._asked: set[int] = set()
        """Process ids that may fork once."""
        self._strays = 0
        """Processes that were killed as nobody's branch."""
        self._births = 0
        """Forks under way, of which the branch is no member yet."""
        self._clean = asyncio.Event()
        """Cleared while there may be processes that are nobody's branch."""
        self._clean.set()
        self._winding_up: asyncio.Task[None] | None = None
        self.covered = False
        """Whether its processes must be asked to show themselves."""
        self._window = asyncio.Lock()
        """Held while one of them does."""
        self._showing = 0
        """The one that may, by its process id."""
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
        return self._closing is not None or self._winding_up is not None

    @property
    def forks(self) -> bool:
        """Whether this machine lets forks be decided from outside."""
        return self.first.listener >= 0

    async def fork(self, parent: SessionProcess) -> SessionProcess:
        """A branch that is in the state of `parent`, of which `look` found no fault.

        Raises SandboxFailure; Tampered if the two are not what they must be, and then gone.
        """
        branch, strays = self._unborn(), self._strays
        try:
            async with self._birth(parent, branch):
                parent.order_fork(branch.ends, branch.folder)
                branch.ends.sent()
                await self._client.adopt(branch, self.first)
                self._members[branch.pid] = branch
                branch.end.add_done_callback(lambda _: self._on_end(branch))
                branch.undisturbed = self.undisturbed
            await self._verify(parent, branch)
            branch.folder = self._folder.rename(branch.folder)
        except BaseException as error:
            if isinstance(error, Refused):
                bore = await self._bore(strays)
                error = Tampered("a branch did not greet") if bore else Refused(_NO_FORK)
            by_others = isinstance(error, Tampered | Refused) and await self._lost(parent, branch)
            if self._members.get(branch.pid) is not branch:
                self._clean_up(self._reclaim(branch))
            branch.kill()
            if by_others:
                raise SandboxFailure("a process was killed from outside while it forked") from error
            if isinstance(error, Tampered):
                self.give_up(parent)
            if isinstance(error, OSError):
                raise SandboxFailure(f"no branch: {explained(error)}") from error
            raise error
        finally:
            parent.pause()
        return branch

    async def _lost(self, *processes: SessionProcess) -> bool:
        """Whether one of them was killed from outside, the first of the family included."""
        return any([await each.killed_from_outside() for each in (*processes, self.first)])

    def _unborn(self) -> SessionProcess:
        """What a branch will need. Raises SandboxFailure."""
        folder = self._folder.take()
        if folder is None:
            raise Refused("no work folder is free")
        try:
            return SessionProcess(Ends(), folder)
        except OSError as error:
            self._folder.give_back(folder)
            raise SandboxFailure(f"no branch: {explained(error)}") from error

    async def _reclaim(self, branch: SessionProcess) -> None:
        """Give back the folder of a branch that came to nothing, once nobody can work in it."""
        await branch.close()
        await self._clean.wait()
        await asyncio.sleep(_WINDING_UP_S)
        await aside(self._folder.give_back, branch.folder)

    def _clean_up(self, work: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(work)
        self._cleaning.add(task)
        task.add_done_callback(self._cleaning.discard)

    @asynccontextmanager
    async def _birth(self, parent: SessionProcess, branch: SessionProcess) -> AsyncIterator[None]:
        """While `parent` may fork, once. If nothing good comes of it, all processes are killed that
        are nobody's branch, as soon as no other branch is on its way."""
        await self._clean.wait()
        self._births += 1
        self._asked.add(parent.pid)
        try:
            async with self.undisturbed():
                yield
                if self.covered:  # then nobody runs unnoticed
                    await parent.stopped()
                    await branch.stopped()
        except BaseException as error:
            if parent.pid not in self._asked:  # it did fork: the child may be anybody
                self._clean.clear()
            elif isinstance(error, Refused):
                raise Tampered("a snapshot did not even try to fork") from None
            raise
        finally:
            self._asked.discard(parent.pid)
            self._births -= 1
            if not self._births and not self._clean.is_set():
                self._strays += self._kill_strays()
                self._clean.set()

    async def _bore(self, strays_before: int) -> bool:
        """Whether a fork of which nobody greeted brought forth a process all the same: one that was
        killed as a stray, or one that ended itself. Otherwise the kernel refused it."""
        await self._clean.wait()
        return self._strays > strays_before or self._client.a_stranger_ended()

    def give_up(self, process: SessionProcess) -> None:
        """End a process for good. With the first one all the others would end: those that run come
        to the end of their calls before."""
        if process is not self.first or not self._busy:
            process.kill()
        elif self._winding_up is None:
            process.pause()
            self._winding_up = self._loop.create_task(self._wind_up())

    @property
    def _busy(self) -> bool:
        return self._births > 0 or any(each.running for each in self._members.values())

    async def _wind_up(self) -> None:
        while self._busy:
            await asyncio.sleep(_WINDING_UP_S)
        self.close()

    async def look(self, process: SessionProcess, *, weigh: bool = False) -> str:
        """Stop a process and say what keeps it from being forked, in a word; empty if nothing
        does. `weigh`: its memory, where nobody may look at it otherwise."""
        if not await process.stopped():
            return UNSEEN
        try:
            process.sight = await self._sight(process, weigh)
        except Unseen:
            return UNSEEN
        return process.sight.fault(process.given, process.folder)

    async def _sight(self, process: SessionProcess, weigh: bool) -> Sight:
        """Look at a stopped process, as the kernel allows it. Raises Unseen."""
        if not self.covered:
            try:
                return self._client.sight(process.pid)
            except Unseen:
                if not process.alive:
                    raise
                self.covered = True
        return await self._shown(
            [process], lambda: self._client.sight(process.pid, count=True, weigh=weigh)
        )

    async def _shown(self, processes: Sequence[SessionProcess], look: Callable[[], _Seen]) -> _Seen:
        """Look at processes that show themselves for so long; the last one runs while the others
        do. Their user's other processes could look too, so those of the family wait; other families
        may not, by their file rules. Raises Unseen."""
        async with self._window:
            others = [each for each in self._members.values() if each.running]
            try:
                if not all([await other.stopped() for other in others if other.alive]):
                    raise Unseen("a sibling does not stop")
                for process in processes:
                    await self._show(process, True)
                seen = look()
                for process in reversed(processes):
                    await self._show(process, False)
            finally:
                self._showing = 0
                for process in processes:
                    if self._client.sees(process.pid):  # it keeps the window open
                        self.give_up(process)
                for other in others:
                    if other.running:
                        other.resume()
        return seen

    async def _show(self, process: SessionProcess, visible: bool) -> None:
        self._showing = process.pid
        await process.uncover(visible)

    @asynccontextmanager
    async def undisturbed(self) -> AsyncIterator[None]:
        """While no process of the family shows itself."""
        if self.covered:
            async with self._window:
                yield
        else:
            yield

    async def _verify(self, parent: SessionProcess, branch: SessionProcess) -> None:
        """Raise Tampered unless the branch has what it was given and the parent what it had."""
        before = parent.sight
        assert before is not None, "it was looked at before"
        if await self.look(branch) or branch.sight is None or branch.sight.others != before.others:
            raise Tampered("a branch is not what it must be")
        for wait_s in _SETTLED_S:
            await asyncio.sleep(wait_s)
            if not await self.look(parent) and parent.sight and parent.sight.like(before):
                break
            if not parent.alive:
                raise Tampered("a snapshot ended while it was forked")
            if not self.covered:
                parent.resume()
        else:
            raise Tampered("a snapshot kept what belongs to its branch")
        if before.others and await self._share(parent, branch):
            raise Tampered("a branch reads a file where its snapshot does")
        if branch.said_something:
            raise Tampered("somebody wrote for a branch")

    async def _share(self, parent: SessionProcess, branch: SessionProcess) -> bool:
        """Whether they have the position in a file in common: it would join the two."""
        sight = branch.sight
        assert sight is not None, "it was looked at before"
        if not self.covered:
            return sight.shares(parent.pid)
        try:
            return await self._shown([branch, parent], lambda: sight.shares(parent.pid))
        except Unseen:
            return True

    def retire(self, process: SessionProcess) -> None:
        """It will only be forked: give up what printing needs, and hide its folder from the code
        of its branches, which may have noted where it was."""
        if process.retire():
            try:
                process.folder = self._folder.rename(process.folder)
            except OSError:  # it died meanwhile; or its folder cannot be hidden
                self.give_up(process)

    def _kill_strays(self) -> int:
        """Kill every process of the family that is none of its members; how many there were."""
        killed = 0
        for name in os.listdir("/proc"):
            pid = int(name) if name.isdigit() else 0
            with suppress(OSError):  # it is gone
                if pid and pid not in self._members and os.getsid(pid) == self.first.pid:
                    pidfd = os.pidfd_open(pid)
                    try:
                        if os.getsid(pid) == self.first.pid:
                            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                            killed += 1
                    finally:
                        os.close(pidfd)
        return killed

    def _on_end(self, member: SessionProcess) -> None:
        self._members.pop(member.pid, None)
        if self._closing is None:
            self._clean_up(aside(self._folder.give_back, member.folder))

    def close(self) -> asyncio.Task[None]:
        """Kill everybody; the task ends when all are gone, with their folders. Idempotent."""
        if self._closing is None:
            if self.forks:
                self._loop.remove_reader(self.first.listener)
            self._closing = self._loop.create_task(self._vanish())
        return self._closing

    async def _vanish(self) -> None:
        self._client.kill_tree(self.first)
        members = list(self._members.values())
        await asyncio.gather(*(member.kill() for member in members))
        await self.first.close()
        await asyncio.gather(*self._cleaning)
        await aside(self._folder.remove)

    def _on_attempt(self) -> None:
        """A process wants to fork, which it may once if it was asked to, or to start a thread."""
        notice = bytearray(_NOTICE_BYTES)
        try:
            fcntl.ioctl(self.first.listener, _RECEIVE, notice)
        except OSError:  # it died meanwhile; perhaps they all did, and nobody can ask again
            self._stop_listening_to_nobody()
            return
        number, task, _, call, flags = _NOTICE.unpack_from(notice)
        forks = call == number_of("clone") and flags & 0xFFFFFFFF == STEP_FORK
        if forks:
            wanted = task in self._asked
        elif call == number_of("prctl"):
            wanted = task == self._showing
        else:
            wanted = self._threads_beside(task) < self._client.max_threads
        threads = call == number_of("clone") and not forks
        denied = 0 if wanted else -(errno.EAGAIN if threads else errno.EPERM)
        answer = struct.pack("=QqiI", number, 0, denied, _CONTINUE if wanted else 0)
        try:
            fcntl.ioctl(self.first.listener, _ANSWER, answer)
        except OSError:
            return  # it died or was stopped meanwhile: it may ask again
        if forks:
            self._asked.discard(task)
        if forks and not wanted and task in self._members:
            self._members[task].accuse("tried to start a process by the sandbox's own way")

    @staticmethod
    def _threads_beside(task: int) -> int:
        """Threads of the process that a thread belongs to."""
        try:
            return len(os.listdir(f"/proc/{task}/task"))
        except OSError:  # it died meanwhile
            return 0

    def _stop_listening_to_nobody(self) -> None:
        poll = select.poll()
        poll.register(self.first.listener, 0)
        if poll.poll(0):
            self._loop.remove_reader(self.first.listener)
