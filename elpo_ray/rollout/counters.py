"""What a rollout worker is busy with, counted where it happens."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

NUMBERS = ("episodes", "turns", "tokens", "completed", "busy_s", "idle_s")
"""Fields of `RolloutCounters` that are told."""


@dataclass(slots=True)
class RolloutCounters:
    """Counts of now and sums since the worker started. Belongs to one event loop.

    The engine idles while there are episodes and none of them is in a turn: they wait for tools,
    graders or Python.
    """

    episodes: int = 0
    """Trajectories under way."""
    turns: int = 0
    """Of them with the engine."""
    tokens: int = 0
    """Generated; a turn counts when it is complete."""
    completed: int = 0
    """Trajectories."""
    busy_s: float = 0.0
    """Seconds with an episode under way."""
    idle_s: float = 0.0
    """Of them without a turn."""
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

    def numbers(self) -> dict[str, float]:
        """All counts and sums, by name, as of now."""
        self.settle()
        return {name: getattr(self, name) for name in NUMBERS}

    def __str__(self) -> str:
        return f"{self.turns} trajectories in the engine, {self.episodes - self.turns} with tools"
