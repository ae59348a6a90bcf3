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

from sandbox.calls import Call
from sandbox.channels import Ends
from sandbox.endings import (
    FLOOD,
    REPORT_S,
    THERE,
    End,
    Refused,
    Stop,
    Tampered,
    is_ending,
    patience_s,
    short_of,
    state_of,
    verdict_of,
    was_killed,
)
from sandbox.holdings import Holdings
from sandbox.inspection import Sight
from sandbox.limits import OUTPUT_KILL_BYTES, Limits
from sandbox.results import CallResult, Kind, SandboxFailure
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

_GRACE_S = 0.25
"""Seconds that a process which closed its control channel has to end by itself."""
_PATIENCE_S = 30.0
"""Seconds that the spawner and the kernel may take; beyond them they are broken."""
_ORDER_S = 5.0
"""Seconds that a process, possibly hostile, may take to do what it is told; see `patience_s`."""
_STOPPED_S = (*[0.0] * 20, *[0.0002] * 10, *[0.002] * 10, *[0.02] * 10, *[0.2] * 25)
"""Waits between looks whether a process that was told to stop has done so."""
_CHUNK = 1 << 16


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
        self._mute = False
        """Whether it did not answer when it was told to show itself or to hide."""
        self._call: Call | None = None
        """What runs."""
        self._starting = False
        self._said = bytearray()
        self._unsent = memoryview(b"")
        self._waits = False
        """Whether there is more to send than its channel takes."""
        self._max_reply = OUTPUT_KILL_BYTES
        self.output = Output(ends.pipes, lambda: self.settle(FLOOD))
        """What it prints."""
        self.holdings = Holdings()
        """What it keeps in files."""
        self._own_end = self._killed = False
        self._hung_up = False
        """Whether its control channel is at its end."""
        self.at_rest = self._stops = False
        """Whether it is known to be stopped; whether it was told to."""
        self.birth: Callable[[], None] | None = None
        """Lets a branch go on that still waits in the kernel. Raises OSError."""
        self._closing: asyncio.Task[None] | None = None

    def identify(self, pid: int, inner_pid: int, pidfd: int) -> None:
        """Who it is, here and to the spawner; `pidfd` belongs to this object from here on."""
        self.pid, self.inner_pid, self._pidfd = pid, inner_pid, pidfd
        self._loop.add_reader(self.ends.control.fileno(), self._on_control)
        self.output.listen(self._loop)

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
        await self._heard_of()
        more = "; it may need more: raise limits.memory_mib or limits.open_files"
        await self.close()
        why = f"{_said(verdict)}{more if self.ended_itself else ''}"
        raise SandboxFailure(f"session not started: {why}")

    async def fork(self, ticket: bytes, folder: str) -> None:
        """Have it fork a branch that works in `folder`; ends when `forked` says so.

        Raises Refused; Tampered if it does anything else; SandboxFailure if it is gone.
        """
        if not self.alive:
            raise SandboxFailure("no fork: the process was lost")
        self._send(pack_fork(ticket, folder))
        self.resume()
        verdict = await self._settled(ticket, patience_s(_ORDER_S))
        if isinstance(verdict, Reply):
            raise Refused(verdict.traceback)
        if verdict is not None:
            raise (Tampered if self.alive else SandboxFailure)(f"no fork: {verdict.why}")

    def forked(self) -> None:
        """The branch that was ordered is there."""
        self.settle(None)

    async def _settled(self, nonce: bytes, patience_s: float) -> Reply | Stop | None:
        """What comes of an order that goes by this nonce."""
        assert self._verdict is None, "one order at a time"
        self._nonce, self._verdict = nonce, self._loop.create_future()
        late = Stop(Kind.SANDBOX_FAILURE, f"nothing came of it for {patience_s:g} s")
        alarm = self._loop.call_later(patience_s, self.settle, late)
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
            if not self.end.done() or self.end.result().killed:
                raise SandboxFailure("the session's process was lost")
            kind, why = verdict_of(self.end.result())  # its own doing, only sooner than the cell
            return CallResult(kind=kind, traceback=why, state_kept=False)
        self._verdict = self._loop.create_future()
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self.output.begin(limits.output_kib << 10)
        self.holdings.begin(self.folder, limits)
        self._max_reply = 6 * 3 * (limits.output_kib << 10) + _CHUNK  # escaped, three texts
        async with self.undisturbed():
            call = self._call = Call(self, limits)
            self._send(pack_cell(self._nonce, index, code))
            self.resume()
        call.watch()
        try:
            verdict = await self._verdict
            self.pause()
        except asyncio.CancelledError:
            await self.close()
            raise
        finally:
            call.stop_the_clock()
            self._verdict = self._call = None
        assert verdict is not None, "no fork was ordered"
        self.output.drain(self._loop)
        return await call.result(verdict)

    def retire(self) -> bool:
        """It will print no more, only be forked: give up what printing needs. False if it has."""
        if not self.ends.pipes:
            return False
        self.output.stop(self._loop)
        while self.ends.pipes:
            os.close(self.ends.pipes.pop())
        return True

    def kill(self) -> asyncio.Task[None]:
        """Kill the process; the task ends when it is gone. Idempotent."""
        if self._closing is None:
            self.settle(Stop(Kind.SANDBOX_FAILURE, "the process was ended with its tree"))
            self._loop.remove_reader(self.ends.control.fileno())
            self.output.stop(self._loop)
            self._loop.remove_writer(self.ends.control.fileno())
            self._signal(signal.SIGKILL)
            self.birth = None
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
        """Wait for the report if it seems to have ended. That it was killed shows before."""
        while self._on_control():
            pass
        if self._closing is None and self.pid > 0 and was_killed(self.pid):
            self._killed = True
            return
        ended = self.pid > 0 and is_ending(self.pid)
        if ended or self._hung_up:
            await asyncio.wait({self.end}, timeout=patience_s(_ORDER_S) if ended else REPORT_S)

    @property
    def alive(self) -> bool:
        return self._closing is None and not self.end.done()

    def resume(self) -> None:
        """Let it go on: best once there is something to do, so that it wakes up once only."""
        if self.birth is not None:
            self._let_live(self.birth)
        elif self._stops:
            self._signal(signal.SIGCONT)
        self.at_rest = self._stops = False

    def _let_live(self, birth: Callable[[], None]) -> None:
        self.birth = None
        try:
            birth()
        except OSError as error:
            self.settle(short_of(error))
        self.ends.sent()

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
        if not self.alive or self._mute:
            return False
        nonce = secrets.token_bytes(NONCE_BYTES)
        self._send(pack_uncover(nonce, visible))
        self.resume()
        self._mute = not isinstance(await self._settled(nonce, patience_s(_ORDER_S)), Reply)
        return not self._mute and await self.stopped()

    async def ready(self) -> bool:
        """Stop it where it waits for orders: a branch goes on for a moment after its birth. False
        if that cannot be had."""
        async with self.undisturbed():
            return self.alive and await self.uncover(False)

    def excuse(self, seconds: float) -> None:
        """It was stopped for so long while its call ran, which does not count."""
        if self._call is not None:
            self._call.excuse(seconds)

    def accuse(self, why: str) -> None:
        """It was seen to do what no honest code does: end its call."""
        self.settle(Stop(Kind.KILLED, why))

    # --- what the process does, as events ---------------------------------------------------------

    def settle(self, verdict: Reply | Stop | None) -> None:
        """Its call, or whatever else it was told to do, has come to this, if to nothing before."""
        if self._verdict is not None and not self._verdict.done():
            self._verdict.set_result(verdict)

    def _receive(self) -> bytes:
        """What it wrote, b"" at the end. Raises BlockingIOError."""
        control = self.ends.control
        if not self._starting or self.listener >= 0:
            return control.recv(_CHUNK)
        mark, descriptors, flags, _ = socket.recv_fds(control, len(LISTENER_MARKS[0]), 1)
        if flags & socket.MSG_CTRUNC:  # sessions send no descriptors: the listener found no room
            self.settle(short_of(OSError(errno.EMFILE, os.strerror(errno.EMFILE))))
        if descriptors:
            self.listener, self.steadfast = descriptors[0], mark == LISTENER_MARKS[True]
            return self._receive()
        return mark

    def _on_control(self) -> bool:
        """Read what is there; whether there may be more."""
        most = self._max_reply + MAX_REPLY_OVERHEAD
        if self._hung_up or self._closing is not None or len(self._said) > most:
            return False
        try:
            data = self._receive()
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._hung_up = True
            self._loop.remove_reader(self.ends.control.fileno())
            gone = Stop(Kind.KILLED, "the control channel was closed")
            self._loop.call_later(_GRACE_S, self.settle, gone)
            return False
        self._said += data
        if len(self._said) > most:
            self._loop.remove_reader(self.ends.control.fileno())
        try:
            reply = unpack_reply(self._said, self._nonce, self._max_reply)
        except Breach as breach:
            self.settle(Stop(Kind.KILLED, f"broke the control channel: {breach}"))
        else:
            if reply is not None:
                self._said.clear()
                self._nonce = b""  # whatever comes before the next cell is a breach
                self.settle(reply)
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
        waited, self._waits = self._waits, bool(self._unsent)
        if self._waits and not waited:
            self._loop.add_writer(self.ends.control.fileno(), self._on_writable)
        elif waited and not self._waits:
            self._loop.remove_writer(self.ends.control.fileno())

    def _on_end(self) -> None:
        if self._closing is not None:
            return
        self._killed = self.end.result().killed
        self._own_end = not self._killed
        while self._on_control():  # its last words, if they were complete, come first
            pass
        self.settle(Stop(Kind.KILLED, "the process ended"))
        self.kill()  # give up its descriptors

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
