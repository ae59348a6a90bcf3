"""The shared types: what a turn, a step, a problem and a tool result are.

Plain data, standard library only. Token ids are the truth: ids are stored once, as sampled, and
never re-tokenised; the texts beside them are for people.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import StrEnum
from operator import attrgetter
from typing import Any, TypeVar

T = TypeVar("T")


def pickled_by_position(cls: type[T]) -> type[T]:
    """Class decorator over a dataclass of two fields or more: pickled as its values in order, which
    takes a third of the time that Python's own way takes for classes with slots. Every completed
    trajectory crosses from worker to driver as some twenty such objects."""
    values = attrgetter(*(f.name for f in fields(cls)))  # type: ignore[arg-type]

    def __reduce__(self: T) -> tuple[type[T], tuple[Any, ...]]:
        return cls, values(self)

    cls.__reduce__ = __reduce__  # type: ignore[method-assign, assignment]
    return cls


Message = dict[str, Any]
"""One chat message in the OpenAI form: `role`, `content`, optionally `tool_calls`."""


class FinishReason(StrEnum):
    """Why the engine stopped a turn."""

    STOP = "stop"
    """The end-of-turn token was sampled (it is the turn's last token)."""
    LENGTH = "length"
    """The turn ran into its token limit or the context window."""


class EndReason(StrEnum):
    """Why an episode ended. All but ANSWER and SANDBOX are ordinary model failures, no faults."""

    ANSWER = "answer"
    """A turn without a tool call: the answer."""
    MAX_TURNS = "max_turns"
    """The last allowed turn still called a tool."""
    TURN_LENGTH = "turn_length"
    """A turn hit its token limit before its end-of-turn token."""
    CONTEXT = "context"
    """No room for another turn in the context window."""
    SANDBOX = "sandbox"
    """The sandbox, not the code, failed on the last turn's call, also when asked again elsewhere:
    the trajectory is masked (`UNGRADED`)."""


class ToolKind(StrEnum):
    """How one tool call ended (the sandbox's words, `sandbox.results.Kind`, plus MALFORMED)."""

    OK = "ok"
    ERROR = "error"
    TIMEOUT = "timeout"
    MEMORY = "memory"
    OUTPUT = "output"
    KILLED = "killed"
    EXITED = "exited"
    MALFORMED = "malformed"
    """The call could not be parsed, or names an unknown tool: an observation that says so."""


Values = dict[str, float]
"""Numbers by name, as in a line of `metrics.jsonl`."""


class Fault(Exception):
    """Something outside the program failed; the message says what is kept and how to go on."""


class CheckpointError(Fault):
    """A checkpoint could not be written; the previous one is still there."""


class InfrastructureError(Exception):
    """An engine or a sandbox failed, not the model. Retried, counted, never scored."""


class ToolsLost(InfrastructureError):
    """A tool call failed for good, after the retries that its sandbox is given. The trajectory that
    made it is masked; repeating it would meet the same fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to sample one turn. `seed=None` draws from the engine's own generator."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int
    seed: int | None = None
    warm: bool = False
    """The engine has decoded the prefix before: such turns go first where not all can run."""


@pickled_by_position
@dataclass(frozen=True, slots=True)
class Turn:
    """What the policy sampled in one call; the lists run parallel to `token_ids`."""

    token_ids: tuple[int, ...]
    """Sampled ids, the end-of-turn token included when `finish` is STOP."""
    logprobs: tuple[float, ...]
    """Log-probability, in nats, of each sampled token under the sampling distribution."""
    entropies: tuple[float, ...]
    """Full-vocabulary entropy, in nats, of the distribution each token was drawn from."""
    finish: FinishReason
    weight_version: int
    """The version of the weights that produced the turn."""
    cached_tokens: int = 0
    """Tokens of the prefix that the engine took from its cache."""


@pickled_by_position
@dataclass(frozen=True, slots=True)
class ToolCall:
    """A parsed call: the function's name and its JSON arguments."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Parsed:
    """One assistant turn as the chat format reads it. Neither call nor error: an answer turn."""

    text: str
    """The turn as text, special tokens of the template left out."""
    call: ToolCall | None = None
    error: str | None = None
    """What is wrong with a malformed call, in words meant for the policy."""


@pickled_by_position
@dataclass(frozen=True, slots=True)
class ToolResult:
    """What came back from a tool, as the policy will see it."""

    kind: ToolKind
    text: str
    """The observation's text, before the rollout's own truncation."""
    duration_s: float = 0.0
    """Seconds of execution; queueing is apart, in `queue_s`."""
    queue_s: float = 0.0
    restored_by: str = ""
    """How the state before the call came about: "fresh", "fork" or "replay"; empty if unknown."""
    figures: tuple[bytes, ...] = ()
    """PNG images that the call showed. The policy reads of them in `text`; it does not see them."""


@pickled_by_position
@dataclass(frozen=True, slots=True)
class Step:
    """One assistant turn (the action) and, if it called a tool, the response (the observation).

    A node of the rollout tree. Only `turn.token_ids` are ever trained on.
    """

    turn: Turn
    observation_ids: tuple[int, ...] = ()
    """Template glue, tool response and the next generation prompt; empty on the answer turn."""
    action_text: str = ""
    observation_text: str = ""
    call: ToolCall | None = None
    """The parsed call; None on an answer turn and on a malformed call."""
    result: ToolResult | None = None
    """None exactly on a step that has no observation (an answer, a cut-off turn)."""
    state: Any = None
    """The tool session's state after this step; opaque, not serialised."""

    @property
    def num_tokens(self) -> int:
        return len(self.turn.token_ids) + len(self.observation_ids)


@dataclass(frozen=True, slots=True)
class Problem:
    """One input: what is asked, and what its answer is checked against."""

    id: str
    messages: tuple[Message, ...]
    ground_truth: Any
    setup: str = ""
    """Code that a fresh tool session runs before the agent's first call."""
    extra: dict[str, Any] = field(default_factory=dict)


@pickled_by_position
@dataclass(frozen=True, slots=True)
class Score:
    """How good an episode was: the advantage uses `reward`, the search `success`."""

    reward: float
    success: bool
    graded: bool = True
    """False: the grader came to no verdict, which says nothing about the answer. Neither a success
    nor a failure: no search, no advantage and no average may count it."""
    error: str = ""
    """Why the user's own reward gave no verdict, where it failed; else empty."""


RewardValue = float | bool | Score | Exception | None
"""What an environment says of its trajectory: a reward, the exception that it raised instead, or
nothing, if it does not judge."""
UNGRADED = Score(reward=0.0, success=False, graded=False)
"""The grader, or the sandbox, timed out or crashed on this answer, also when asked again."""
