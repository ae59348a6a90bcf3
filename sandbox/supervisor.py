"""Sessions of one host: a bounded number of confined processes and the states they stand for.

Invariants: the log of a session never contains a call whose outcome is unknown; a session's
process, if it has one, is in the state that the log describes; every process is gone when its
session is closed. Nothing here blocks the event loop.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import replace

from sandbox.confine import TIERS
from sandbox.launch import SpawnerClient
from sandbox.limits import MAX_CODE_BYTES, Limits
from sandbox.metrics import Metrics
from sandbox.process import SessionProcess
from sandbox.results import CallResult, Kind, SandboxFailure, SessionState

_REPLAY_PATIENCE = 2.0
"""A replayed call may take this many times the wall-clock limit: it did end once."""


class Session:
    """A stateful interpreter. Opened by `Sandbox.open`; calls run one after the other."""

    def __init__(self, sandbox: Sandbox, state: SessionState, waited_s: float) -> None:
        self._sandbox = sandbox
        self._state = state
        self._process: SessionProcess | None = None
        self._restored_by = "fresh"
        self._waited_s = waited_s
        """Wait for a free session, told with the first call."""
        self._one_at_a_time = asyncio.Lock()
        self._closed = False

    @property
    def state(self) -> SessionState:
        """Where the session stands: after the last call that returned."""
        return self._state

    async def call(self, code: str) -> CallResult:
        """Run one cell. A failure of the sandbox is a result too, and leaves `state` as it was.

        Raises ValueError when the session is closed.
        """
        async with self._one_at_a_time:
            if self._closed:
                raise ValueError("the session is closed: open a new one, at its state if need be")
            try:
                result = await self._call(code)
            except SandboxFailure as failure:
                result = CallResult(
                    kind=Kind.SANDBOX_FAILURE, traceback=str(failure), state_kept=False
                )
            result = replace(result, queue_s=result.queue_s + self._waited_s)
            self._waited_s = 0.0
            self._state = self._state.after(code, result)
            self._sandbox.metrics.count(result)
            return result

    async def close(self) -> None:
        """End the process and free its place. May be called again."""
        if self._closed:
            return
        self._closed = True
        await self._drop()
        self._sandbox.release(self)

    async def restore(self) -> None:
        """Bring a fresh process to `state`, checking every replayed result.

        Raises SandboxFailure; the session is then without a process.
        """
        await self._drop()
        self._process = await self._sandbox.spawn()
        try:
            if self._state.setup:
                result = await self._execute(self._state.setup, 0, 1.0)
                if result.kind is not Kind.OK:
                    said = result.traceback or result.kind.value
                    raise SandboxFailure(f"the setup code failed: {said}")
            for index, entry in enumerate(self._state.entries, 1):
                if entry.lost:
                    continue
                result = await self._execute(entry.code, index, _REPLAY_PATIENCE)
                if result.digest() != entry.digest:
                    raise SandboxFailure(
                        f"replay diverged: call {index} of {len(self._state.entries)} came to "
                        f"{result.kind.value}, with another result than when it was recorded"
                    )
                self._sandbox.metrics.replayed_calls += 1
        except BaseException:
            await self._drop()
            raise
        if self._state.entries:
            self._restored_by = "replay"
            self._sandbox.metrics.replays += 1

    async def _call(self, code: str) -> CallResult:
        if len(code.encode("utf-8", "surrogatepass")) > MAX_CODE_BYTES:
            said = f"ValueError: the code is longer than {MAX_CODE_BYTES >> 20} MiB"
            return CallResult(kind=Kind.ERROR, error_type="ValueError", traceback=said)
        if self._process is None or self._process.end.done():
            await self.restore()
        return await self._execute(code, len(self._state.entries) + 1, 1.0)

    async def _execute(self, code: str, index: int, patience: float) -> CallResult:
        """One run in the live process, once a processor is free."""
        assert self._process is not None
        limits = self._sandbox.limits
        if patience != 1.0:
            limits = replace(limits, wall_s=limits.wall_s * patience)
        asked = time.monotonic()
        async with self._sandbox.running:
            queue_s = time.monotonic() - asked
            try:
                data = code.encode("utf-8", "surrogatepass")
                result = await self._process.run(data, index, limits)
            except asyncio.CancelledError:
                self._process = None  # it was closed: its state is unknown
                raise
        if not result.state_kept:
            self._process = None
        return replace(
            result,
            queue_s=queue_s,
            restored_by=self._restored_by,
            isolation=self._sandbox.isolation,
        )

    async def _drop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            await process.close()


class Sandbox:
    """A pool of sessions on this host, under one event loop. `async with` closes it."""

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        sessions: int = 64,
        running: int | None = None,
        preload: Sequence[str] = (),
        isolation: str = "standard",
        allow_degraded: bool = False,
    ) -> None:
        """`sessions` bounds the live processes: `open` waits for a free place, so who holds a
        session must not need a second one to go on. `running` bounds the calls that execute at
        the same time (default: processors of this host); others wait, outside their time limit.
        `preload` names modules that every session finds imported. `isolation` is the least tier
        to accept, "strong" or "standard"; the best that works here is taken. `allow_degraded`
        runs with less where this machine lacks layers: for code you trust.
        """
        for name, value in (("sessions", sessions), ("running", running)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value!r}: use 1 or more")
        if isolation not in TIERS[:2]:
            raise ValueError(
                f'isolation={isolation!r}: use "strong" or "standard"; for less, allow_degraded'
            )
        self.limits = limits or Limits()
        self.metrics = Metrics()
        self.running = asyncio.Semaphore(running or len(os.sched_getaffinity(0)))
        self._places = asyncio.Semaphore(sessions)
        self._preload = tuple(preload)
        self._required = isolation
        self._allow_degraded = allow_degraded
        self._spawner: SpawnerClient | None = None
        self._starting = asyncio.Lock()
        self._sessions: set[Session] = set()
        self._closed = False

    async def __aenter__(self) -> Sandbox:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def isolation(self) -> str:
        """The tier in force; empty before the first session."""
        return self._spawner.isolation if self._spawner else ""

    @property
    def layers(self) -> tuple[str, ...]:
        """Kernel layers in force; empty before the first session."""
        return self._spawner.layers if self._spawner else ()

    async def open(self, setup: str = "", at: SessionState | None = None) -> Session:
        """A session that ran `setup`, or stands where `at` does.

        Raises SandboxFailure (also when a replay diverges or the setup fails),
        SandboxUnavailable when this machine cannot isolate, ValueError when closed.
        """
        if at is not None and setup not in ("", at.setup):
            raise ValueError(f"setup={setup!r}: the state has a setup of its own, leave it out")
        self._check_open()
        asked = time.monotonic()
        await self._places.acquire()
        session = Session(self, at or SessionState(setup), time.monotonic() - asked)
        self._sessions.add(session)
        try:
            await session.restore()
        except BaseException as error:
            self.metrics.failures += isinstance(error, SandboxFailure)
            await session.close()
            raise
        self.metrics.opened += 1
        return session

    async def close(self) -> None:
        """Close every session and end the spawner; no process is left. May be called again."""
        self._closed = True
        await asyncio.gather(*(session.close() for session in list(self._sessions)))
        async with self._starting:
            if self._spawner is not None:
                await self._spawner.close()
                self._spawner = None

    def snapshot(self) -> dict[str, float]:
        """The metrics, with the number of live sessions."""
        return {**self.metrics.snapshot(), "live_sessions": len(self._sessions)}

    async def spawn(self) -> SessionProcess:
        """A confined process, from a new spawner if the last one died. Raises as `open`."""
        self._check_open()
        async with self._starting:
            if self._spawner is not None and not self._spawner.alive:
                await self._spawner.close()
                self._spawner = None
            if self._spawner is None:
                self._spawner = await SpawnerClient.start(
                    self.limits,
                    self._preload,
                    isolation=self._required,
                    allow_degraded=self._allow_degraded,
                )
            spawner = self._spawner
        return await spawner.spawn()

    def release(self, session: Session) -> None:
        """A session is closed: its place is free."""
        self._sessions.discard(session)
        self._places.release()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the sandbox is closed: make a new one")
