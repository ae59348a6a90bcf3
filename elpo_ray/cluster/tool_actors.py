"""Heavy tools in Ray actors that all rollout workers share (`task.tool_actors`): both ends.

A class without `reset` has one object in each actor, and any of them serves any call, one at a
time. A class with `reset` has an object for each trajectory, in the actor where it was opened. Ray
makes an actor anew that dies; objects of trajectories that it held are made again by replay.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle

from elpo_ray.cluster.garbage import freeze_gc
from elpo_ray.cluster.user_code import UserCode, on_worker
from elpo_ray.config import Config
from elpo_ray.tools.caller import Caller
from elpo_ray.tools.catalog import source_of
from elpo_ray.tools.sources import Schema, ToolInstance, ToolSource
from elpo_ray.tools.variables import keep_only
from elpo_ray.types import InfrastructureError, Problem, Score, ToolResult

AT_ONCE = 16
"""Calls of different trajectories' objects that an actor runs at once."""
QUEUED = 64
"""Requests of one worker to one actor at once: further ones wait in the worker."""
RESTART_S = 60.0
"""Seconds that a call waits for an actor that Ray restarts before it counts as lost."""
T = TypeVar("T")


class ToolActor:
    """One process of a heavy tool."""

    def __init__(self, config: Config, place: int, user: UserCode) -> None:
        """`place`: of its entry in `task.tools`."""
        self._config = config
        self._place = place
        self._user = user
        self._source: ToolSource | None = None
        self._shared: ToolInstance | None = None
        self._instances: dict[int, ToolInstance] = {}
        self._numbers = itertools.count(1)
        self._loading = asyncio.Lock()
        self._room = asyncio.Semaphore(AT_ONCE)

    async def start(self) -> None:
        """Load the tool, and its object where one serves all. ValueError if that fails."""
        async with self._loading:
            if self._source is not None:
                return
            task = self._config.task
            entry, key = task.tools[self._place], f"task.tools[{self._place}]"
            keep_only(self._user.variables)
            with on_worker("a tool actor"):
                self._user.install(task.modules)
                caller = Caller(task.tool_timeout_s)
                source = source_of(f"{key}={entry!r}", key, entry, task, caller)
                if not separate(source):
                    nobody = Problem("none", (), None)
                    caller.timeout_s = self._config.cluster.start_timeout_s
                    self._shared = await source.open(nobody)
                    caller.timeout_s = task.tool_timeout_s
                    self._room = asyncio.Semaphore(1)
            self._source = source
            freeze_gc()

    async def open(self, problem: Problem) -> tuple[int, str | None]:
        """A new object's number, and what its reset says. ValueError, InfrastructureError."""
        await self.start()
        assert self._source is not None
        number = next(self._numbers)
        async with self._room:
            self._instances[number] = await self._source.open(problem)
        return number, self._instances[number].opening

    async def call(self, number: int, name: str, arguments: dict[str, Any]) -> ToolResult:
        """Run a call; 0 is the object that serves all. InfrastructureError for an object of an
        earlier life of this actor."""
        await self.start()
        async with self._room:
            return await self._instance(number).call(name, arguments)

    async def fork(self, number: int) -> int | None:
        """The number of a copy; None if there can be none."""
        async with self._room:
            made = await self._instance(number).fork()
        if made is None:
            return None
        copy = next(self._numbers)
        self._instances[copy] = made
        return copy

    async def reward(self, number: int) -> float | bool | Score | None:
        async with self._room:
            return await self._instance(number).reward()

    async def close(self, number: int) -> None:
        """Unknown objects have ended already."""
        instance = self._instances.pop(number, None)
        if instance is not None:
            await instance.close()

    def _instance(self, number: int) -> ToolInstance:
        if number == 0 and self._shared is not None:
            return self._shared
        if number not in self._instances:
            raise InfrastructureError("the tool actor was restarted: its objects are gone")
        return self._instances[number]


def separate(source: ToolSource) -> bool:
    """Whether each trajectory has an object of its own in an actor."""
    return source.stateful and hasattr(getattr(source, "kind", None), "reset")


class _Remote:
    """A tool actor as a worker sees it: deadlines, back-pressure, patience with a restart."""

    def __init__(self, actor: ActorHandle[Any], timeout_s: float) -> None:
        self.actor = actor
        self.asked = 0
        self._timeout_s = timeout_s
        self._room = asyncio.Semaphore(QUEUED)

    async def ask(self, request: Callable[[ActorHandle[Any]], Awaitable[T]]) -> T:
        """An answer. Raises what the tool raised, InfrastructureError if the actor failed."""
        self.asked += 1
        patient_until = time.monotonic() + RESTART_S
        try:
            async with self._room:
                while True:
                    try:
                        return await asyncio.wait_for(request(self.actor), self._timeout_s)
                    except ray.exceptions.ActorUnavailableError:
                        if time.monotonic() > patient_until:
                            raise
                        await asyncio.sleep(0.2)
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if error.cause is not None else error) from None
        except (ray.exceptions.RayError, TimeoutError) as error:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise InfrastructureError(f"its actor failed: {reason}") from error
        finally:
            self.asked -= 1


class RemoteSource:
    """A source whose objects live in actors."""

    def __init__(
        self, local: ToolSource, actors: Sequence[ActorHandle[Any]], timeout_s: float
    ) -> None:
        """`local`: the same source in this process, for schemas and checks."""
        self.name = local.name
        self.schemas: Sequence[Schema] = local.schemas
        self.stateful = separate(local)
        self.rewards = self.stateful and local.rewards
        self._local = local
        self._actors = [_Remote(actor, timeout_s) for actor in actors]

    def check(self, problem: Problem) -> None:
        self._local.check(problem)

    async def open(self, problem: Problem) -> _RemoteInstance:
        if not self.stateful:
            return _RemoteInstance(self, None, 0, None)
        actor = self.least_asked()
        opened: tuple[int, str | None]
        opened = await actor.ask(lambda handle: handle.open.remote(problem))
        return _RemoteInstance(self, actor, *opened)

    def least_asked(self) -> _Remote:
        """The actor with the fewest requests of this worker."""
        return min(self._actors, key=lambda actor: actor.asked)

    async def close(self) -> None: ...


class _RemoteInstance:
    """An object in an actor, or all actors where any object serves."""

    def __init__(
        self, source: RemoteSource, home: _Remote | None, number: int, opening: str | None
    ) -> None:
        self._source = source
        self._home = home
        self._number = number
        self._opening = opening

    @property
    def opening(self) -> str | None:
        return self._opening

    async def call(self, name: str, arguments: dict[str, Any]) -> ToolResult:
        actor = self._home or self._source.least_asked()
        began = time.perf_counter()
        answer: ToolResult = await actor.ask(
            lambda handle: handle.call.remote(self._number, name, arguments)
        )
        waited = time.perf_counter() - began - answer.duration_s
        return replace(answer, queue_s=max(0.0, waited))

    async def fork(self) -> _RemoteInstance | None:
        if self._home is None:
            return self
        made: int | None
        made = await self._home.ask(lambda handle: handle.fork.remote(self._number))
        if made is None:
            return None
        return _RemoteInstance(self._source, self._home, made, self._opening)

    async def reward(self) -> float | bool | Score | None:
        if self._home is None:
            return None
        return await self._home.ask(lambda handle: handle.reward.remote(self._number))

    async def close(self) -> None:
        if self._home is not None:
            self._home.actor.close.remote(self._number)
