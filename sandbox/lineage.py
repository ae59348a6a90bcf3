"""One confined family of processes: the first, and all that were forked from it.

They share a user, a ruleset and a filter, and end when the first ends. Invariants: such a process
forks once for each time that it was asked to here, and at no other time, and has no more threads
than it may: the kernel stops every attempt and asks. A branch begins with nothing that its parent
has open, and in a folder of its own: this is done to it from outside while it waits in the kernel,
so that nothing of it has to be believed. What else may have come of a fork is killed.
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from sandbox.channels import Ends
from sandbox.endings import End, Refused, Tampered, is_ending, kill_strays, was_killed
from sandbox.inspection import (
    THREADS,
    Hidden,
    Sight,
    Unseen,
    identity,
    is_bare,
    is_shown,
    num_threads,
)
from sandbox.launch import SpawnerClient
from sandbox.listener import Question, is_orphaned, prepare
from sandbox.process import SessionProcess
from sandbox.results import SandboxFailure
from sandbox.shortage import explained, explaining, full, raise_if_short
from sandbox.wire import CONTROL_FD, NONCE_BYTES, WORK_FD, ticket_of
from sandbox.workdir import TreeFolder, aside

UNSEEN = "unseen"
"""What `Lineage.look` says of a process that is gone, or that the kernel does not show."""
_NO_FORK = f"no branch: {explained(OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)))}"
_NO_ROOM = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
_WINDING_UP_S = 0.05
"""Between looks whether anybody still runs in a family that is to end."""
_CONDOLENCE_S = 0.25
"""After the death of a child that could be anybody's: for a branch to be born nevertheless."""
_NOTHING = nullcontext()

_Seen = TypeVar("_Seen")


@dataclass(eq=False, slots=True)
class _Birth:
    """A fork under way."""

    parent: SessionProcess
    branch: SessionProcess
    permitted: bool = False
    """Whether the parent was let fork, so that there is a child, or will be."""
    done: bool = False
    """Whether the branch is a member of the family."""
    failure: SandboxFailure | None = None


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
        self._births: dict[int, _Birth] = {}
        """Forks under way, by the ticket of the branch."""
        self._strays = 0
        """Processes that were nobody's branch and were killed, or ended themselves."""
        self._condemned: set[int] = set()
        """Those that were killed and whose ends were not reported yet, by the spawner's ids."""
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
        client.bereaved[first.inner_pid] = self._on_bereavement
        first.end.add_done_callback(lambda _: self.close())
        if first.listener >= 0:
            prepare(first.listener)
            self._loop.add_reader(first.listener, self._on_question)

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

        Raises SandboxFailure; Tampered if the two did anything else, and then they are gone.
        """
        branch, strays = self._unborn(), self._strays
        birth = _Birth(parent, branch)
        ticket = secrets.token_bytes(NONCE_BYTES)
        try:
            async with self._under_way(birth, ticket_of(ticket)):
                order = self._loop.create_task(parent.fork(ticket, branch.folder))
                try:
                    await asyncio.shield(order)
                except asyncio.CancelledError:  # it is carried out, for it cannot be taken back
                    await asyncio.gather(order, return_exceptions=True)
                    raise
            if branch.alive:  # else its folder may be another's
                branch.folder = self._folder.rename(branch.folder)
            if not self.first.steadfast and not await self._checked(branch):
                raise Tampered("a branch is not what it must be")
        except BaseException as error:
            if isinstance(error, Refused) and not birth.done:
                error = await self._judged(birth, strays)
            born = [branch] if birth.done else []  # what is nobody's branch was killed here
            by_others = isinstance(error, Tampered | Refused) and await self.lost(parent, *born)
            if not birth.done:
                self._clean_up(self._reclaim(branch))
            branch.kill()
            if by_others:
                raise SandboxFailure("a process was killed from outside while it forked") from error
            if isinstance(error, Tampered) or not (birth.done or isinstance(error, Exception)):
                self.give_up(parent)  # or it would do later what it was told now
            if isinstance(error, OSError):
                raise SandboxFailure(f"no branch: {explained(error)}") from error
            raise error
        finally:
            parent.pause()
        return branch

    async def _checked(self, branch: SessionProcess) -> bool:
        """Whether a branch is what it must be. Where something could disturb it at its birth, that
        may have come to nothing."""
        return await branch.ready() and not await self.look(branch)

    async def lost(self, *processes: SessionProcess) -> bool:
        """Whether one of these members was killed from outside, or the first of the family, with
        which all others end."""
        return any([await each.killed_from_outside() for each in (*processes, self.first)])

    def _unborn(self) -> SessionProcess:
        """What a branch will need. Raises SandboxFailure."""
        folder = None
        try:
            folder = self._folder.take()
            if folder is None:
                raise Refused("no work folder is free")
            return SessionProcess(Ends(), folder)
        except OSError as error:
            if folder is not None:
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
    async def _under_way(self, birth: _Birth, ticket: int) -> AsyncIterator[None]:
        """While the parent may fork, once. If nothing good comes of it, all processes are killed
        that are nobody's branch, as soon as no other branch is on its way."""
        await self._clean.wait()
        self._births[ticket] = birth
        try:
            async with self.undisturbed():
                yield
            if not birth.done:
                raise birth.failure or SandboxFailure("no branch")
        except BaseException:
            if birth.permitted and not birth.done:  # the child may be anybody
                self._clean.clear()
            raise
        finally:
            del self._births[ticket]
            if not self._births and not self._clean.is_set():
                killed = kill_strays(self.first.pid, self._members)
                self._strays += len(killed - self._condemned)
                self._condemned |= killed
                self._clean.set()

    async def _judged(self, birth: _Birth, strays_before: int) -> SandboxFailure:
        """What a fork was that its parent calls impossible: it may have brought forth a process all
        the same, or not have been tried. Otherwise the kernel refused it."""
        await self._clean.wait()
        await asyncio.sleep(_WINDING_UP_S)  # the end of its child may not be reported yet
        if birth.permitted and self._strays == strays_before:
            return Refused(_NO_FORK)
        return Tampered("a snapshot could have forked")

    def _on_bereavement(self, inner: int, end: End) -> None:
        """A process ended that is nobody's branch yet."""
        if inner in self._condemned:  # nor will it be, so it is no loss to those under way
            self._condemned.remove(inner)
            return
        self._strays += not end.killed
        for birth in self._waiting:
            self._loop.call_later(_CONDOLENCE_S, self._mourn, birth, end)

    @property
    def _waiting(self) -> list[_Birth]:
        return [birth for birth in self._births.values() if birth.permitted and not birth.done]

    def _mourn(self, birth: _Birth, end: End) -> None:
        """What ended may be its child. If it could be another one's too, patience decides."""
        if end.killed or (self._waiting == [birth] and self._clean.is_set()):
            failure = SandboxFailure if end.killed else Tampered
            self._fail(birth, failure("a branch died at its birth"))

    def _fail(self, birth: _Birth, failure: SandboxFailure) -> None:
        if not birth.done and birth in self._births.values():
            birth.failure = failure
            birth.parent.forked()

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
        return bool(self._births) or any(each.running for each in self._members.values())

    async def _wind_up(self) -> None:
        while self._busy:
            await asyncio.sleep(_WINDING_UP_S)
        self.close()

    async def look(self, process: SessionProcess, *, weigh: bool = False) -> str:
        """Say what keeps a process that is being stopped from being forked, in a word; empty if
        nothing does. `weigh`: its memory, where nobody may look at it otherwise.

        Whether others can be reached from a branch does not depend on it: a branch is left nothing
        of what its parent has open. It says whether the state can go on without that.

        Raises OSError for want of something here, which says nothing about the process."""
        process.sight = None
        try:
            if self.covered and not weigh and process.holdings.have_names(process.pid):
                return THREADS if num_threads(process.pid) > 1 else ""
            process.sight = await self._sight(process, weigh)
        except Unseen:
            return UNSEEN
        except OSError as error:
            raise_if_short(error)
            return UNSEEN
        fault = process.sight.fault(process.ends.identities, process.folder)
        if fault:
            process.holdings.doubt()
        return fault

    async def _sight(self, process: SessionProcess, weigh: bool) -> Sight:
        """Look at a process, as the kernel allows it. Raises Unseen."""
        if not self.covered:
            try:
                return self._client.sight(process.pid)
            except Hidden:
                self.covered = True
        return await self._shown(
            process, lambda: self._client.sight(process.pid, count=True, weigh=weigh)
        )

    async def _shown(self, process: SessionProcess, look: Callable[[], _Seen]) -> _Seen:
        """Look at a process that shows itself for so long. Their user's other processes could look
        too, so those of the family wait; other families may not, by their file rules. Raises
        Unseen, and what `look` does."""
        async with self._window:
            others = [each for each in self._members.values() if each.alive and not each.at_rest]
            began = self._loop.time()
            try:
                for other in others:
                    if not await other.stopped() and other.alive and not is_ending(other.pid):
                        raise OSError(errno.ETIME, "another process of the family does not stop")
                try:
                    await self._show(process, True)
                    seen = look()
                finally:
                    await self._show(process, False)
            finally:
                self._showing = 0
                if is_shown(process.pid):  # it keeps the window open
                    self.give_up(process)
                for other in others:
                    if other.running:
                        other.resume()
                        other.excuse(self._loop.time() - began)
        return seen

    async def _show(self, process: SessionProcess, visible: bool) -> None:
        self._showing = process.pid
        await process.uncover(visible)

    def undisturbed(self) -> AbstractAsyncContextManager[None]:
        """While no process of the family shows itself."""
        return self._window if self.covered else _NOTHING

    def retire(self, process: SessionProcess) -> None:
        """It will only be forked: give up what printing needs, and hide its folder from the code
        of its branches, which may have noted where it was."""
        if process.retire():
            try:
                process.folder = self._folder.rename(process.folder)
            except OSError:  # it died meanwhile; or its folder cannot be hidden
                self.give_up(process)

    def _on_end(self, member: SessionProcess) -> None:
        self._members.pop(member.pid, None)
        if self._closing is None and not self._folder.give_back_empty(member.folder):
            self._clean_up(aside(self._folder.give_back, member.folder))

    def close(self) -> asyncio.Task[None]:
        """Kill everybody; the task ends when all are gone, with their folders. Idempotent."""
        if self._closing is None:
            if self.forks:
                self._loop.remove_reader(self.first.listener)
            self._client.bereaved.pop(self.first.inner_pid, None)
            self._closing = self._loop.create_task(self._vanish())
        return self._closing

    async def _vanish(self) -> None:
        self._client.kill_tree(self.first)
        members = list(self._members.values())
        await asyncio.gather(*(member.kill() for member in members))
        await self.first.close()
        await asyncio.gather(*self._cleaning)
        await aside(self._folder.remove)

    def _on_question(self) -> None:
        """A process wants what only its supervisor may grant."""
        question = Question.next(self.first.listener)
        if question is None:
            if is_orphaned(self.first.listener):
                self._loop.remove_reader(self.first.listener)
        elif question.forks:
            self._on_fork(question)
        elif question.settles:
            self._on_birth(question)
        elif question.threads:
            threads, known = question.num_threads, question.task in self._members
            wanted = threads < self._client.max_threads and (known or threads > 1)
            question.grant() if wanted else question.refuse(errno.EAGAIN)
        elif question.task == self._showing:
            question.grant()
        else:
            question.refuse(errno.EPERM)

    def _on_fork(self, question: Question) -> None:
        """It may fork once if it was asked to."""
        asked = [birth for birth in self._births.values() if birth.parent.pid == question.task]
        if asked and not asked[0].permitted:
            asked[0].permitted = question.grant()
        elif question.refuse(errno.EPERM) and question.task in self._members:
            self._members[question.task].accuse("tried to start a process by the sandbox's own way")

    def _on_birth(self, question: Question) -> None:
        """A new process says whose branch it is. It is left nothing but what a branch has, and
        stands in its own work folder afterwards, whatever it has done before."""
        _, ticket, problem = question.arguments
        birth = self._births.get(ticket)
        if question.task in self._members or birth is None or not birth.permitted or birth.done:
            question.grant()  # wherever it stands, there is its own
            return
        try:
            with explaining("no branch"):  # it died
                self._furnish(birth.branch, question, problem)
        except SandboxFailure as failure:
            died = was_killed(question.task)
            self._fail(birth, SandboxFailure("a branch died at its birth") if died else failure)
        else:
            birth.done = True
            birth.parent.forked()

    def _furnish(self, branch: SessionProcess, question: Question, problem: int) -> None:
        """Raises SandboxFailure, OSError."""
        self._client.adopt(branch, question.task, self.first)
        if problem:
            if full(self._client.root):
                raise SandboxFailure(f"no branch: {explained(_NO_ROOM)}")
            raise Tampered(f"a snapshot cannot be branched: {os.strerror(problem)}")
        folder, control = self._client.open_folder(branch.folder), branch.ends.given[CONTROL_FD]
        try:
            if question.num_threads == 1 and is_bare(question.task, identity(os.fstat(folder))):
                branch.ends.hand_over_streams(folder)
                branch.birth = partial(question.answer_with, control, CONTROL_FD)
            else:
                own = {CONTROL_FD: control, WORK_FD: folder}
                question.furnish(own, self._client.max_descriptors)
                if question.num_threads != 1 or not question.grant():
                    raise Tampered("a branch did not wait for its birth")
                branch.ends.hand_over_streams()
                branch.ends.sent()
        finally:
            os.close(folder)
        branch.undisturbed = self.undisturbed
        self._members[branch.pid] = branch
        branch.end.add_done_callback(lambda _: self._on_end(branch))
