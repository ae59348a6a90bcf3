"""One process of a session, seen from the supervisor, which trusts no byte of it.

Invariants: the process is stopped (SIGSTOP) except while a call runs or a branch is being forked,
so nothing it left behind runs between calls; every wait has an end; whatever goes wrong ends in
SIGKILL through a pidfd, which cannot hit another process. The kernel identifies a process: by
the spawner for the first of a tree, by the credentials on its greeting for a forked one.
"""

from __future__ import annotations

import array
import asyncio
import errno
import math
import os
import resource
import secrets
import signal
import socket
import struct
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from dataclasses import dataclass

from sandbox.inspection import Sight, identity, nameless_bytes
from sandbox.limits import OUTPUT_KILL_BYTES, Limits
from sandbox.results import CallResult, Kind, SandboxFailure
from sandbox.shortage import explained, full, is_shortage
from sandbox.streams import HeadTail
from sandbox.wire import (
    LISTENER_MARK,
    NONCE_BYTES,
    OUT_OF_MEMORY_STATUS,
    START_NONCE,
    Breach,
    Reply,
    pack_cell,
    pack_fork,
    pack_uncover,
    unpack_reply,
)
from sandbox.workdir import usage

_TICK_S = 0.25
"""Between looks at CPU time and files while a call runs."""
_GRACE_S = 0.25
"""Seconds that a process which closed its control channel has to end by itself."""
_PATIENCE_S = 30.0
"""Seconds that the spawner and the kernel may take; beyond them they are broken."""
_REPORT_S = 0.5
"""Seconds that the report of a process's end may take, once it has ended."""
_SPARE = 16
"""Descriptors that must be left for looking at processes once one has its channels."""
FORK_PATIENCE_S = 5.0
"""Seconds that a process, possibly hostile, may take to fork."""
_STOPPED_S = (*[0.0] * 20, *[0.0002] * 10, *[0.002] * 10, *[0.02] * 10, *[0.2] * 25)
"""Waits between looks whether a process that was told to stop has done so."""
_THERE = {"R", "S", "D", "T", "t", "I"}
"""Letters in /proc for a process that has not ended."""
_CHUNK = 1 << 16
_LONE_FOLDER_LINKS = 2
"""Links to a folder that has none below, on file systems that count them."""
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_LAST_BYTES = 2 << 20
"""Bytes of address space below which nearly every allocation fails."""
_CREDENTIALS = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class End:
    """How a process ended."""

    status: int | None
    """The status from wait(2); None if the spawner died first."""
    cpu_s: float = 0.0
    """CPU time of its whole life."""

    @property
    def killed(self) -> bool:
        """Whether a SIGKILL ended it, which no code can send, or the death of its spawner."""
        return self.status is None or os.waitstatus_to_exitcode(self.status) == -signal.SIGKILL


@dataclass(frozen=True, slots=True)
class _Stop:
    """The supervisor's reason to end a call."""

    kind: Kind
    why: str


_HEADLESS = _Stop(Kind.KILLED, "its first thread ended before the others")


class Tampered(SandboxFailure):
    """A process, or something in its place, did not fork as an honest one does."""


class Refused(SandboxFailure):
    """A process could not fork, for want of resources as far as one knows: it may later."""


class Ends:
    """The supervisor's ends of one process's channels, and those to hand to the process: stdin,
    which is at its end, stdout, stderr and control. No two processes are given the same."""

    def __init__(self) -> None:
        """Raises OSError, also when so few descriptors are left that nobody could look after the
        process."""
        self._given: list[int] = []
        self.pipes: list[int] = []
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            stdin, unused = os.pipe()
            os.close(unused)
            self._given.append(stdin)
            for _ in ("stdout", "stderr"):
                reading, writing = os.pipe()
                self.pipes.append(reading)
                self._given.append(writing)
            _require_spare(max(self._given))
        except OSError:
            theirs.close()
            self.close()
            raise
        self._given.append(theirs.detach())
        self.identities = tuple(identity(os.fstat(end)) for end in self._given)
        """What the kernel knows the given ends by, also once they are in the process."""
        self.control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        for descriptor in (self.control.fileno(), *self.pipes):
            os.set_blocking(descriptor, False)

    @property
    def given(self) -> list[int]:
        """stdin, stdout, stderr and control of the process, in the order of its descriptors."""
        return list(self._given)

    def sent(self) -> None:
        """The process has its ends: close our copies."""
        while self._given:
            os.close(self._given.pop())

    def close(self) -> None:
        """Close everything."""
        self.sent()
        self.control.close()
        while self.pipes:
            os.close(self.pipes.pop())


class SessionProcess:
    """The supervisor's side of one process. Belongs to one event loop."""

    def __init__(self, ends: Ends, folder: str) -> None:
        self._loop = asyncio.get_running_loop()
        self.ends, self.folder = ends, folder
        """Its channels, and where it works."""
        self.pid = self.inner_pid = self._pidfd = -1
        self.given = ends.identities
        """What its descriptors 0 to 3 are."""
        self.undisturbed: Callable[[], AbstractAsyncContextManager[None]] = nullcontext
        """Held while it is told to run a cell, see `Lineage.undisturbed`."""
        self.in_files = 0
        """Bytes of its files, as of the last look, those included that have no name any more."""
        self.sight: Sight | None = None
        """As it was last seen by `Lineage.look`."""
        self.listener = -1
        """Decides about the forks of this process's tree; -1 where there is no such thing."""
        self.end: asyncio.Future[End] = self._loop.create_future()
        """Set by the spawner's report."""
        self.end.add_done_callback(lambda _: self._on_end())
        self._greeter: asyncio.Future[int] = self._loop.create_future()
        """The process id that the kernel attached to its first words."""
        self._nonce = START_NONCE
        self._verdict: asyncio.Future[Reply | _Stop] | None = self._loop.create_future()
        """What the running call (at first, the start) is waiting for."""
        self._said = bytearray()
        self._unsent = memoryview(b"")
        self._max_reply = OUTPUT_KILL_BYTES
        self._streams = [HeadTail(0), HeadTail(0)]
        self._folder_was = math.nan
        self._own_end = self._killed = False
        self._hung_up = False
        """Whether its control channel is at its end."""
        self._closing: asyncio.Task[None] | None = None
        self._loop.add_reader(ends.control, self._on_control)
        for index, pipe in enumerate(ends.pipes):
            self._loop.add_reader(pipe, self._on_print, index)

    def identify(self, pid: int, inner_pid: int, pidfd: int) -> None:
        """Who it is, here and to the spawner; `pidfd` belongs to this object from here on."""
        self.pid, self.inner_pid, self._pidfd = pid, inner_pid, pidfd

    async def greeter(self) -> int:
        """The id of the process that greeted. Raises SandboxFailure if none does."""
        try:
            async with asyncio.timeout(FORK_PATIENCE_S):
                return await self._greeter
        except TimeoutError:
            raise Tampered("a snapshot did not fork in time") from None

    async def started(self, patience_s: float = _PATIENCE_S) -> None:
        """Wait until the process is confined. Raises SandboxFailure, then closed."""
        assert self._verdict is not None
        try:
            async with asyncio.timeout(patience_s):
                verdict = await self._verdict
        except TimeoutError:
            verdict = _Stop(Kind.SANDBOX_FAILURE, "a session did not start in time")
        except asyncio.CancelledError:
            await self.close()
            raise
        self._verdict = None
        if isinstance(verdict, Reply) and verdict.kind is Kind.OK:
            return
        await self._heard_of()
        await self.close()
        why = verdict.why if isinstance(verdict, _Stop) else verdict.traceback
        raise SandboxFailure(f"session not started: {why}")

    def order_fork(self, branch: Ends, folder: str) -> None:
        """Have it fork a branch that works in `folder`. Raises OSError."""
        self.resume()
        message = pack_fork(folder)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", branch.given))]
        if self.ends.control.sendmsg([message], rights) != len(message):
            raise OSError("the control channel is full")

    async def run(self, code: bytes, index: int, limits: Limits) -> CallResult:
        """Run one cell. A result without `state_kept` means that the process is closed."""
        assert self._verdict is None, "one call at a time"
        if not self.alive:
            raise SandboxFailure("the session's process was lost")
        self._verdict = self._loop.create_future()
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._streams = [HeadTail(limits.output_kib << 10) for _ in self.ends.pipes]
        self._folder_was = self._folder_changed()
        self._max_reply = 6 * 3 * (limits.output_kib << 10) + _CHUNK  # escaped, three texts
        async with self.undisturbed():
            self.resume()
        cpu_before, start = self.cpu_s(), time.monotonic()
        self._unsent = memoryview(pack_cell(self._nonce, index, code))
        self._on_writable()
        watch = self._loop.create_task(self._watch(start, cpu_before, limits))
        try:
            verdict = await self._verdict
            duration = time.monotonic() - start
            self.pause()
        except asyncio.CancelledError:
            await self.close()
            raise
        finally:
            watch.cancel()
            self._verdict = None
        for stream in range(len(self.ends.pipes)):
            self._drain(stream)
        if isinstance(verdict, Reply):
            verdict = self._second_look(verdict, limits)
        cpu_s = self.cpu_s() - cpu_before
        if isinstance(verdict, Reply):
            return self._honest(verdict, duration, cpu_s)
        return await self._ended(verdict, duration, cpu_s, cpu_before)

    def retire(self) -> bool:
        """It will print no more, only be forked: give up what printing needs. False if it has."""
        if not self.ends.pipes:
            return False
        for index, pipe in enumerate(self.ends.pipes):
            self._loop.remove_reader(pipe)
            os.close(pipe)
            self.ends.pipes[index] = -1
        self.ends.pipes.clear()
        return True

    def kill(self) -> asyncio.Task[None]:
        """Kill the process; the task ends when it is gone. Idempotent."""
        if self._closing is None:
            self._settle(_Stop(Kind.SANDBOX_FAILURE, "the process was ended with its tree"))
            for reader in (self.ends.control.fileno(), *self.ends.pipes):
                self._loop.remove_reader(reader)
            self._loop.remove_writer(self.ends.control)
            self._signal(signal.SIGKILL)
            pidfd, self._pidfd = self._pidfd, -1
            self._closing = self._loop.create_task(self._vanish(pidfd))
        return self._closing

    async def close(self) -> None:
        """`kill`, and wait for it."""
        await asyncio.shield(self.kill())

    async def _vanish(self, pidfd: int) -> None:
        if pidfd >= 0:
            await asyncio.wait({self.end}, timeout=_PATIENCE_S)
            os.close(pidfd)
        self.ends.close()
        if self.listener >= 0:
            self._loop.remove_reader(self.listener)
            os.close(self.listener)
            self.listener = -1

    @property
    def ended_itself(self) -> bool:
        """Whether its end was its own doing: it was not killed from outside."""
        return self._own_end

    async def ended_itself_after_all(self) -> bool:
        """`ended_itself`, once there was time to hear of it if it seems to have ended."""
        await self._heard_of()
        return self.ended_itself

    async def killed_from_outside(self) -> bool:
        """Whether neither it nor this supervisor brought about its end, likewise: its spawner
        died, or somebody sent it a SIGKILL, which it cannot have done itself."""
        await self._heard_of()
        return self._killed

    async def _heard_of(self) -> None:
        """Wait for the report if it seems to have ended."""
        while self._on_control():
            pass
        ended = self.pid > 0 and _state_of(self.pid) not in _THERE
        if ended or self._hung_up:
            await asyncio.wait({self.end}, timeout=FORK_PATIENCE_S if ended else _REPORT_S)

    @property
    def alive(self) -> bool:
        return self._closing is None and not self.end.done()

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    async def stopped(self) -> bool:
        """Stop it, and wait until nothing of it runs; False if that cannot be had."""
        self.pause()
        for wait_s in _STOPPED_S:
            await asyncio.sleep(wait_s)
            state = _state_of(self.pid)
            if state not in _THERE or not self.alive:
                return False
            if state == "T":
                return True
        return False

    @property
    def running(self) -> bool:
        """Whether it was told to go on and has not answered yet."""
        return self.alive and self._verdict is not None and not self._verdict.done()

    async def uncover(self, visible: bool) -> bool:
        """Have it let its owner see its `/proc` entries, or no longer; whether it says so."""
        self._verdict, self._nonce = self._loop.create_future(), secrets.token_bytes(NONCE_BYTES)
        self.resume()
        self._unsent = memoryview(pack_uncover(self._nonce, visible))
        self._on_writable()
        try:
            async with asyncio.timeout(FORK_PATIENCE_S):
                verdict = await self._verdict
        except TimeoutError:
            return False
        finally:
            self._verdict = None
        return isinstance(verdict, Reply) and await self.stopped()

    @property
    def said_something(self) -> bool:
        """Whether anything came through its channels since it started."""
        for stream in range(len(self.ends.pipes)):
            self._drain(stream)
        return self._on_control() or any(stream.total for stream in self._streams)

    def accuse(self, why: str) -> None:
        """It was seen to do what no honest code does: end its call."""
        self._settle(_Stop(Kind.KILLED, why))

    # --- what the process does, as events ---------------------------------------------------------

    def _settle(self, verdict: Reply | _Stop) -> None:
        if self._verdict is not None and not self._verdict.done():
            self._verdict.set_result(verdict)

    def _receive(self) -> bytes:
        """What it wrote, b"" at the end. Raises BlockingIOError."""
        control = self.ends.control
        if self._greeter.done():
            return control.recv(_CHUNK)
        room = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(4)
        data, ancillary, flags, _ = control.recvmsg(_CHUNK, room)
        if flags & socket.MSG_CTRUNC:  # sessions send no descriptors: the listener found no room
            short = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            self._settle(_Stop(Kind.SANDBOX_FAILURE, explained(short)))
        for _, kind, content in ancillary:
            if kind == socket.SCM_RIGHTS:
                self.listener = int.from_bytes(content[:4], "little", signed=True)
                assert data == LISTENER_MARK, "the filter lets no session send descriptors"
                return self._receive()
            if data:
                self._greeter.set_result(_CREDENTIALS.unpack(content)[0])
                control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
        return data

    def _on_control(self) -> bool:
        """Read what is there; whether there may be more."""
        too_much = len(self._said) > self._max_reply
        if self._hung_up or self._closing is not None or too_much:
            return False
        try:
            data = self._receive()
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._hung_up = True
            self._loop.remove_reader(self.ends.control)
            if not self._greeter.done():
                self._greeter.set_exception(Refused("a snapshot could not fork"))
                self._greeter.exception()  # seen, should nobody wait for it
            gone = _Stop(Kind.KILLED, "the control channel was closed")
            self._loop.call_later(_GRACE_S, self._settle, gone)
            return False
        self._said += data
        if len(self._said) > self._max_reply:
            self._loop.remove_reader(self.ends.control)
        try:
            reply = unpack_reply(self._said, self._nonce, self._max_reply)
        except Breach as breach:
            self._settle(_Stop(Kind.KILLED, f"broke the control channel: {breach}"))
        else:
            if reply is not None:
                self._said.clear()
                self._nonce = b""  # whatever comes before the next cell is a breach
                self._settle(reply)
        return True

    def _on_writable(self) -> None:
        if self._closing is not None:  # its end was settled too
            return
        try:
            sent = self.ends.control.send(self._unsent)
        except BlockingIOError:
            sent = 0
        except OSError:  # it hung up: the reader sees that too
            sent = len(self._unsent)
        self._unsent = self._unsent[sent:]
        if self._unsent:
            self._loop.add_writer(self.ends.control, self._on_writable)
        else:
            self._loop.remove_writer(self.ends.control)

    def _on_print(self, stream: int) -> bool:
        """Read what is there; whether there may be more."""
        try:
            data = os.read(self.ends.pipes[stream], _CHUNK)
        except BlockingIOError:
            return False
        if not data:
            self._loop.remove_reader(self.ends.pipes[stream])
            return False
        self._streams[stream].add(data)
        if self._flooded():
            self._settle(_Stop(Kind.OUTPUT, f"more than {OUTPUT_KILL_BYTES >> 20} MiB of output"))
        return True

    def _on_end(self) -> None:
        if self._closing is not None:
            return
        self._killed = self.end.result().killed
        self._own_end = not self._killed
        while self._on_control():  # its last words, if they were complete, come first
            pass
        self._settle(_Stop(Kind.KILLED, "the process ended"))
        self.kill()  # give up its descriptors

    async def _watch(self, start: float, cpu_before: float, limits: Limits) -> None:
        while (left := start + limits.wall_s - time.monotonic()) > 0:
            await asyncio.sleep(min(left, _TICK_S))
            if self.cpu_s() - cpu_before > limits.cpu_s:
                self._settle(self._out_of_time(f"used {limits.cpu_s:g} s of CPU", limits))
            try:
                if self._over_quota(limits, mapped=True):
                    self._settle(_over_quota(limits))
                if _headless(self.pid):
                    self._settle(_HEADLESS)
            except OSError as error:
                self._settle(_short_of(error))
        self._settle(self._out_of_time(f"ran for {limits.wall_s:g} s", limits))

    def _out_of_time(self, why: str, limits: Limits) -> _Stop:
        """Code that has no memory left may crawl, and CPython loop over its MemoryErrors."""
        try:
            with open(f"/proc/{self.pid}/statm", encoding="ascii") as file:
                taken = int(file.read().split()[0]) * _PAGE_BYTES
        except OSError:  # it is gone
            taken = 0
        if taken > (limits.memory_mib << 20) - _LAST_BYTES:
            return _Stop(Kind.MEMORY, f"{why}, out of memory")
        return _Stop(Kind.TIMEOUT, why)

    # --- verdicts ---------------------------------------------------------------------------------

    def _flooded(self) -> bool:
        return sum(stream.total for stream in self._streams) > OUTPUT_KILL_BYTES

    def _drain(self, stream: int) -> None:
        while not self._flooded() and self._on_print(stream):
            pass

    def _second_look(self, reply: Reply, limits: Limits) -> Reply | _Stop:
        """What an honest-looking reply may hide. That the process ended behind it is no matter of
        this call: the state that it left is broken."""
        if self._flooded():
            return _Stop(Kind.OUTPUT, f"more than {OUTPUT_KILL_BYTES >> 20} MiB of output")
        try:
            if self._over_quota(limits, mapped=self._folder_changed() != self._folder_was):
                return _over_quota(limits)
            if _headless(self.pid):
                return _HEADLESS
        except OSError as error:
            return _short_of(error)
        no_room = os.strerror(errno.ENOSPC)
        if reply.kind is Kind.ERROR and no_room in reply.traceback and full(self.folder):
            return _short_of(OSError(errno.ENOSPC, no_room))
        return reply

    def _folder_changed(self) -> float:
        """When something was last created or removed in the work folder, by the kernel's clock; no
        number if that may have been in a folder below."""
        try:
            found = os.stat(self.folder)
        except OSError:  # it removed the folder
            return math.nan
        return found.st_mtime_ns if found.st_nlink == _LONE_FOLDER_LINKS else math.nan

    def _over_quota(self, limits: Limits, *, mapped: bool) -> bool:
        """Whether it has too much in files, those included that it removed and still holds.

        Raises OSError if that cannot be found out for want of something."""
        named = usage(self.folder, limits)
        if named is None:
            return True
        most, root = limits.file_mib << 20, os.path.dirname(os.path.dirname(self.folder))
        self.in_files = named + nameless_bytes(self.pid, root, largest=most if mapped else 0)
        return self.in_files > most

    def hoards(self, limits: Limits) -> bool:
        """Whether, as it was last seen, it keeps too much in files that have no name any more."""
        nameless = self.sight.nameless if self.sight is not None else 0
        return nameless > 0 and (usage(self.folder, limits) or 0) + nameless > limits.file_mib << 20

    def _honest(self, reply: Reply, duration: float, cpu_s: float) -> CallResult:
        out, err = self._streams
        return CallResult(
            kind=reply.kind,
            stdout=out.text(),
            stderr=err.text(),
            value=reply.value,
            error_type=reply.error_type,
            traceback=reply.traceback,
            truncated=(*self._cut(), *reply.truncated),
            duration_s=duration,
            cpu_s=cpu_s,
        )

    def _cut(self) -> list[str]:
        named = zip(("stdout", "stderr"), self._streams, strict=True)
        return [name for name, stream in named if stream.truncated]

    async def _ended(
        self, stop: _Stop, duration: float, cpu_s: float, cpu_before: float
    ) -> CallResult:
        """Close the process and say, by its end, who caused it."""
        kind, why = stop.kind, stop.why
        if kind is Kind.KILLED and _state_of(self.pid) not in _THERE:
            await asyncio.wait({self.end}, timeout=_REPORT_S)
        if self.end.done():
            end = self.end.result()
            kind, why = _verdict_of(end)
            cpu_s = max(0.0, end.cpu_s - cpu_before)
        self.kill()
        out, err = self._streams
        return CallResult(
            kind=kind,
            stdout=out.text(),
            stderr=err.text(),
            traceback=why,
            truncated=tuple(self._cut()),
            duration_s=duration,
            cpu_s=cpu_s,
            state_kept=False,
        )

    def cpu_s(self) -> float:
        """CPU time of all its threads, by the kernel's clock for that process; 0 once gone."""
        try:
            return time.clock_gettime((~self.pid << 3) | 2)
        except OSError:
            return 0.0

    def _signal(self, number: signal.Signals) -> None:
        if self._pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)


def _state_of(pid: int) -> str:
    """The kernel's letter for what a process does; "" if there is none. Raises OSError for want of
    something."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rsplit(")", 1)[1].split()[0]
    except OSError as error:
        if is_shortage(error):
            raise
        return ""


def _headless(pid: int) -> bool:
    """Whether a process goes on although its first thread, which the kernel shows as the process,
    has ended. No honest one does."""
    if _state_of(pid) != "Z":
        return False
    try:
        return len(os.listdir(f"/proc/{pid}/task")) > 1
    except FileNotFoundError:  # it ended
        return False


def beyond_quota(limits: Limits) -> str:
    """What is said of a process that has too much in files."""
    return f"more than {limits.files} files or {limits.file_mib} MiB of files"


def _over_quota(limits: Limits) -> _Stop:
    return _Stop(Kind.OUTPUT, beyond_quota(limits))


def _short_of(error: OSError) -> _Stop:
    return _Stop(Kind.SANDBOX_FAILURE, explained(error))


def _require_spare(descriptor: int) -> None:
    """Raises OSError if few more descriptors can be had than one that was just opened: the kernel
    gives out the lowest numbers first."""
    if descriptor + _SPARE < resource.getrlimit(resource.RLIMIT_NOFILE)[0]:
        return
    spare = list[int]()
    try:
        for _ in range(_SPARE):
            spare.append(os.dup(descriptor))
    finally:
        for each in spare:
            os.close(each)


def _verdict_of(end: End) -> tuple[Kind, str]:
    """Kind and cause of a process that ended without our doing."""
    if end.status is None:
        return Kind.SANDBOX_FAILURE, "the spawner died"
    code = os.waitstatus_to_exitcode(end.status)
    if code == OUT_OF_MEMORY_STATUS:
        return Kind.MEMORY, "out of memory"
    if code >= 0:
        return Kind.EXITED, f"exit status {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    if -code == signal.SIGKILL:  # the filter denies it to the code: the kernel or an operator
        return Kind.SANDBOX_FAILURE, "killed from outside (out of memory on the host?)"
    return Kind.KILLED, name
