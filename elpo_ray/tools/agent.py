"""All tools of an agent as one branching state: the code interpreter beside sources of the user's.

A state is, for each source with state, the log of its calls and the name under which a copy of it
is kept; where the copy is not here, the calls are run again on a fresh instance and their results
compared. Copies are made only where trajectories can branch, and live until their tree's `release`.
Invariant: an instance in which a call was lost is never used again; the session goes on from the
state before.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from elpo_ray.interfaces import Tools, ToolSession
from elpo_ray.tools import code_interpreter
from elpo_ray.tools.caller import Caller
from elpo_ray.tools.results import digest
from elpo_ray.tools.sources import Schema, ToolInstance, ToolSource
from elpo_ray.types import (
    InfrastructureError,
    Problem,
    RewardValue,
    ToolCall,
    ToolKind,
    ToolResult,
    ToolsLost,
)

PAUSE_S = 0.1
"""Before a call is tried again; twice as long each time."""
MIN_CALLS = 100
"""Calls before a share of lost ones means anything."""
ROOT = "root"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Entry:
    """One call of a source's past."""

    name: str
    arguments: dict[str, Any]
    digest: str
    """The result's digest."""


@dataclass(frozen=True, slots=True)
class SourceState:
    """Where one source stands: everything that was called, and the name of a copy."""

    copy: str = ROOT
    opening: str | None = None
    """What the reset said."""
    log: tuple[Entry, ...] = ()

    def after(self, call: ToolCall, result: ToolResult, copy: str) -> SourceState:
        entry = Entry(call.name, call.arguments, digest(result))
        return SourceState(copy, self.opening, (*self.log, entry))


@dataclass(frozen=True, slots=True)
class AgentState:
    """Where a session stands."""

    interpreter: Any
    """The interpreter's own state; None without one."""
    sources: tuple[SourceState, ...]
    """One for each source with state, in the order of the configuration."""


Key = tuple[int, str]
"""A source's place among those with state, and the name of a copy."""


@dataclass(slots=True)
class _Tree:
    """What is kept for the sessions of one tree."""

    problem: Problem
    begun: tuple[SourceState, ...]
    copies: dict[Key, ToolInstance] = field(default_factory=dict)
    copying: Counter[Key] = field(default_factory=Counter)
    """How many sessions copy a copy at this moment."""

    def take(self, key: Key) -> ToolInstance | None:
        """Give away a copy itself, unless somebody copies it."""
        return None if self.copying[key] else self.copies.pop(key, None)

    async def copied(self, key: Key) -> ToolInstance | None:
        """A copy of a copy, if there can be one."""
        self.copying[key] += 1
        try:
            return await self.copies[key].fork()
        except InfrastructureError:
            return None  # where it was kept is gone
        finally:
            self.copying[key] -= 1


class _Diverged(Exception):
    """Calls that were run again came to another result."""


class AgentTools:
    """`interfaces.Tools` over an interpreter and sources; either may be missing."""

    def __init__(
        self,
        schemas: Sequence[Schema],
        interpreter: Tools | None,
        sources: Sequence[ToolSource],
        caller: Caller,
        *,
        retries: int = 2,
        max_failure_rate: float = 0.01,
    ) -> None:
        """`retries`: further attempts at a call that ended in an InfrastructureError."""
        self.schemas = {schema["function"]["name"]: schema["function"] for schema in schemas}
        self.interpreter = interpreter
        self.stateful = [source for source in sources if source.stateful]
        self.caller = caller
        """Runs the user's code in this process, and counts what does not come back."""
        self.retries = retries
        self._max_failure_rate = max_failure_rate
        self.source_of = {
            schema["function"]["name"]: source for source in sources for schema in source.schemas
        }
        self._shared: dict[str, ToolInstance] = {}
        """The instance of each source without state."""
        self._trees: dict[str, _Tree] = {}
        self._names = itertools.count()
        self._process = uuid.uuid4().hex[:8]
        self.calls = 0
        """Calls of sources."""
        self.lost = 0
        """Those that were lost for good."""
        self._last_loss = ""

    async def begin(self, problem: Problem, tree: str, *, alone: bool = False) -> str | None:
        """See `interfaces.Tools.begin`: resets every source with state once, for the texts."""
        if self.interpreter is not None:
            await self.interpreter.begin(problem, tree, alone=alone)
        instances: list[ToolInstance] = []
        try:
            for source in self.stateful:
                instances.append(await self._opened(source, problem))
        except BaseException:
            await asyncio.gather(*(instance.close() for instance in instances))
            raise
        begun = tuple(SourceState(opening=instance.opening) for instance in instances)
        copies = {(index, ROOT): instance for index, instance in enumerate(instances)}
        self._trees[tree] = _Tree(problem, begun, copies)
        return "\n\n".join(state.opening for state in begun if state.opening) or None

    async def open(
        self,
        *,
        setup: str = "",
        at: AgentState | None = None,
        tree: str | None = None,
        branches: bool = True,
    ) -> AgentSession:
        """See `interfaces.Tools.open`; `begin` comes first."""
        kept = self._trees.get(tree or "")
        if kept is None:
            raise ValueError(f"tree={tree!r}: begin(problem, tree) comes before its sessions")
        session = None
        if self.interpreter is not None:
            session = await self.interpreter.open(
                setup=setup, at=at and at.interpreter, tree=tree, branches=branches
            )
        return AgentSession(self, session, at.sources if at else kept.begun, kept, branches)

    async def release(self, tree: str) -> None:
        """See `interfaces.Tools.release`."""
        if self.interpreter is not None:
            await self.interpreter.release(tree)
        kept = self._trees.pop(tree, None)
        if kept is not None:
            await asyncio.gather(*(instance.close() for instance in kept.copies.values()))

    def check(self) -> None:
        """Raise InfrastructureError if too many calls are lost to go on."""
        share = self.lost / max(self.calls, 1)
        if self.calls >= MIN_CALLS and share > self._max_failure_rate:
            raise InfrastructureError(
                f"{self.lost} of {self.calls} tool calls were lost for good, more than sandbox."
                f"max_failure_rate={self._max_failure_rate}; the last one: {self._last_loss}"
            )

    def new_name(self) -> str:
        """A name for a copy, which no other process gives."""
        return f"{self._process}-{next(self._names)}"

    def lose(self, why: str) -> ToolsLost:
        """Count a call that was lost for good."""
        self.lost += 1
        self._last_loss = why
        return ToolsLost(why)

    async def shared(self, source: ToolSource, problem: Problem) -> ToolInstance:
        """The one instance of a source without state."""
        if source.name not in self._shared:
            self._shared[source.name] = await source.open(problem)
        return self._shared[source.name]

    async def _opened(self, source: ToolSource, problem: Problem) -> ToolInstance:
        for attempt in itertools.count():
            try:
                return await source.open(problem)
            except InfrastructureError:
                if attempt >= self.retries:
                    raise
            await asyncio.sleep(PAUSE_S * 2**attempt)
        raise AssertionError


class AgentSession:
    """One trajectory's tools. Instances are made when they are first called."""

    def __init__(
        self,
        tools: AgentTools,
        interpreter: ToolSession | None,
        states: Sequence[SourceState],
        tree: _Tree,
        branches: bool,
    ) -> None:
        self._tools = tools
        self._interpreter = interpreter
        self._states = list(states)
        self._tree = tree
        self._branches = branches
        self._live: dict[int, ToolInstance] = {}

    @property
    def state(self) -> AgentState:
        interpreter = None if self._interpreter is None else self._interpreter.state
        return AgentState(interpreter, tuple(self._states))

    async def call(self, call: ToolCall) -> ToolResult:
        """See `interfaces.ToolSession.call`. The arguments were checked when the call was read."""
        tools = self._tools
        if call.name == code_interpreter.NAME and self._interpreter is not None:
            return await self._interpreter.call(call)
        source = tools.source_of.get(call.name)
        if source is None:
            known = ", ".join(tools.schemas) or "none: answer"
            text = f"Malformed tool call: unknown tool {call.name[:40]}; use {known}"
            return ToolResult(ToolKind.MALFORMED, text)
        tools.calls += 1
        index = tools.stateful.index(source) if source.stateful else None
        result, how = await self._attempted(
            call.name, source, index, lambda instance: instance.call(call.name, call.arguments)
        )
        if index is None:
            return result
        result = replace(result, restored_by=how)
        if result.kind is ToolKind.TIMEOUT:  # a thread may still be at work in it
            del self._live[index]
            undone = "; the state is the one before this call"
            return replace(result, text=result.text + undone)
        self._states[index] = self._states[index].after(call, result, tools.new_name())
        if self._branches:
            await self._keep(index)
        return result

    async def reward(self) -> RewardValue:
        """See `interfaces.ToolSession.reward`."""
        for index, source in enumerate(self._tools.stateful):
            if source.rewards:
                try:
                    given, _ = await self._attempted(
                        "reward", source, index, lambda it: it.reward()
                    )
                except Exception as error:  # lost for good, or raised by the user's code
                    return error
                return given
        return None

    async def close(self) -> None:
        """End the session. May be called again."""
        live, self._live = self._live, {}
        await asyncio.gather(*(instance.close() for instance in live.values()))
        if self._interpreter is not None:
            await self._interpreter.close()

    async def _attempted(
        self,
        name: str,
        source: ToolSource,
        index: int | None,
        use: Callable[[ToolInstance], Awaitable[T]],
    ) -> tuple[T, str]:
        """Use the source's instance, anew if the infrastructure lost that; returns what came of it,
        and how the state before came about. Raises ToolsLost."""
        tools, attempts = self._tools, 0
        while True:
            attempts += 1
            try:
                if index is None:
                    instance, how = await tools.shared(source, self._tree.problem), ""
                else:
                    instance, how = await self._instance(index)
                return await use(instance), how
            except _Diverged as error:
                raise tools.lose(str(error)) from None
            except InfrastructureError as error:
                if index in self._live:
                    await self._live.pop(index).close()
                if attempts > tools.retries:
                    why = f"tool {name} failed {attempts} times: {error}"
                    raise tools.lose(why) from error
            await asyncio.sleep(PAUSE_S * 2 ** (attempts - 1))

    async def _instance(self, index: int) -> tuple[ToolInstance, str]:
        """The source's instance in the session's state, and how it got there. Raises _Diverged,
        InfrastructureError."""
        if index in self._live:
            return self._live[index], "fresh"
        instance, how = await self._copied(index), "fork"
        if instance is None:
            instance, how = await self._replayed(index), "replay"
        self._live[index] = instance
        if not self._states[index].log:
            how = "fresh"
        elif how == "replay" and self._branches:
            await self._keep(index)
        return instance, how

    async def _copied(self, index: int) -> ToolInstance | None:
        """A copy of what is kept, if anything is. The instance that `begin` made goes to the first
        session that wants it where nothing is copied."""
        tree, key = self._tree, (index, self._states[index].copy)
        if key not in tree.copies:
            return None
        if key[1] == ROOT and not self._branches and (taken := tree.take(key)) is not None:
            return taken
        made = await tree.copied(key)
        return tree.take(key) if made is None and key[1] == ROOT else made

    async def _replayed(self, index: int) -> ToolInstance:
        """A fresh instance on which the calls of the state were run again."""
        source, state = self._tools.stateful[index], self._states[index]
        instance = await source.open(self._tree.problem)
        try:
            if instance.opening != state.opening:
                raise _diverged(source, "reset", instance.opening or "nothing")
            for entry in state.log:
                result = await instance.call(entry.name, entry.arguments)
                if result.kind is ToolKind.TIMEOUT:
                    raise InfrastructureError(f"{result.text} when it was run again")
                if digest(result) != entry.digest:
                    raise _diverged(source, entry.name, result.text)
        except BaseException:
            await instance.close()
            raise
        return instance

    async def _keep(self, index: int) -> None:
        """Keep a copy of the source's state, under the state's name."""
        try:
            made = await self._live[index].fork()
        except InfrastructureError:
            return  # to be replayed
        if made is not None:
            self._tree.copies[index, self._states[index].copy] = made


def _diverged(source: ToolSource, name: str, said: str) -> _Diverged:
    return _Diverged(
        f"{name} of {source.name} is not deterministic: run again after the same calls, it "
        f"returned another result ({said!r:.200}); let it depend on the data row and the calls "
        "alone, or give the class a fork()"
    )
