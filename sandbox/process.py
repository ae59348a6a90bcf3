"""One session's process, seen from the supervisor, which trusts no byte of it.

Invariants: the process is stopped (SIGSTOP) except while a call runs, so nothing it left behind
runs between calls; every wait has an end; whatever goes wrong ends in SIGKILL through a pidfd,
which cannot hit another process.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import time
from contextlib import suppress
from dataclasses import dataclass

from sandbox.limits import OUTPUT_KILL_BYTES, Limits
from sandbox.results import CallResult, Kind, SandboxFailure
from sandbox.streams import HeadTail
from sandbox.wire import (
    NONCE_BYTES,
    OUT_OF_MEMORY_STATUS,
    START_NONCE,
    Breach,
    Reply,
    pack_cell,
    unpack_reply,
)
from sandbox.workdir import over_quota, remove

_TICK_S = 0.25
"""Between looks at CPU time and files while a call runs."""
_GRACE_S = 0.25
"""For a process that closed its control channel to end by itself."""
_PATIENCE_S = 30.0
"""For the spawner and the kernel; whoever takes longer is broken."""
_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class End:
    """How a process ended."""

    status: int | None
    """As from wait(2); None if the spawner died first."""
    cpu_s: float = 0.0
    """CPU time of its whole life."""


@dataclass(frozen=True, slots=True)
class _Stop:
    """The supervisor's reason to end a call."""

    kind: Kind
    why: str


class SessionProcess:
    """The supervisor's ends of one session's pipes. Belongs to one event loop."""

    def __init__(self, pid: int, pidfd: int, ends: tuple[socket.socket, int, int], folder: str):
        """`ends`: the control socket and the read ends of stdout and stderr."""
        self._loop = asyncio.get_running_loop()
        self._pid, self._pidfd, self._folder = pid, pidfd, folder
        self._control, *self._pipes = ends
        self.end: asyncio.Future[End] = self._loop.create_future()
        """Set by the spawner's report."""
        self.end.add_done_callback(lambda _: self._on_end())
        self._nonce = START_NONCE
        self._verdict: asyncio.Future[Reply | _Stop] | None = self._loop.create_future()
        """What the running call (at first, the start) is waiting for."""
        self._said = bytearray()
        self._unsent = memoryview(b"")
        self._max_reply = OUTPUT_KILL_BYTES
        self._streams = [HeadTail(0), HeadTail(0)]
        self._loop.add_reader(self._control, self._on_control)
        for index, pipe in enumerate(self._pipes):
            self._loop.add_reader(pipe, self._on_print, index)

    async def started(self) -> None:
        """Wait until the process is confined. Raises SandboxFailure, then closed."""
        assert self._verdict is not None
        try:
            async with asyncio.timeout(_PATIENCE_S):
                verdict = await self._verdict
        except TimeoutError:
            verdict = _Stop(Kind.SANDBOX_FAILURE, "a session did not start in time")
        except asyncio.CancelledError:
            await self.close()
            raise
        self._verdict = None
        if isinstance(verdict, Reply) and verdict.kind is Kind.OK:
            self._signal(signal.SIGSTOP)
            return
        await self.close()
        why = verdict.why if isinstance(verdict, _Stop) else verdict.traceback
        raise SandboxFailure(f"session not started: {why}")

    async def run(self, code: bytes, index: int, limits: Limits) -> CallResult:
        """Run one cell. A result without `state_kept` means that the process is closed."""
        assert self._verdict is None, "one call at a time"
        self._verdict = self._loop.create_future()
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._streams = [HeadTail(limits.output_kib << 10) for _ in self._pipes]
        self._max_reply = 6 * 3 * (limits.output_kib << 10) + _CHUNK  # escaped, three texts
        cpu_before, start = self._cpu_s(), time.monotonic()
        self._signal(signal.SIGCONT)
        self._unsent = memoryview(
            pack_cell(self._nonce, index, max(1, round(limits.cpu_s) + 1), code)
        )
        self._on_writable()
        watch = self._loop.create_task(self._watch(start, cpu_before, limits))
        try:
            verdict = await self._verdict
            duration = time.monotonic() - start
            self._signal(signal.SIGSTOP)
        except asyncio.CancelledError:
            await self.close()
            raise
        finally:
            watch.cancel()
            self._verdict = None
        for stream in range(len(self._pipes)):
            self._drain(stream)
        if isinstance(verdict, Reply):
            verdict = self._second_look(verdict, limits)
        if isinstance(verdict, Reply):
            return self._honest(verdict, duration, self._cpu_s() - cpu_before)
        return await self._ended(verdict, duration, cpu_before)

    async def close(self) -> None:
        """Kill the process, wait until it is gone, remove its folder."""
        if self._pidfd < 0:
            return
        for reader in (self._control.fileno(), *self._pipes):
            self._loop.remove_reader(reader)
        self._loop.remove_writer(self._control)
        self._signal(signal.SIGKILL)
        pidfd, self._pidfd = self._pidfd, -1
        try:
            await asyncio.wait({self.end}, timeout=_PATIENCE_S)
        finally:
            self._control.close()
            for descriptor in (pidfd, *self._pipes):
                os.close(descriptor)
        try:
            os.rmdir(self._folder)
        except OSError:
            await asyncio.to_thread(remove, self._folder)

    # --- what the process does, as events ---------------------------------------------------------

    def _settle(self, verdict: Reply | _Stop) -> None:
        if self._verdict is not None and not self._verdict.done():
            self._verdict.set_result(verdict)

    def _on_control(self) -> bool:
        """Read what is there; whether there may be more."""
        try:
            data = self._control.recv(_CHUNK)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._loop.remove_reader(self._control)
            gone = _Stop(Kind.KILLED, "the control channel was closed")
            self._loop.call_later(_GRACE_S, self._settle, gone)
            return False
        self._said += data
        if len(self._said) > self._max_reply:
            self._loop.remove_reader(self._control)
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
        try:
            sent = self._control.send(self._unsent)
        except BlockingIOError:
            sent = 0
        except OSError:  # it hung up: the reader sees that too
            sent = len(self._unsent)
        self._unsent = self._unsent[sent:]
        if self._unsent:
            self._loop.add_writer(self._control, self._on_writable)
        else:
            self._loop.remove_writer(self._control)

    def _on_print(self, stream: int) -> bool:
        """Read what is there; whether there may be more."""
        try:
            data = os.read(self._pipes[stream], _CHUNK)
        except BlockingIOError:
            return False
        if not data:
            self._loop.remove_reader(self._pipes[stream])
            return False
        self._streams[stream].add(data)
        if self._flooded():
            self._settle(_Stop(Kind.OUTPUT, f"more than {OUTPUT_KILL_BYTES >> 20} MiB of output"))
        return True

    def _on_end(self) -> None:
        if self._pidfd < 0:
            return
        while self._on_control():  # its last words, if they were complete, come first
            pass
        self._settle(_Stop(Kind.KILLED, "the process ended"))

    async def _watch(self, start: float, cpu_before: float, limits: Limits) -> None:
        while (left := start + limits.wall_s - time.monotonic()) > 0:
            await asyncio.sleep(min(left, _TICK_S))
            if self._cpu_s() - cpu_before > limits.cpu_s:
                self._settle(_Stop(Kind.TIMEOUT, f"used {limits.cpu_s:g} s of CPU"))
            if over_quota(self._folder, limits):
                self._settle(_over_quota(limits))
        self._settle(_Stop(Kind.TIMEOUT, f"ran for {limits.wall_s:g} s"))

    # --- verdicts ---------------------------------------------------------------------------------

    def _flooded(self) -> bool:
        return sum(stream.total for stream in self._streams) > OUTPUT_KILL_BYTES

    def _drain(self, stream: int) -> None:
        while not self._flooded() and self._on_print(stream):
            pass

    def _second_look(self, reply: Reply, limits: Limits) -> Reply | _Stop:
        """What an honest-looking reply may hide."""
        if self.end.done():
            return _Stop(Kind.KILLED, "the process ended")
        if self._flooded():
            return _Stop(Kind.OUTPUT, f"more than {OUTPUT_KILL_BYTES >> 20} MiB of output")
        if over_quota(self._folder, limits):
            return _over_quota(limits)
        return reply

    def _printed(self) -> tuple[str, str, bool]:
        out, err = self._streams
        return out.text(), err.text(), out.truncated or err.truncated

    def _honest(self, reply: Reply, duration: float, cpu: float) -> CallResult:
        stdout, stderr, truncated = self._printed()
        return CallResult(
            kind=reply.kind,
            stdout=stdout,
            stderr=stderr,
            value=reply.value,
            error_type=reply.error_type,
            traceback=reply.traceback,
            truncated=truncated or reply.truncated,
            duration_s=duration,
            cpu_s=cpu,
        )

    async def _ended(self, stop: _Stop, duration: float, cpu_before: float) -> CallResult:
        """Close the process and tell, by its end, whose doing it was."""
        killed_by_us = not self.end.done()
        await self.close()
        kind, why, cpu = stop.kind, stop.why, 0.0
        if self.end.done():
            end = self.end.result()
            cpu = max(0.0, end.cpu_s - cpu_before)
            if not killed_by_us:
                kind, why = _verdict_of(end)
        stdout, stderr, truncated = self._printed()
        return CallResult(
            kind=kind,
            stdout=stdout,
            stderr=stderr,
            traceback=why,
            truncated=truncated,
            duration_s=duration,
            cpu_s=cpu,
            state_kept=False,
        )

    def _cpu_s(self) -> float:
        """CPU time of all its threads, by the kernel's clock for that process; 0 once gone."""
        try:
            return time.clock_gettime((~self._pid << 3) | 2)
        except OSError:
            return 0.0

    def _signal(self, number: signal.Signals) -> None:
        if self._pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)


def _over_quota(limits: Limits) -> _Stop:
    return _Stop(Kind.OUTPUT, f"more than {limits.files} files or {limits.file_mib} MiB of files")


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
    if -code == signal.SIGXCPU:
        return Kind.TIMEOUT, "used up its CPU seconds"
    if -code == signal.SIGKILL:  # the filter denies it to the code: the kernel or an operator
        return Kind.SANDBOX_FAILURE, "killed from outside (out of memory on the host?)"
    return Kind.KILLED, name
