"""One evaluated trajectory as a record: what was said, what it cost, how it was judged.

Invariant: a record is self-contained JSON; every number of an evaluation follows from its records.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, fields
from typing import Any

from elpo_ray.growth.budget import Cost
from elpo_ray.rollout.episode import Episode
from elpo_ray.types import EndReason, Problem, Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The `index`-th independent trajectory of a problem."""

    problem: str
    index: int
    success: bool
    reward: float
    graded: bool
    """False: the grader came to no verdict; the sample counts in no average."""
    answer: str | None
    """Its vote in Major@K (`Task.answer`)."""
    end: str
    """`EndReason`."""
    turns: int
    """Assistant turns, the answer included."""
    tool_calls: int
    """Turns that called a tool, malformed calls included."""
    tokens: int
    """Sampled tokens."""
    observation_tokens: int
    """Tokens of tool responses and the template around them."""
    tool_seconds: float
    tool_kinds: dict[str, int]
    """How the calls ended, by `ToolKind`."""
    weight_version: int
    transcript: list[dict[str, Any]]
    """One object a step: `action` and, if a tool answered, `observation` and `kind`."""

    @classmethod
    def of(
        cls, problem: Problem, index: int, episode: Episode, score: Score, answer: str | None,
        cost: Cost,
    ) -> Sample:  # fmt: skip
        """The record of a finished episode that began at the prompt."""
        steps = episode.steps
        kinds = Counter(step.result.kind.value for step in steps if step.result is not None)
        return cls(
            problem=problem.id,
            index=index,
            success=score.success,
            reward=score.reward,
            graded=score.graded,
            answer=answer,
            end=episode.end.value,
            turns=len(steps),
            tool_calls=sum(kinds.values()),
            tokens=sum(len(step.turn.token_ids) for step in steps),
            observation_tokens=sum(len(step.observation_ids) for step in steps),
            tool_seconds=cost.tool_seconds,
            tool_kinds=dict(sorted(kinds.items())),
            weight_version=steps[-1].turn.weight_version,
            transcript=[
                {"action": step.action_text}
                if step.result is None
                else {
                    "action": step.action_text,
                    "observation": step.observation_text,
                    "kind": step.result.kind.value,
                }
                for step in steps
            ],
        )

    @property
    def answered(self) -> bool:
        """The trajectory ended with an answer turn, not at a limit."""
        return self.end == EndReason.ANSWER

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Sample:
        """KeyError if a field is missing; unknown fields are ignored."""
        return cls(**{field.name: record[field.name] for field in fields(cls)})
