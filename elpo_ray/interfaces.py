"""The protocols whose implementations may be exchanged. Tests replace these and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any, Protocol, runtime_checkable

from elpo_ray.tree import RolloutTree
from elpo_ray.types import (
    Message,
    Parsed,
    Problem,
    RewardValue,
    Sampling,
    Score,
    Step,
    ToolCall,
    ToolResult,
    Turn,
)

ToolState = Any
"""What `ToolSession.state` returned: opaque, picklable, valid until its tree is closed."""


class Policy(Protocol):
    """Samples turns: vLLM's engine, or a script in tests."""

    async def generate(self, prefix: Sequence[int], sampling: Sampling) -> Turn:
        """Continue `prefix` (token ids) to the end of one turn. Raises InfrastructureError."""
        ...


class Chat(Protocol):
    """The chat template as token ids: what is appended is rendered, what was sampled is kept."""

    def prompt_ids(self, messages: Sequence[Message], *, tools: bool = True) -> list[int]:
        """The conversation so far with the tool schemas and the generation prompt; without `tools`
        no schema is shown."""
        ...

    def parse(self, token_ids: Sequence[int]) -> Parsed:
        """Read one sampled turn. A malformed call is `Parsed.error`, never an exception."""
        ...

    def observation_ids(self, text: str, tool: str | None = None) -> Sequence[int]:
        """What follows a turn: template glue, the tool response, the next generation prompt.
        `tool` is the one that was called; None where the call could not be read."""
        ...


class ToolSession(Protocol):
    """A stateful tool environment that belongs to one trajectory."""

    @property
    def state(self) -> ToolState:
        """The state after the last call, from which another session can be opened."""
        ...

    async def call(self, call: ToolCall) -> ToolResult:
        """Run one call. Raises InfrastructureError if the sandbox, not the code, failed, ToolsLost
        if it did for good."""
        ...

    async def reward(self) -> RewardValue:
        """What an environment among the tools says of the trajectory, whose last call is done."""
        ...

    async def close(self) -> None:
        """End the session; nothing is called on it afterwards."""
        ...


class Tools(Protocol):
    """Opens tool sessions, fresh ones or at the state that a prefix left behind."""

    async def begin(self, problem: Problem, tree: str, *, alone: bool = False) -> str | None:
        """Make ready for sessions of `tree`, all of which are about `problem`; returns the text
        that ends the prompt, if an environment has one. `alone`: there will be one session, again
        if it is lost; then nothing is kept for others. Raises InfrastructureError, and ValueError
        if the user's environment fails."""
        ...

    async def open(
        self,
        *,
        setup: str = "",
        at: ToolState | None = None,
        tree: str | None = None,
        branches: bool = True,
    ) -> ToolSession:
        """A session that ran `setup`, or continues from `at`. Raises InfrastructureError.

        What sessions of one `tree` leave behind is kept until its `release`, so that others of
        the tree continue from there at once; without a tree, only while the session is open.
        Without `branches` calls are cheaper, but to continue from the session costs a replay.
        """
        ...

    async def release(self, tree: str) -> None:
        """Declare that no session will continue from a state of `tree` any longer."""
        ...


class Task(Protocol):
    """A task family: its problems and its reward; an oracle where one exists."""

    def train_problem(self, index: int) -> Problem:
        """The `index`-th problem of the training stream; deterministic in the task's seed."""
        ...

    def eval_problems(self, count: int) -> list[Problem]:
        """Held-out problems: the same list every time, disjoint from the training stream. If they
        belong to several sets, `Problem.extra["benchmark"]` names each one's."""
        ...

    async def score(
        self,
        problem: Problem,
        steps: Sequence[Step],
        tools: Tools,
        environment: RewardValue = None,
    ) -> Score:
        """Reward and success of a finished trajectory; not `graded` if no verdict could be had.

        `environment` is what an environment among the agent's tools says of the trajectory, where
        there is one: it counts if the user has set no reward. `tools` runs a submitted program on
        its tests, in sessions of its own. What tools return is untrusted. Raises
        InfrastructureError, and ValueError if the user's reward function fails.
        """
        ...

    def answer(self, problem: Problem, steps: Sequence[Step]) -> str | None:
        """What a finished trajectory answers: the vote that Major@K counts; None if it gives none,
        or if the task has no answers to vote on."""
        ...

    def recoverable(self, problem: Problem, steps: Sequence[Step]) -> bool | None:
        """Whether any continuation of `steps` can still succeed; None without an oracle."""
        ...

    def demonstration(self, index: int) -> list[Message] | None:
        """The `index`-th solved conversation for the cold start; None if the task has none."""
        ...


@runtime_checkable
class ComparesAnswers(Protocol):
    """What a `Task` may have too: equal answers that are written in different ways."""

    async def same_answer(self, problem: Problem, first: str, second: str) -> bool:
        """Whether two answers to a problem are one vote: by the equality that grades them."""
        ...


class Rollout(Protocol):
    """What a growth rule may do with one input: complete trajectories onto its tree."""

    tree: RolloutTree
    """The tree that grows."""
    random: Random
    """The rule's own draws; seeded by the run, the problem and the step."""

    @property
    def remaining(self) -> int:
        """Completions left of the budget; those being sampled are no longer counted."""
        ...

    @property
    def enough(self) -> bool:
        """Whether the rule may end before the budget is spent because more would teach nothing;
        never where every input has a budget of its own (`scheduling.shared_budget`)."""
        ...

    @property
    def fixed(self) -> bool:
        """Whether the whole budget will be spent, and no more: never `enough`, never a grant."""
        ...

    async def complete(self, at: int = 0, *, anchor: int | None = None) -> int:
        """Sample one completion below node `at` (0 = from the prompt), score it, add its steps
        to the tree and return its leaf's id. Charges the ledger exactly one rollout."""
        ...

    async def ask(
        self, messages: Sequence[Message], *, temperature: float, top_p: float, max_tokens: int
    ) -> str:
        """Ask the policy something beside the trajectories, without tools, and return what it says;
        "" if the context has no room for it. It is never trained on and costs no rollout; its
        tokens stand in the ledger. Ask before the completions that depend on it."""
        ...
