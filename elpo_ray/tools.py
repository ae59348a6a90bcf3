"""The code interpreter as a tool: calls of the policy in, observations out.

Invariants: what the policy sees was caused by its code, never by a failing sandbox (that is
retried, counted, and at last raised as `InfrastructureError`); a session's state is held here, so
the loss of a host loses nothing but time. No Ray: remote hosts arrive as objects with async
methods, and their faults as exception types.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from elpo_ray.config import SandboxConfig
from elpo_ray.tasks.code_interpreter import NAME
from elpo_ray.types import InfrastructureError, ToolCall, ToolKind, ToolResult
from sandbox.limits import Limits
from sandbox.results import CallResult, Kind, SandboxFailure, SessionState
from sandbox.supervisor import Sandbox, Session

_MIN_CALLS = 100
"""Calls before a share of lost ones means anything."""


def limits_of(config: SandboxConfig) -> Limits:
    """The sandbox's limits, from the configuration."""
    return Limits(
        wall_s=config.wall_s,
        cpu_s=config.cpu_s,
        memory_mib=config.memory_mib,
        output_kib=config.output_kib,
    )


class SandboxHost:
    """A pool of sessions by name: what one actor of a cluster holds."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._sessions: dict[str, Session] = {}

    async def open(self, setup: str = "", at: SessionState | None = None) -> str:
        """A new session's id. Raises SandboxFailure, SandboxUnavailable."""
        session = await self._sandbox.open(setup, at)
        name = uuid.uuid4().hex
        self._sessions[name] = session
        return name

    async def call(self, session_id: str, code: str) -> CallResult:
        """Run one cell. Raises SandboxFailure for a session of an earlier life of this host."""
        session = self._sessions.get(session_id)
        if session is None:
            raise SandboxFailure(f"no session {session_id}: the host was restarted")
        return await session.call(code)

    async def close(self, session_id: str) -> None:
        """End a session; unknown ones have ended already."""
        session = self._sessions.pop(session_id, None)
        if session is not None:
            await session.close()

    async def shutdown(self) -> None:
        """End everything."""
        self._sessions.clear()
        await self._sandbox.close()

    def metrics(self) -> dict[str, float]:
        """See `sandbox.supervisor.Sandbox.snapshot`."""
        return self._sandbox.snapshot()


class HostHandle(Protocol):
    """A `SandboxHost`, here or elsewhere."""

    async def open(self, setup: str = "", at: SessionState | None = None) -> str: ...

    async def call(self, session_id: str, code: str) -> CallResult: ...

    async def close(self, session_id: str) -> None: ...


def observation(result: CallResult) -> str:
    """What the policy reads of a call: everything it caused, and nothing else."""
    assert result.kind is not Kind.SANDBOX_FAILURE, "not the policy's doing"
    said = [result.stdout, result.stderr, result.value or "", result.traceback]
    if not result.state_kept:
        undone = "the session continues from before this call"
        said[-1] = f"[{result.kind.value}: {result.traceback}; {undone}]"
    text = "\n".join(part.rstrip("\n") for part in said if part.strip("\n"))
    return text or "[no output]"


def _malformed(call: ToolCall) -> str | None:
    """What is wrong with a call, in words for the policy; None if nothing is."""
    if call.name != NAME:
        return f"Unknown tool {call.name!r}. The only tool is {NAME!r}."
    if "code" not in call.arguments:
        return f'Missing argument. Use {NAME} with {{"code": "..."}}.'
    if not isinstance(call.arguments["code"], str):
        kind = type(call.arguments["code"]).__name__
        return f"The argument 'code' must be a string of Python code, not {kind}."
    return None


@dataclass
class _Load:
    """A host and the sessions it holds for us."""

    handle: HostHandle
    sessions: int = 0


class PooledTools:
    """Sessions over several hosts, each pinned to the least loaded one at its opening."""

    def __init__(
        self,
        hosts: Sequence[HostHandle],
        config: SandboxConfig,
        *,
        faults: tuple[type[Exception], ...] = (),
    ) -> None:
        """`faults`: exceptions by which a handle says that its host is gone."""
        if not hosts:
            raise ValueError("hosts=[]: name at least one sandbox host")
        self._hosts = [_Load(host) for host in hosts]
        self._max_failure_rate = config.max_failure_rate
        self.retries = config.retries
        self.faults: tuple[type[Exception], ...] = (SandboxFailure, *faults)
        self.calls = 0
        """Attempts to run a cell or to open a session."""
        self.failures = 0
        """Attempts that the sandbox lost, those that a retry made good included."""

    async def open(self, *, setup: str = "", at: SessionState | None = None) -> PooledSession:
        """A session that ran `setup`, or stands where `at` does.

        Raises InfrastructureError once the retries are used up, SandboxUnavailable where a host
        cannot isolate.
        """
        session = PooledSession(self, at or SessionState(setup))
        await session.attempt(None)
        return session

    @property
    def failure_rate(self) -> float:
        """Share of attempts that the sandbox lost."""
        return self.failures / self.calls if self.calls else 0.0

    def check(self) -> None:
        """Raise InfrastructureError if too many calls are lost to go on."""
        if self.calls >= _MIN_CALLS and self.failure_rate > self._max_failure_rate:
            raise InfrastructureError(
                f"the sandbox lost {self.failures} of {self.calls} calls, more than "
                f"sandbox.max_failure_rate={self._max_failure_rate}: look at its hosts"
            )

    def least_loaded(self, avoid: _Load | None) -> _Load:
        """Where the next session goes; not to `avoid`, if there is another."""
        others = [host for host in self._hosts if host is not avoid]
        return min(others or self._hosts, key=lambda host: host.sessions)


class PooledSession:
    """One trajectory's interpreter, on whatever host holds it at the moment."""

    def __init__(self, tools: PooledTools, state: SessionState) -> None:
        self._tools = tools
        self._state = state
        self._host: _Load | None = None
        self._id: str | None = None
        self._closed = False

    @property
    def state(self) -> SessionState:
        return self._state

    async def call(self, call: ToolCall) -> ToolResult:
        """Run one call. Raises InfrastructureError once the retries are used up.

        Raises ValueError when closed.
        """
        if self._closed:
            raise ValueError("the session is closed: open a new one, at its state if need be")
        wrong = _malformed(call)
        if wrong is not None:
            return ToolResult(ToolKind.MALFORMED, wrong)
        code: str = call.arguments["code"]
        result = await self.attempt(code)
        assert result is not None
        self._state = self._state.after(code, result)
        return ToolResult(
            ToolKind(result.kind.value),
            observation(result),
            duration_s=result.duration_s,
            queue_s=result.queue_s,
        )

    async def close(self) -> None:
        """End the session. May be called again."""
        self._closed = True
        await self._leave()

    async def _leave(self) -> None:
        """Give up the place on the host; one that is gone has ended the session already."""
        host, name = self._host, self._id
        self._host = self._id = None
        if host is None:
            return
        host.sessions -= 1
        if name is not None:
            try:
                await host.handle.close(name)
            except self._tools.faults:
                return

    async def attempt(self, code: str | None) -> CallResult | None:
        """Run `code` (None: only open), each retry in a new session at the same state."""
        failed: _Load | None = None
        why = ""
        for _ in range(1 + self._tools.retries):
            self._tools.calls += 1
            try:
                if self._id is None:
                    await self._open(avoid=failed)
                if code is None:
                    return None
                assert self._host is not None and self._id is not None
                result = await self._host.handle.call(self._id, code)
                if result.kind is not Kind.SANDBOX_FAILURE:
                    return result
                why = result.traceback
            except self._tools.faults as fault:
                why = f"{type(fault).__name__}: {fault}"
            self._tools.failures += 1
            failed = self._host
            await self._leave()
        raise InfrastructureError(f"the sandbox failed {1 + self._tools.retries} times: {why}")

    async def _open(self, avoid: _Load | None) -> None:
        self._host = self._tools.least_loaded(avoid)
        self._host.sessions += 1
        fresh = not self._state.entries
        self._id = await self._host.handle.open(
            self._state.setup if fresh else "", None if fresh else self._state
        )


class SandboxTools(PooledTools):
    """Sessions of one sandbox in this process."""

    def __init__(self, sandbox: Sandbox, config: SandboxConfig) -> None:
        super().__init__([SandboxHost(sandbox)], config)
