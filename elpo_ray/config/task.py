"""What is trained, and how an episode is bounded."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from elpo_ray.config.rules import require


class TaskName(Enum):
    """The task families (`elpo_ray.tasks`)."""

    countdown = "countdown"
    jsonl = "jsonl"


@dataclass(kw_only=True)
class CountdownConfig:
    """Difficulty of stepwise Countdown: combine all numbers, two at a time, into the target."""

    numbers: int = 5
    """How many numbers a problem gives; an episode needs one tool step fewer."""
    low: int = 1
    """Smallest operand."""
    high: int = 9
    """Largest operand."""
    operators: str = "+-*"
    max_value: int = 99
    """Intermediate results and targets stay within [0, max_value]."""
    demonstrations: int = 20000
    """Solved demonstrations for the cold start."""

    def __post_init__(self) -> None:
        require(2 <= self.numbers <= 7, "task.countdown.numbers", self.numbers, "use 2 to 7")
        require(
            1 <= self.low <= self.high,
            "task.countdown.low",
            self.low,
            f"use 1 to high={self.high}",
        )
        require(
            bool(self.operators) and set(self.operators) <= set("+-*"),
            "task.countdown.operators",
            self.operators,
            "use some of '+', '-', '*'",
        )
        require(
            self.max_value >= self.high,
            "task.countdown.max_value",
            self.max_value,
            f"use at least high={self.high}",
        )
        require(
            self.demonstrations >= 0,
            "task.countdown.demonstrations",
            self.demonstrations,
            "use >= 0",
        )


@dataclass(kw_only=True)
class TaskConfig:
    """What is trained and how an episode is bounded."""

    name: TaskName = TaskName.countdown
    train_file: str | None = None
    """JSON-lines file of problems (task `jsonl`); one object a line, see docs/tasks.md. A run
    needs it; `check_only` does not."""
    eval_file: str | None = None
    max_turns: int = 16
    """Assistant turns an episode may take, the answer included."""
    max_turn_tokens: int = 4096
    max_observation_chars: int = 256
    """A longer tool response is cut in the middle, as in the original recipe."""
    eval_problems: int = 200
    """Held-out problems of an evaluation."""
    eval_samples: int = 1
    """Trajectories sampled of each of them: pass@1 is their mean success."""
    expected_episode_tokens: int = 8192
    """A typical episode's length, prompt included; only for the batch algebra of `check_only`."""
    countdown: CountdownConfig = field(default_factory=CountdownConfig)

    def __post_init__(self) -> None:
        for key in (
            "max_turns",
            "max_turn_tokens",
            "eval_problems",
            "eval_samples",
            "expected_episode_tokens",
        ):
            require(getattr(self, key) >= 1, f"task.{key}", getattr(self, key), "use 1 or more")
        require(
            self.max_observation_chars >= 32,
            "task.max_observation_chars",
            self.max_observation_chars,
            "use 32 or more",
        )
