"""Calls of the user's code: plain functions in threads, async ones on the loop, each within a time
limit; and which of them are running, written where it outlives the process."""

from __future__ import annotations

import asyncio
import inspect
import mmap
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from elpo_ray.tools.results import as_text, error_text
from elpo_ray.tools.thread_pool import Outcome, Threads
from elpo_ray.types import InfrastructureError, ToolKind, ToolResult

MAX_ABANDONED = 1000
"""Threads of calls that never came back with which a process is not worth keeping."""


class RunningTools:
    """The names of the tools that run in this process, in a file that can be read after its death.

    The file is mapped into memory: what was written stays although the process ended at once.
    """

    SIZE = 4096

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(self.SIZE))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), self.SIZE)
        self._running: dict[int, str] = {}
        self._last = 0

    def begin(self, name: str) -> int:
        """A call of `name` begins; what is returned names the call."""
        self._last += 1
        self._running[self._last] = name
        self._write()
        return self._last

    def end(self, call: int) -> None:
        self._running.pop(call, None)
        self._write()

    def _write(self) -> None:
        names: dict[str, None] = dict.fromkeys(reversed(self._running.values()))
        text = ", ".join(names).encode()[: self.SIZE - 1]
        self._memory[: len(text) + 1] = text + b"\0"

    @staticmethod
    def read(path: Path) -> str:
        """The names, the call that began last first; empty if nothing ran or nothing is known."""
        with suppress(OSError):
            return path.read_bytes().partition(b"\0")[0].decode(errors="ignore")
        return ""


class Caller:
    """Runs the user's functions for one event loop."""

    def __init__(self, timeout_s: float, running: RunningTools | None = None) -> None:
        self.timeout_s = timeout_s
        self.timeouts = 0
        """Calls that were over their time limit."""
        self._threads = Threads()
        self._running = running
        self._notes: list[str] = []
        self._blocked: dict[str, int] = {}
        """Calls over their time limit, by tool."""

    @property
    def abandoned(self) -> int:
        """Calls over their time limit that still hold a thread."""
        return self._threads.abandoned

    def note(self, text: str) -> None:
        """Have a person told."""
        self._notes.append(text)

    def take_notes(self) -> list[str]:
        """The notes since the last call."""
        notes, self._notes = self._notes, []
        return notes

    def counters(self) -> dict[str, float]:
        """Counts since the start, and of now."""
        return {"tool_timeouts": self.timeouts, "tool_threads_abandoned": self.abandoned}

    def check(self) -> None:
        """Raise InfrastructureError if so many calls never came back that only a new process
        helps."""
        if self.abandoned >= MAX_ABANDONED:
            worst = max(self._blocked, key=lambda name: self._blocked[name])
            raise InfrastructureError(
                f"{self.abandoned} tool calls never came back, most of them of {worst}: give it a "
                "time limit of its own"
            )

    async def call(
        self, name: str, function: Callable[..., Any], arguments: Mapping[str, Any]
    ) -> ToolResult:
        """A tool call: what the function returns, as text. An exception is an observation, but for
        an InfrastructureError, which is raised."""
        outcome = await self._outcome(name, partial(function, **arguments), as_text)
        if outcome.timed_out:
            text = f"Error: {name} did not return within {self.timeout_s:g} s"
            return ToolResult(ToolKind.TIMEOUT, text, duration_s=outcome.duration_s)
        if isinstance(outcome.error, InfrastructureError):
            raise outcome.error
        if outcome.error is not None:
            text = error_text(outcome.error)
            return ToolResult(ToolKind.ERROR, text, duration_s=outcome.duration_s)
        return ToolResult(ToolKind.OK, outcome.value, duration_s=outcome.duration_s)

    async def value(self, name: str, function: Callable[[], Any]) -> Any:
        """What `function()` returns or raises; SystemExit and its like as a RuntimeError. Raises
        TimeoutError after the time limit."""
        outcome = await self._outcome(name, function, lambda value: value)
        if outcome.timed_out:
            raise TimeoutError(f"{name} did not return within {self.timeout_s:g} s")
        if outcome.error is None:
            return outcome.value
        if isinstance(outcome.error, Exception):
            raise outcome.error
        raise RuntimeError(f"{type(outcome.error).__name__}: {outcome.error}")

    async def _outcome(
        self, name: str, function: Callable[[], Any], convert: Callable[[Any], Any]
    ) -> Outcome:
        number = 0 if self._running is None else self._running.begin(name)

        def on_end() -> None:
            if self._running is not None:
                self._running.end(number)

        if inspect.iscoroutinefunction(function):
            outcome = await self._awaited(function, convert, on_end)
        else:
            outcome = await self._threads.run(lambda: convert(function()), self.timeout_s, on_end)
        if outcome.timed_out:
            self.timeouts += 1
            self._blocked[name] = self._blocked.get(name, 0) + 1
        return outcome

    async def _awaited(
        self, function: Callable[[], Any], convert: Callable[[Any], Any], on_end: Callable[[], None]
    ) -> Outcome:
        began = time.perf_counter()
        task = asyncio.ensure_future(_guarded(function, convert))
        task.add_done_callback(lambda _: on_end())
        try:
            done, _ = await asyncio.wait({task}, timeout=self.timeout_s)
        except asyncio.CancelledError:
            task.cancel()
            raise
        outcome = Outcome(timed_out=True)
        if not done:
            task.cancel()  # one that does not let itself be cancelled is left alone
        elif task.cancelled():
            outcome = Outcome(error=asyncio.CancelledError())
        else:
            outcome = task.result()
        outcome.duration_s = time.perf_counter() - began
        return outcome


async def _guarded(function: Callable[[], Any], convert: Callable[[Any], Any]) -> Outcome:
    """An async function's outcome. SystemExit and KeyboardInterrupt would end the loop."""
    process, outcome = os.getpid(), Outcome()
    try:
        outcome.value = convert(await function())
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # the user's code is a boundary
        outcome.error = error
    if os.getpid() != process:
        os._exit(0)
    return outcome
