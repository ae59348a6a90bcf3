"""One call: when it must end, and what came of it, by what is seen from outside."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from typing import TYPE_CHECKING

from sandbox import png
from sandbox.endings import (
    FELLED,
    FLOOD,
    HEADLESS,
    HOARD,
    REPORT_S,
    Stop,
    beyond_quota,
    headless,
    is_ending,
    over_quota,
    short_of,
    verdict_of,
    was_killed,
)
from sandbox.holdings import used_bytes
from sandbox.limits import Limits
from sandbox.results import CallResult, Kind
from sandbox.shortage import full
from sandbox.wire import Reply

if TYPE_CHECKING:
    from sandbox.process import SessionProcess

_TICK_S = 0.25
"""Between looks at CPU time and files while a call runs."""
_FREED_S = (0.01, 0.1, 0.4)
"""Waits between looks whether a process that ended has freed its files: a disk may take a while."""
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_LAST_BYTES = 2 << 20
"""Bytes of address space below which nearly every allocation fails."""


class Call:
    """Made when the process may run; its clock runs from then on."""

    def __init__(self, process: SessionProcess, limits: Limits) -> None:
        self._process, self._limits = process, limits
        self._cpu_before, self._start = process.cpu_s(), time.monotonic()
        self._duration_s = 0.0
        self._alarm: asyncio.TimerHandle | None = None

    def watch(self) -> None:
        """End the call if it goes beyond a limit, until `stop_the_clock`."""
        left = self._start + self._limits.wall_s - time.monotonic()
        if left > 0:
            loop = asyncio.get_running_loop()
            self._alarm = loop.call_later(min(left, _TICK_S), self._on_tick)
        else:
            self._process.settle(self._out_of_time(f"ran for {self._limits.wall_s:g} s"))

    def _on_tick(self) -> None:
        process, limits = self._process, self._limits
        if process.cpu_s() - self._cpu_before > limits.cpu_s:
            process.settle(self._out_of_time(f"used {limits.cpu_s:g} s of CPU"))
        try:
            if process.holdings.exceed(process.pid, process.folder, limits, running=True):
                process.settle(over_quota(limits))
            elif process.holdings.may_hoard(process.pid, process.folder, limits):
                process.settle(HOARD)
            if headless(process.pid):
                process.settle(HEADLESS)
        except OSError as error:
            process.settle(short_of(error))
        self.watch()

    def _out_of_time(self, why: str) -> Stop:
        """Code that has no memory left may crawl, and CPython loop over its MemoryErrors."""
        try:
            with open(f"/proc/{self._process.pid}/statm", encoding="ascii") as file:
                taken = int(file.read().split()[0]) * _PAGE_BYTES
        except OSError:  # it is gone
            taken = 0
        if taken > (self._limits.memory_mib << 20) - _LAST_BYTES:
            return Stop(Kind.MEMORY, f"{why}, out of memory")
        return Stop(Kind.TIMEOUT, why)

    def excuse(self, seconds: float) -> None:
        """The process had to wait for so long."""
        self._start += seconds

    def stop_the_clock(self) -> None:
        """The process has answered, or it must end."""
        self._duration_s = time.monotonic() - self._start
        if self._alarm is not None:
            self._alarm.cancel()

    async def result(self, verdict: Reply | Stop) -> CallResult:
        """What came of the call. Without `state_kept` the process is closed."""
        if isinstance(verdict, Reply):
            verdict = self._second_look(verdict)
        cpu_s = self._process.cpu_s() - self._cpu_before
        if isinstance(verdict, Reply):
            return self._honest(verdict, cpu_s)
        return await self._ended(verdict, cpu_s)

    def _second_look(self, reply: Reply) -> Reply | Stop:
        """What an honest-looking reply may hide. That the process ended behind it is no matter of
        this call: the state that it left is broken."""
        process = self._process
        if process.output.floods:
            return FLOOD
        process.holdings.end(process.folder)
        try:
            if process.holdings.exceed(process.pid, process.folder, self._limits):
                return over_quota(self._limits)
            if headless(process.pid):
                return HEADLESS
        except OSError as error:
            return short_of(error)
        no_room = os.strerror(errno.ENOSPC)
        if reply.kind is Kind.ERROR and no_room in reply.traceback and full(process.folder):
            return short_of(OSError(errno.ENOSPC, no_room))
        return reply

    def _honest(self, reply: Reply, cpu_s: float) -> CallResult:
        process = self._process
        out, err = process.output.texts
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
            files=process.holdings.changed,
            truncated=(*process.output.truncated, *reply.truncated, *(["figures"] if less else [])),
            duration_s=self._duration_s,
            cpu_s=cpu_s,
        )

    async def _hoarded(self) -> bool:
        """End the process, and see whether that frees more than it may have in files: twice that,
        as its folder may be emptied at the same time."""
        root = os.path.dirname(os.path.dirname(self._process.folder))
        used, most = used_bytes(root), 2 * self._limits.file_mib << 20
        await self._process.close()
        for wait_s in _FREED_S:
            if used - used_bytes(root) > most:
                return True
            await asyncio.sleep(wait_s)
        return False

    async def _ended(self, stop: Stop, cpu_s: float) -> CallResult:
        """Close the process and say, by its end, who caused it."""
        process, kind, why = self._process, stop.kind, stop.why
        if kind is Kind.KILLED and is_ending(process.pid):
            await asyncio.wait({process.end}, timeout=REPORT_S)
        if process.end.done():
            end = process.end.result()
            kind, why = verdict_of(end)
            cpu_s = max(0.0, end.cpu_s - self._cpu_before)
        elif kind is not Kind.OUTPUT and was_killed(process.pid):  # and takes its time to end
            kind, why = FELLED.kind, FELLED.why
        elif stop is HOARD and await self._hoarded():
            kind, why = Kind.OUTPUT, beyond_quota(self._limits)
        process.kill()
        out, err = process.output.texts
        return CallResult(
            kind=kind,
            stdout=out,
            stderr=err,
            traceback=why,
            truncated=tuple(process.output.truncated),
            duration_s=self._duration_s,
            cpu_s=cpu_s,
            state_kept=False,
        )
