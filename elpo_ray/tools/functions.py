"""Functions as tools: each is a source with one tool and no state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from elpo_ray.tools.caller import Caller
from elpo_ray.tools.schemas import schema_of
from elpo_ray.tools.sources import Schema
from elpo_ray.types import Problem, Score, ToolResult


class FunctionSource:
    """A function of the user's, plain or async."""

    stateful = False
    rewards = False

    def __init__(self, where: str, name: str, function: Callable[..., Any], caller: Caller) -> None:
        """ValueError, which begins with `where`, if the function has no schema."""
        self.name = name
        self.schemas: Sequence[Schema] = (schema_of(where, function),)
        self._instance = FunctionInstance(function, caller)

    def check(self, problem: Problem) -> None:
        """Any problem will do."""

    async def open(self, problem: Problem) -> FunctionInstance:
        return self._instance

    async def close(self) -> None: ...


class FunctionInstance:
    """The same for all trajectories."""

    opening: str | None = None

    def __init__(self, function: Callable[..., Any], caller: Caller) -> None:
        self._function = function
        self._caller = caller

    async def call(self, name: str, arguments: dict[str, Any]) -> ToolResult:
        return await self._caller.call(name, self._function, arguments)

    async def fork(self) -> FunctionInstance:
        return self

    async def reward(self) -> float | bool | Score | None:
        return None

    async def close(self) -> None: ...
