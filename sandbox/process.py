"""One process of a session, seen from the supervisor, which trusts no byte of it.

Invariants: the process is stopped (SIGSTOP) except while a call runs or a branch is being forked,
so nothing it left behind runs between calls; every wait has an end; whatever goes wrong ends in
SIGKILL through a pidfd, which cannot hit another process. The kernel identifies a process: by
the spawner for the first of a tree, by the question that it asks for a forked one.
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext, suppress

from sandbox import png
from sandbox.channels import Ends
from sandbox.endings import (
    HEADLESS,
    THERE,
    End,
    Refused,
    Stop,
    Tampered,
    headless,
    over_quota,
    short_of,
    state_of,
    verdict_of,
)
from sandbox.holdings import Holdings
from sandbox.inspection import Sight
from sandbox.limits import OUTPUT_KILL_BYTES, Limits
from sandbox.results import CallResult, Kind, SandboxFailure
from sandbox.shortage import full
from sandbox.streams import Output
from sandbox.wire import (
    LISTENER_MARKS,
    MAX_REPLY_OVERHEAD,
    NONCE_BYTES,
    START_NONCE,
    Breach,
    Reply,
    pack_cell,
    pack_fork,
    pack_uncover,
    unpack_reply,
)

_TICK_S = 0.25
"""Between looks at CPU time and files while a call runs."""
_GRACE_S = 0.25
"""Seconds that a process which closed its control channel has to end by itself."""
_PATIENCE_S = 30.0
"""Seconds that the spawner and the kernel may take; beyond them they are broken."""
_REPORT_S = 0.5
"""Seconds that the report of a process's end may take, once it has ended."""
FORK_PATIENCE_S = 5.0
"""Seconds that a process, possibly hostile, may take to do what it is told."""
_STOPPED_S = (*[0.0] * 20, *[0.0002] * 10, *[0.002] * 10, *[0.02] * 10, *[0.2] * 25)
"""Waits between looks whether a process that was told to stop has done so."""
_CHUNK = 1 << 16
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_LAST_BYTES = 2 << 20
"""Bytes of address space below which nearly every allocation fails."""


_FLOOD = Stop(Kind.OUTPUT, f"more than {OUTPUT_KILL_BYTES >> 20} MiB of output")


class SessionProcess:
    """The supervisor's side of one process. Belongs to one event loop."""

    def __init__(self, ends: Ends, folder: str) -> None:
        self._loop = asyncio.get_running_loop()
        self.ends, self.folder = ends, folder
        """Its channels, and where it works."""
        self.pid = self.inner_pid = self._pidfd = -1
        self.undisturbed: Callable[[], AbstractAsyncContextManager[None]] = nullcontext
        """Held while it is told to run a cell, see `Lineage.undisturbed`."""
        self.sight: Sight | None = None
        """As it was last seen by `Lineage.look`."""
        self.listener = -1
        """Decides about the forks of this process's tree; -1 where there is no such thing."""
        self.steadfast = True
        """Whether only SIGKILL disturbs who waits for such a decision."""
        self.end: asyncio.Future[End] = self._loop.create_future()
        """Set by the spawner's report."""
        self.end.add_done_callback(lambda _: self._on_end())
        self._nonce = b""
        self._verdict: asyncio.Future[Reply | Stop | None] | None = None
        """What the running call (or the start, or a fork, which comes to None) is waiting for."""
        self._starting = False
        self._said = bytearray()
        self._unsent = memoryview(b"")
        self._max_reply = OUTPUT_KILL_BYTES
        self._output = Output(ends.pipes, lambda: self._settle(_FLOOD))
        self.holdings = Holdings()
        """What it keeps in files."""
        self._own_end = self._killed = False
        self._hung_up = False
        """Whether its control channel is at its end."""
        self.at_rest = self._stops = False
        """Whether it is known to be stopped; whether it was told to."""
        self._closing: asyncio.Task[None] | None = None

    def identify(self, pid: int, inner_pid: int, pidfd: int) -> None:
        """Who it is, here and to the spawner; `pidfd` belongs to this object from here on."""
        self.pid, self.inner_pid, self._pidfd = pid, inner_pid, pidfd
        self._loop.add_reader(self.ends.control, self._on_control)
        self._output.listen(self._loop)

    async def started(self) -> None:
        """Wait until the first process of a family is confined. Raises SandboxFailure, then
        closed."""
        self._starting = True
        try:
            verdict = await self._settled(START_NONCE, _PATIENCE_S)
        except asyncio.CancelledError:
            await self.close()
            raise
        self._starting = False
        if isinstance(verdict, Reply) and verdict.kind is Kind.OK:
            return
        await self.close()
        raise SandboxFailure(f"session not started: {_said(verdict)}")

    async def fork(self, ticket: bytes, folder: str) -> None:
        """Have it fork a branch that works in `folder`; ends when `forked` says so.

        Raises Refused; Tampered if it does anything else; SandboxFailure if it is gone.
        """
        if not self.alive:
            raise SandboxFailure("no fork: the process was lost")
        self.resume()
        self._send(pack_fork(ticket, folder))
        verdict = await self._settled(ticket, FORK_PATIENCE_S)
        if isinstance(verdict, Reply):
            raise Refused(verdict.traceback)
        if verdict is not None:
            raise (Tampered if self.alive else SandboxFailure)(f"no fork: {verdict.why}")

    def forked(self) -> None:
        """The branch that was ordered is there."""
        self._settle(None)

    async def _settled(self, nonce: bytes, patience_s: float) -> Reply | Stop | None:
        """What comes of an order that goes by this nonce."""
        assert self._verdict is None, "one order at a time"
        self._nonce, self._verdict = nonce, self._loop.create_future()
        late = Stop(Kind.SANDBOX_FAILURE, f"nothing came of it for {patience_s:g} s")
        alarm = self._loop.call_later(patience_s, self._settle, late)
        try:
            return await self._verdict
        finally:
            alarm.cancel()
            self._verdict, self._nonce = None, b""

    def _send(self, message: bytes) -> None:
        self._unsent = memoryview(message)
        self._on_writable()

    async def run(self, code: bytes, index: int, limits: Limits) -> CallResult:
        """Run one cell. A result without `state_kept` means that the process is closed."""
        assert self._verdict is None, "one call at a time"
        if not self.alive:
            raise SandboxFailure("the session's process was lost")
        self._verdict = self._loop.create_future()
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._output.begin(limits.output_kib << 10)
        self.holdings.begin(self.folder, limits)
        self._max_reply = 6 * 3 * (limits.output_kib << 10) + _CHUNK  # escaped, three texts
        async with self.undisturbed():
            self.resume()
        cpu_before, start = self.cpu_s(), time.monotonic()
        self._send(pack_cell(self._nonce, index, code))
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
        assert verdict is not None, "no fork was ordered"
        self._output.drain(self._loop)
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
        self._output.stop(self._loop)
        while self.ends.pipes:
            os.close(self.ends.pipes.pop())
        return True

    def kill(self) -> asyncio.Task[None]:
        """Kill the process; the task ends when it is gone. Idempotent."""
        if self._closing is None:
            self._settle(Stop(Kind.SANDBOX_FAILURE, "the process was ended with its tree"))
            self._loop.remove_reader(self.ends.control)
            self._output.stop(self._loop)
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
        if self.pid > 0 and (self._hung_up or state_of(self.pid) not in THERE):
            await asyncio.wait({self.end}, timeout=FORK_PATIENCE_S)

    @property
    def alive(self) -> bool:
        return self._closing is None and not self.end.done()

    def resume(self) -> None:
        self.at_rest = self._stops = False
        self._signal(signal.SIGCONT)

    def pause(self) -> None:
        self._stops = True
        self._signal(signal.SIGSTOP)

    async def stopped(self) -> bool:
        """Stop it, and wait until nothing of it runs; False if that cannot be had."""
        self.pause()
        for wait_s in _STOPPED_S:
            state = state_of(self.pid)
            if state not in THERE or not self.alive:
                return False
            if state == "T":
                self.at_rest = self._stops
                return True
            await asyncio.sleep(wait_s)
        return False

    @property
    def running(self) -> bool:
        """Whether it was told to go on and has not answered yet."""
        return self.alive and self._verdict is not None and not self._verdict.done()

    async def uncover(self, visible: bool) -> bool:
        """Have it let its owner see its `/proc` entries, or no longer; whether it says so."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        self.resume()
        self._send(pack_uncover(nonce, visible))
        return isinstance(await self._settled(nonce, FORK_PATIENCE_S), Reply) and (
            await self.stopped()
        )

    def accuse(self, why: str) -> None:
        """It was seen to do what no honest code does: end its call."""
        self._settle(Stop(Kind.KILLED, why))

    # --- what the process does, as events ---------------------------------------------------------

    def _settle(self, verdict: Reply | Stop | None) -> None:
        if self._verdict is not None and not self._verdict.done():
            self._verdict.set_result(verdict)

    def _receive(self) -> bytes:
        """What it wrote, b"" at the end. Raises BlockingIOError."""
        control = self.ends.control
        if not self._starting or self.listener >= 0:
            return control.recv(_CHUNK)
        mark, descriptors, flags, _ = socket.recv_fds(control, len(LISTENER_MARKS[0]), 1)
        if flags & socket.MSG_CTRUNC:  # sessions send no descriptors: the listener found no room
            self._settle(short_of(OSError(errno.EMFILE, os.strerror(errno.EMFILE))))
        if descriptors:
            self.listener, self.steadfast = descriptors[0], mark == LISTENER_MARKS[True]
            return self._receive()
        return mark

    def _on_control(self) -> bool:
        """Read what is there; whether there may be more."""
        if self._hung_up or self._closing is not None:
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
            gone = Stop(Kind.KILLED, "the control channel was closed")
            self._loop.call_later(_GRACE_S, self._settle, gone)
            return False
        self._said += data
        if len(self._said) > self._max_reply + MAX_REPLY_OVERHEAD:
            self._loop.remove_reader(self.ends.control)
        try:
            reply = unpack_reply(self._said, self._nonce, self._max_reply)
        except Breach as breach:
            self._settle(Stop(Kind.KILLED, f"broke the control channel: {breach}"))
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

    def _on_end(self) -> None:
        if self._closing is not None:
            return
        self._killed = self.end.result().killed
        self._own_end = not self._killed
        while self._on_control():  # its last words, if they were complete, come first
            pass
        self._settle(Stop(Kind.KILLED, "the process ended"))
        self.kill()  # give up its descriptors

    async def _watch(self, start: float, cpu_before: float, limits: Limits) -> None:
        while (left := start + limits.wall_s - time.monotonic()) > 0:
            await asyncio.sleep(min(left, _TICK_S))
            if self.cpu_s() - cpu_before > limits.cpu_s:
                self._settle(self._out_of_time(f"used {limits.cpu_s:g} s of CPU", limits))
            try:
                if self.holdings.exceed(self.pid, self.folder, limits, running=True):
                    self._settle(over_quota(limits))
                if headless(self.pid):
                    self._settle(HEADLESS)
            except OSError as error:
                self._settle(short_of(error))
        self._settle(self._out_of_time(f"ran for {limits.wall_s:g} s", limits))

    def _out_of_time(self, why: str, limits: Limits) -> Stop:
        """Code that has no memory left may crawl, and CPython loop over its MemoryErrors."""
        try:
            with open(f"/proc/{self.pid}/statm", encoding="ascii") as file:
                taken = int(file.read().split()[0]) * _PAGE_BYTES
        except OSError:  # it is gone
            taken = 0
        if taken > (limits.memory_mib << 20) - _LAST_BYTES:
            return Stop(Kind.MEMORY, f"{why}, out of memory")
        return Stop(Kind.TIMEOUT, why)

    # --- verdicts ---------------------------------------------------------------------------------

    def _second_look(self, reply: Reply, limits: Limits) -> Reply | Stop:
        """What an honest-looking reply may hide. That the process ended behind it is no matter of
        this call: the state that it left is broken."""
        if self._output.floods:
            return _FLOOD
        self.holdings.end(self.folder)
        try:
            if self.holdings.exceed(self.pid, self.folder, limits):
                return over_quota(limits)
            if headless(self.pid):
                return HEADLESS
        except OSError as error:
            return short_of(error)
        no_room = os.strerror(errno.ENOSPC)
        if reply.kind is Kind.ERROR and no_room in reply.traceback and full(self.folder):
            return short_of(OSError(errno.ENOSPC, no_room))
        return reply

    def _honest(self, reply: Reply, duration: float, cpu_s: float) -> CallResult:
        out, err = self._output.texts
        figures = tuple(filter(None, map(png.cleaned, reply.figures)))
        less = len(figures) < len(reply.figures) and "figures" not in reply.truncated
        return CallResult(
            kind=reply.kind,
            stdout=out,
            stderr=err,
            value=reply.value,
            error_type=reply.error_type,
            traceback=reply.traceback,
            figures=figures,
            files=self.holdings.changed,
            truncated=(*self._output.truncated, *reply.truncated, *(["figures"] if less else [])),
            duration_s=duration,
            cpu_s=cpu_s,
        )

    async def _ended(
        self, stop: Stop, duration: float, cpu_s: float, cpu_before: float
    ) -> CallResult:
        """Close the process and say, by its end, who caused it."""
        kind, why = stop.kind, stop.why
        if kind is Kind.KILLED and state_of(self.pid) not in THERE:
            await asyncio.wait({self.end}, timeout=_REPORT_S)
        if self.end.done():
            end = self.end.result()
            kind, why = verdict_of(end)
            cpu_s = max(0.0, end.cpu_s - cpu_before)
        self.kill()
        out, err = self._output.texts
        return CallResult(
            kind=kind,
            stdout=out,
            stderr=err,
            traceback=why,
            truncated=tuple(self._output.truncated),
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


def _said(verdict: Reply | Stop | None) -> str:
    if isinstance(verdict, Reply):
        return verdict.traceback
    return verdict.why if verdict is not None else ""
