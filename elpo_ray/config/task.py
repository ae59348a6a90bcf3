"""Settings of the task: its problems, its reward, and how long an episode may be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from enum import Enum, StrEnum
from typing import Annotated, Any

from elpo_ray.config.dotted import is_path
from elpo_ray.config.rules import (
    Names,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    at_least,
    between,
)

CODE_INTERPRETER = "code_interpreter"
"""The entry of `task.tools` for the Python session in the sandbox."""


class TaskName(StrEnum):
    """The built-in task families (`elpo_ray.tasks`)."""

    countdown = "countdown"
    """Reach a number with given ones, a step at a time; needs no data."""
    jsonl = "jsonl"
    """Problems of files of your own."""
    aime24 = "aime24"
    """The AIME problems of 2024."""
    aime25 = "aime25"
    """The AIME problems of 2025."""
    math500 = "math500"
    """500 problems of MATH."""
    math = "math"
    """MATH: competition mathematics."""
    gsm8k = "gsm8k"
    """GSM8K: grade-school word problems."""
    gpqa_diamond = "gpqa_diamond"
    """GPQA Diamond: choices in science."""
    livecodebench_v6 = "livecodebench_v6"
    """LiveCodeBench, release 6: programs."""
    open_agentrl = "open_agentrl"
    """The paper's mix of mathematics, science and code."""
    reasoning_gym = "reasoning_gym"
    """Generated problems of the package `reasoning_gym`."""


class RewardName(StrEnum):
    """The built-in choices of what decides success, and what success and failure are worth
    (`elpo_ray.tasks.rewards`)."""

    verify = "verify"
    """Equality up to mathematical form; +1 and -1."""
    strict_box = "strict_box"
    """The last box within the last 100 characters, character by character; +1 and -1."""
    demyagent_as_run = "demyagent_as_run"
    """`strict_box` with -1.1 for failure: the recipe as it really ran (Figure 4)."""
    demyagent_intended = "demyagent_intended"
    """`strict_box` with min(-0.6, -1 + 0.1 tool calls) for failure: the recipe as it was meant."""


class Branching(Enum):
    """How an environment's state gets to where trajectories branch."""

    auto = "auto"
    """The class's own `fork()` copies, or `copy.deepcopy`; where that fails, calls are replayed."""
    fork = "fork"
    """`fork()` copies; each environment must have it."""
    deepcopy = "deepcopy"
    """`copy.deepcopy` copies, also where there is a `fork()`."""
    replay = "replay"
    """The calls are run again, and their results compared."""


@dataclass(kw_only=True)
class CountdownConfig(Section, key="task.countdown"):
    """Difficulty of stepwise Countdown: combine all numbers, two at a time, into the target."""

    numbers: Annotated[int, between(2, 7, "use 2 to 7")] = 5
    """How many numbers a problem gives; an episode needs one tool step fewer."""
    low: PositiveInt = 1
    """Smallest number that a problem gives."""
    high: int = 9
    """Largest number that a problem gives."""
    operators: str = "+-*"
    """Operations that a step may use: some of `+`, `-` and `*`."""
    max_value: int = 99
    """Intermediate results and targets stay within [0, max_value]."""
    demonstrations: NonNegativeInt = 20000
    """Solved demonstrations for the cold start."""
    disjoint: bool = True
    """No problem is both demonstrated and trained on; false: either may be any problem that is not
    held out."""
    any_order: bool = False
    """Demonstrations join numbers in any order, so that the policy varies its steps; false: always
    the largest that can be joined."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.low > self.high:
            yield "low", f"use 1 to high={self.high}"
        if not self.operators or not set(self.operators) <= set("+-*"):
            yield "operators", "use some of '+', '-', '*'"
        if self.max_value < self.high:
            yield "max_value", f"use at least high={self.high}"


@dataclass(kw_only=True)
class RewardConfig(Section, key="task.reward"):
    """The terminal reward. In code tasks a program succeeds if it passes all tests; its reward is
    the fraction that it passes. An answer without a program gets the preset's failure."""

    name: Annotated[str, Names(RewardName)] | None = None
    """null: what an environment among task.tools gives; without one, `verify`. Your own function,
    as module:attribute, takes (problem, steps) and gives a float, a bool or a Score, plain or async
    (docs/tasks.md). `task.reward=NAME` is short for `task.reward.name=NAME`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of your own function."""
    success_above: float = 0.5
    """A float that your own function or environment gives is a success above this."""
    timeout_s: PositiveFloat = 60.0
    """Seconds by the clock that one call of your own function may take."""
    grader_cpu_s: PositiveFloat = 5.0
    """Seconds of processor time that the comparison of one answer may take in its own process; ten
    times that by the clock."""
    graders: PositiveInt = 2
    """Processes of each rollout worker that compare answers; they start when first needed."""
    exact_output: bool = False
    """Numbers in a program's output must be equal; otherwise two decimals are equal within 1e-6,
    relative or absolute."""
    overlong_buffer: NonNegativeInt = 0
    """Tokens before `overlong_limit` over which the reward falls by up to `overlong_factor`
    (DAPO); 0 turns it off."""
    overlong_limit: int = 20480
    """Tokens of a trajectory, tool responses included, the prompt not."""
    overlong_factor: NonNegativeFloat = 1.0
    """The most that a trajectory's length can take from its reward."""
    format_penalty: NonNegativeFloat = 0.0
    """How much an answer loses that is not in the form asked for: no box, no code block."""
    tool_error_penalty: NonNegativeFloat = 0.0
    """How much an answer loses whose last tool call failed (0.5 in ToRL)."""
    tool_bonus: NonNegativeFloat = 0.0
    """How much a success gains that used a tool (0.1 in ARPO)."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.overlong_buffer > self.overlong_limit:
            yield "overlong_buffer", f"use 0 to overlong_limit={self.overlong_limit}"
        if self.options and not (self.name and is_path(self.name)):
            yield "options", f"name={self.name} has none; its settings are keys of their own"


@dataclass(kw_only=True)
class TaskConfig(Section, key="task"):
    """What is trained, and how long an episode may be."""

    name: Annotated[str, Names(TaskName)] = "countdown"
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of a task of your own (docs/extending.md), or the settings of
    `task.dataset`."""
    dataset: str | None = None
    """The kind of problems of task `reasoning_gym`, such as chain_sum (docs/tasks.md)."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    train_file: str | None = None
    """JSON-lines or parquet file of training problems instead of the task's own, with the same
    fields (docs/tasks.md). Task `jsonl` has none of its own."""
    eval_file: str | None = None
    """File of held-out problems, in the same form."""
    demonstrations_file: str | None = None
    """File of the cold start's conversations, in the same form (task `open_agentrl`)."""
    tools: list[Any] = field(default_factory=lambda: [CODE_INTERPRETER])
    """What the policy may call: `code_interpreter`, functions and environment classes as
    `module:attribute` (docs/tools.md); none: it only answers."""
    tool_timeout_s: PositiveFloat = 30.0
    """Seconds that a call of a function or an environment may take; `sandbox.wall_s` bounds the
    code interpreter."""
    branching: Branching = Branching.auto
    tool_actors: dict[str, int] = field(default_factory=dict)
    """Entries of `tools` that run in so many Ray actors, which all rollout workers share, instead
    of in each worker."""
    env: list[str] = field(default_factory=list)
    """Names of the environment variables that tools and rewards see. Their values are taken from
    the driver's environment and written nowhere."""
    data_dir: str | None = None
    """Folder with files named after the data sets (`aime24.jsonl`, `gsm8k-train.parquet`, …);
    what is not there comes from the Hugging Face hub."""
    modules: list[str] = field(default_factory=list)
    """Folders whose modules can be named as `module:attribute`, by all processes of the run; a
    run's file adds its own folder."""
    eval_sets: list[Annotated[str, Names(TaskName, dotted=False)]] = field(default_factory=list)
    """Tasks whose held-out problems evaluate this one; empty: its own."""
    contest_from: str | None = None
    """First day (YYYY-MM-DD) of the contests taken from LiveCodeBench; null: no bound."""
    contest_until: str | None = None
    """Last day (YYYY-MM-DD) of these contests; null: no bound."""
    max_turns: PositiveInt = 16
    """Assistant turns an episode may take, the answer included."""
    max_turn_tokens: PositiveInt | None = None
    """Tokens of one assistant turn; null: as many as the context still holds."""
    max_observation_chars: Annotated[int, at_least(32)] = 256
    """A longer tool response is cut in the middle, as in the original recipe."""
    eval_problems: PositiveInt = 200
    """Number of held-out problems in an evaluation."""
    eval_samples: PositiveInt = 1
    """Trajectories sampled for each held-out problem: pass@1 is their mean success."""
    expected_episode_tokens: PositiveInt = 8192
    """A typical episode's length, prompt included; only for what `check_only` prints."""
    countdown: CountdownConfig = field(default_factory=CountdownConfig)

    @property
    def tool_calls_needed(self) -> int:
        """Tool calls without which no episode of the task succeeds; 0 where that is not known."""
        return self.countdown.numbers - 1 if self.name == TaskName.countdown else 0

    @property
    def interpreter(self) -> bool:
        """Whether the policy may run code."""
        return CODE_INTERPRETER in self.tools

    def conflicts(self) -> Iterator[tuple[str, str]]:
        yield from self._tool_conflicts()
        gym = self.name == TaskName.reasoning_gym
        if self.options and not (is_path(self.name) or gym):
            yield "options", f"name={self.name} has none; its settings are keys of their own"
        if self.dataset is not None and not gym:
            yield "dataset", f"name={self.name} has none; use task=reasoning_gym with it"
        if self.eval_sets and self.eval_file:
            yield "eval_sets", f"leave it empty or leave out task.eval_file={self.eval_file!r}"
        for key in ("contest_from", "contest_until"):
            day = getattr(self, key)
            if day is not None and not _is_day(day):
                yield key, "write a day as 2025-02-01"
        if self.name == TaskName.countdown:
            yield from self._countdown_conflicts()

    def _tool_conflicts(self) -> Iterator[tuple[str, str]]:
        for entry in self.tools:
            if not isinstance(entry, str) and not (isinstance(entry, dict) and len(entry) >= 1):
                yield (
                    "tools",
                    f"{CODE_INTERPRETER}, module:attribute, or a mapping such as {{…: …}}",
                )
        for entry, count in self.tool_actors.items():
            if entry == CODE_INTERPRETER:
                yield "tool_actors", f"{entry} has its own; set cluster.sandbox_actors instead"
            if entry not in self.tools:
                yield "tool_actors", f"{entry} is not in task.tools; add it there, written the same"
            if count < 1:
                yield "tool_actors", f"{entry} needs 1 actor or more"
        if not all(name.isidentifier() for name in self.env):
            yield "env", "give names of environment variables, without values"

    def _countdown_conflicts(self) -> Iterator[tuple[str, str]]:
        """What task countdown, which makes its own problems and rewards, would not look at."""
        if not self.interpreter:
            yield "tools", f"task countdown is played with {CODE_INTERPRETER}; add it"
        for key in ("train_file", "eval_file", "demonstrations_file"):
            if getattr(self, key) is not None:
                yield key, "task countdown makes its own problems; leave it out or use task=jsonl"


def _is_day(text: str) -> bool:
    try:
        return len(text) == len("2025-02-01") and bool(date.fromisoformat(text))
    except ValueError:
        return False
