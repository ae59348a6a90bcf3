"""The code interpreter as a tool: calls of the policy in, observations out.

Invariants: what the policy sees was caused by its code, never by a failing sandbox (that is
retried on another host, counted, and at last raised as `ToolsLost`); a session's log is held here,
so the loss of a host loses nothing but time. A tree keeps to the host that holds its snapshots. No
Ray: remote hosts arrive as objects with async methods, and their faults as exception types.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from elpo_ray.chat.calls import checked_call
from elpo_ray.config.rollout import LastLine, SandboxConfig
from elpo_ray.tools.code_interpreter import NAME, SCHEMA, printing_last_line
from elpo_ray.tools.sandbox_host import Opened
from elpo_ray.types import (
    InfrastructureError,
    Problem,
    RewardValue,
    ToolCall,
    ToolKind,
    ToolResult,
    ToolsLost,
)
from sandbox.png import size_of
from sandbox.results import CallResult, Keep, Kind, ReplayDiverged, SandboxFailure, SessionState

_MIN_CALLS = 100
"""Calls before a share of lost ones means anything."""


MAX_FIGURE_BYTES = 1 << 20
"""Images that the results of one session carry; what does not fit is only named in the text."""


class HostHandle(Protocol):
    """A `SandboxHost`, here or elsewhere."""

    async def open(
        self, setup: str, at: SessionState | None, tree: str | None, keep: Keep
    ) -> Opened: ...

    async def call(self, session_id: str, code: str) -> CallResult: ...

    async def close(self, session_id: str) -> None: ...

    async def release(self, tree: str) -> None: ...


def observation(result: CallResult) -> str:
    """What the policy reads of a call: everything it caused, and nothing else."""
    assert result.kind is not Kind.SANDBOX_FAILURE, "not the policy's doing"
    figures = [
        "[figure {}: {} x {}]".format(number, *size_of(image))
        for number, image in enumerate(result.figures, 1)
    ]
    said = [result.stdout, result.stderr, result.value or "", *figures, result.traceback]
    if not result.state_kept:
        undone = "the session continues from before this call"
        said[-1] = f"[{result.kind.value}: {result.traceback}; {undone}]"
    text = "\n".join(part.rstrip("\n") for part in said if part.strip("\n"))
    return text or "[no output]"


@dataclass(eq=False)
class _Host:
    """A host and the sessions it holds for us."""

    handle: HostHandle
    sessions: int = 0


class PooledTools:
    """Sessions over several hosts."""

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
        self._hosts = [_Host(host) for host in hosts]
        self._homes: defaultdict[str, list[_Host]] = defaultdict(list)
        """The hosts of each unreleased tree, the one to prefer last."""
        self._alone: set[str] = set()
        """Unreleased trees of one session: hosts are not told of them."""
        self.named: dict[str, _Host] = {}
        """Hosts by the name that they write into states."""
        self.config = config
        self.faults: tuple[type[Exception], ...] = (SandboxFailure, *faults)
        self.calls = 0
        """Calls that were asked for."""
        self.failures = 0
        """Attempts at them that the sandbox lost, those that a retry made good included."""
        self.lost = 0
        """Calls that the sandbox lost for good."""

    async def begin(self, problem: Problem, tree: str, *, alone: bool = False) -> str | None:
        """See `interfaces.Tools.begin`; an interpreter is set up when it is first called."""
        if alone:
            self._alone.add(tree)
        return None

    async def open(
        self,
        *,
        setup: str = "",
        at: SessionState | None = None,
        tree: str | None = None,
        branches: bool = True,
    ) -> PooledSession:
        """A session that ran `setup`, or stands where `at` does, among those of `tree`.

        A host is asked for it at the first call: an episode without a call needs none.
        """
        keep = Keep.STATES if branches else Keep.NEWEST
        if self.config.stateless:
            keep = Keep.NOTHING
        shared = None if tree in self._alone else tree
        return PooledSession(self, at or SessionState(setup), shared, keep)

    async def release(self, tree: str) -> None:
        """See `interfaces.Tools.release`."""
        self._alone.discard(tree)
        for host in self._homes.pop(tree, []):
            try:
                await host.handle.release(tree)
            except self.faults:
                continue  # gone, and the snapshots with it

    @property
    def failure_rate(self) -> float:
        """Share of calls that the sandbox lost for good."""
        return self.lost / self.calls if self.calls else 0.0

    def check(self) -> None:
        """Raise InfrastructureError if too many calls are lost to go on."""
        if self.calls >= _MIN_CALLS and self.failure_rate > self.config.max_failure_rate:
            raise InfrastructureError(
                f"the sandbox lost {self.lost} of {self.calls} calls for good, more than "
                f"sandbox.max_failure_rate={self.config.max_failure_rate}: look at its hosts"
            )

    def host_for(self, state: SessionState, tree: str | None, avoid: _Host | None) -> _Host:
        """Where a session of `tree` goes: to the snapshot of its state, to the rest of the tree,
        else to the least loaded host; not to `avoid`, if there is another."""
        homes = self._homes[tree] if tree is not None else []
        for home in (self.named.get(state.host), *reversed(homes)):
            if home is not None and home is not avoid:
                chosen = home
                break
        else:
            others = [host for host in self._hosts if host is not avoid]
            chosen = min(others or self._hosts, key=lambda host: host.sessions)
        if chosen in homes:
            homes.remove(chosen)
        if tree is not None:
            homes.append(chosen)
        return chosen


class PooledSession:
    """One trajectory's interpreter, on whatever host holds it at the moment."""

    def __init__(
        self, tools: PooledTools, state: SessionState, tree: str | None, keep: Keep
    ) -> None:
        self._tools = tools
        self._state = state
        self._tree = tree
        self._keep = keep
        self._host: _Host | None = None
        self._id: str | None = None
        self._figure_room = MAX_FIGURE_BYTES
        self._closed = False

    @property
    def state(self) -> SessionState:
        return self._state

    async def call(self, call: ToolCall) -> ToolResult:
        """Run one call. Raises ToolsLost once the retries are used up, SandboxUnavailable where a
        host cannot isolate, ValueError when closed.
        """
        if self._closed:
            raise ValueError("the session is closed: open a new one, at its state if need be")
        checked = checked_call(call.name, call.arguments, {NAME: SCHEMA["function"]})
        if isinstance(checked, str):
            return ToolResult(ToolKind.MALFORMED, f"Malformed tool call: {checked}")
        code: str = call.arguments["code"]
        if self._tools.config.last_line is LastLine.printed:
            code = printing_last_line(code)
        result = await self._attempt(code)
        if self._keep is not Keep.NOTHING:
            self._state = self._state.after(code, result)
        return ToolResult(
            ToolKind(result.kind.value),
            observation(result),
            duration_s=result.duration_s,
            queue_s=result.queue_s,
            restored_by=result.restored_by,
            figures=self._carried(result.figures),
        )

    def _carried(self, figures: tuple[bytes, ...]) -> tuple[bytes, ...]:
        """The images for which there is room."""
        carried = list[bytes]()
        for image in figures:
            if len(image) <= self._figure_room:
                self._figure_room -= len(image)
                carried.append(image)
        return tuple(carried)

    async def reward(self) -> RewardValue:
        """None: an interpreter does not judge."""
        return None

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

    async def _attempt(self, code: str) -> CallResult:
        """Run `code`, each retry in a new session at the same state, elsewhere if possible."""
        tools, avoid, why, attempts = self._tools, None, "", 0
        tools.calls += 1
        final = False
        while attempts <= tools.config.retries and not final:
            attempts += 1
            try:
                if self._id is None:
                    await self._open(avoid)
                assert self._host is not None and self._id is not None
                result = await self._host.handle.call(self._id, code)
                if result.kind is not Kind.SANDBOX_FAILURE:
                    return result
                why, final = result.traceback, result.error_type == ReplayDiverged.__name__
            except tools.faults as fault:
                why = f"{type(fault).__name__}: {fault}"
                final = isinstance(fault, ReplayDiverged)  # as it would be on any host
            tools.failures += 1
            avoid = self._host
            await self._leave()
        tools.lost += 1
        raise ToolsLost(f"the sandbox failed {attempts} times: {why}")

    async def _open(self, avoid: _Host | None) -> None:
        self._host = self._tools.host_for(self._state, self._tree, avoid)
        self._host.sessions += 1
        at = self._state if self._state.entries else None
        setup = "" if at else self._state.setup
        opened = await self._host.handle.open(setup, at, self._tree, self._keep)
        self._id = opened.session
        self._tools.named[opened.host] = self._host
        self._state = replace(self._state, tree=opened.tree, host=opened.host)
