"""What an entry of `task.tools` is to the rest: a source of tools; what a trajectory holds of it.

Functions (`tools.functions`), environment classes (`tools.environments`) and the ready-made tools
implement it. A source without state gives every trajectory the same instance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from elpo_ray.types import Problem, Score, ToolResult

Schema = dict[str, Any]
"""A function schema in the OpenAI form: `{"type": "function", "function": {"name": …}}`."""


class ToolInstance(Protocol):
    """What one trajectory holds of a source; belongs to one event loop."""

    @property
    def opening(self) -> str | None:
        """Text that ends the prompt, which an environment's reset returns; None without one."""
        ...

    async def call(self, name: str, arguments: dict[str, Any]) -> ToolResult:
        """Run one call whose arguments fit the schema of `name`. What goes wrong in the tool is an
        observation; InfrastructureError if another try may cure it. After either that or
        `ToolKind.TIMEOUT` an instance with state is not used any more."""
        ...

    async def fork(self) -> ToolInstance | None:
        """An independent copy of the state as it is now, or None if there can be none: the calls
        are then run again on a fresh instance and their results compared. Several may be asked for
        at once."""
        ...

    async def reward(self) -> float | bool | Score | None:
        """What the environment's own `reward()` returns, asked where `ToolSource.rewards`. Whatever
        that raises passes through."""
        ...

    async def close(self) -> None:
        """Give up the instance. May be called again."""
        ...


class ToolSource(Protocol):
    """One entry of `task.tools`."""

    name: str
    """The entry as the configuration writes it, for messages."""
    schemas: Sequence[Schema]
    """The schemas of its tools, in the order in which the policy reads them."""
    stateful: bool
    """Whether calls change what later calls of the trajectory return. Without state one instance
    may serve all trajectories: it is never forked, and its calls are never run again."""
    rewards: bool
    """Whether its instances have a reward of their own."""

    def check(self, problem: Problem) -> None:
        """Raise ValueError if a trajectory of `problem` cannot be opened because the problem lacks
        something, such as a column that `reset` asks for. Cheap: the driver asks for every one."""
        ...

    async def open(self, problem: Problem) -> ToolInstance:
        """A fresh instance for a trajectory of `problem`. Raises InfrastructureError if there is
        none to be had now, ValueError if the problem lacks what the tool needs."""
        ...

    async def close(self) -> None:
        """End what the source started. Called once, at the worker's end."""
        ...
