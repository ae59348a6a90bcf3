"""Text environments of gymnasium: `{gymnasium: FrozenLake-v1}` in `task.tools`.

The policy has one tool, `act(action)`, which answers with the environment's `ansi` rendering, or
with its observation where it has none. A trajectory's reward is the sum of its steps'. The random
numbers to come belong to the state, so that branches of a trajectory meet the same ones.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from elpo_ray.config.task import TaskConfig
from elpo_ray.tools.caller import Caller
from elpo_ray.tools.environments import EnvironmentSource
from elpo_ray.tools.ready_made import needs, read_entry

DEFAULTS: dict[str, Any] = {"gymnasium": str, "options": {}, "actions": []}
"""The environment's id, keyword arguments of `gymnasium.make`, and names of its actions."""
ACTIONS = {
    "FrozenLake": ["left", "down", "right", "up"],
    "CliffWalking": ["up", "right", "down", "left"],
    "Taxi": ["south", "north", "east", "west", "pickup", "dropoff"],
}
"""By the id without its version: what the numbers of actions mean."""
COLOURED = re.compile(r"\x1b\[([\d;]+)m(.*?)\x1b\[0m", re.DOTALL)
MARKS = {"41": "[]", "43": "[]", "42": "{}", "34": "()", "35": "<>"}
"""What stands around a text in place of its colour: where the agent is, where it is with its
passenger, where a passenger waits, where it wants to go."""


class TextEnvironment:
    """An environment as a tool. A subclass says which one."""

    id: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}
    actions: ClassVar[Sequence[str]]

    def reset(self, **row: Any) -> str:
        """Begin; the column `seed` draws the layout and the chances, without it the whole row."""
        drawn = row.get("seed", zlib.crc32(repr(sorted(row.items())).encode()))
        self._environment = make(self.id, self.options)
        self._total, self._over = 0.0, False
        observation, _ = self._environment.reset(seed=int(drawn))
        return f"{self._seen(observation)}\n\nActions: {', '.join(self.actions)}."

    def act(self, action: str) -> str:
        """Take one step.

        Args:
            action: What to do.
        """
        if self._over:
            return "It is over; no action has an effect any more."
        if action not in self.actions:
            raise ValueError(f"no action {action!r}; use one of {', '.join(self.actions)}")
        number = int(self._environment.action_space.start) + list(self.actions).index(action)
        observation, reward, ended, cut, _ = self._environment.step(number)
        self._total, self._over = self._total + float(reward), bool(ended or cut)
        seen = f"{self._seen(observation)}\n\nReward: {float(reward):g}."
        return f"{seen} It is over." if self._over else seen

    def reward(self) -> float:
        """The sum of the steps' rewards."""
        return self._total

    def close(self) -> None:
        self._environment.close()

    def _seen(self, observation: Any) -> str:
        text = self._environment.render() if self._environment.render_mode else str(observation)
        return COLOURED.sub(_marked, text).strip("\n")


class GymnasiumSource(EnvironmentSource):
    """One environment of gymnasium."""

    rewards = True

    def __init__(
        self, where: str, entry: Mapping[str, Any], task: TaskConfig, caller: Caller
    ) -> None:
        """ValueError, which begins with `where`, if there is no such environment, or one whose
        actions are no list."""
        needs(where, "gymnasium")
        values = read_entry(where, entry, DEFAULTS)
        name, options = values["gymnasium"], values["options"]
        try:
            made = make(name, options)
        except Exception as fault:  # environments are other people's code
            raise ValueError(f"{where}: {type(fault).__name__}: {fault}") from fault
        count = getattr(made.action_space, "n", None)
        made.close()
        if count is None:
            raise ValueError(f"{where}: its actions are no list but {made.action_space}")
        known = ACTIONS.get(name.rpartition("/")[2].rpartition("-")[0], [])
        actions = values["actions"] or known or [str(number) for number in range(count)]
        if len(actions) != count or len(set(actions)) != count:
            raise ValueError(f"{where}: actions must be {count} different names")
        kind = type(name, (TextEnvironment,), {"id": name, "options": options})
        kind.actions = [str(action) for action in actions]  # type: ignore[attr-defined]
        super().__init__(where, f"gymnasium {name}", kind, task.branching, caller)
        function = self.schemas[0]["function"]
        function["parameters"]["properties"]["action"]["enum"] = list(actions)


def make(name: str, options: Mapping[str, Any]) -> Any:
    """An environment that renders as text, if it can."""
    import gymnasium

    plain = gymnasium.make(name, disable_env_checker=True, **options)
    if "ansi" not in plain.metadata.get("render_modes", []):
        return plain
    plain.close()
    return gymnasium.make(name, render_mode="ansi", disable_env_checker=True, **options)


def _marked(found: re.Match[str]) -> str:
    """A coloured text with marks around it."""
    codes, text = found[1].split(";"), found[2]
    marks = next((MARKS[code] for code in codes if code in MARKS), "[]")
    return f"{marks[0]}{text}{marks[1]}"
