"""What a rollout worker is busy with, counted where it happens."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True)
class RolloutCounters:
    """Counts of now and sums since the worker started. Belongs to one event loop.

    The engine idles while there are episodes and none of them is in a turn: they wait for tools,
    graders or Python.
    """

    episodes: int = 0
    """Trajectories under way."""
    turns: int = 0
    """Trajectories that wait for the engine."""
    tokens: int = 0
    """Generated tokens of completed trajectories."""
    completed: int = 0
    """Completed trajectories."""
    busy_s: float = 0.0
    """Seconds with an episode under way."""
    idle_s: float = 0.0
    """Seconds with an episode under way and none of them in a turn."""
    clock: Callable[[], float] = time.monotonic
    _since: float = field(default=0.0)

    def episode(self, change: int) -> None:
        """An episode begins (1) or ends (-1)."""
        if self.episodes == 0 or self.episodes + change == 0:
            self.settle()
        self.episodes += change

    def turn(self, change: int) -> None:
        """A turn begins (1) or ends (-1)."""
        if self.turns == 0 or self.turns + change == 0:
            self.settle()
        self.turns += change

    def settle(self) -> None:
        """Bring the seconds up to now."""
        now = self.clock()
        if self.episodes:
            self.busy_s += now - self._since
            if not self.turns:
                self.idle_s += now - self._since
        self._since = now

    def values(self) -> dict[str, float]:
        """All counts and sums by name, as of now."""
        self.settle()
        names = ("episodes", "turns", "tokens", "completed", "busy_s", "idle_s")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        return f"{self.turns} trajectories in the engine, {self.episodes - self.turns} with tools"
