"""Problems of the user's own, from files: task `jsonl`.

A row has a `prompt`, as text or chat messages, an `answer` where the reward needs one, and any
further columns, which tools and rewards find in `Problem.extra["row"]`. Rows with the fields of the
known mathematics sets (`problem` or `question`), or with those of the paper's RL data
(`reward_model`), are read too. The prompt goes to the model as it stands.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from elpo_ray.config.task import TaskName
from elpo_ray.tasks.mathematics import answer_of
from elpo_ray.tasks.open_agentrl import messages_of, read_plain
from elpo_ray.tasks.problem_set import Family
from elpo_ray.tasks.rewards import KIND, MATH
from elpo_ray.tasks.sources import Row, text_of
from elpo_ray.tools.environments import ROW
from elpo_ray.types import Message, Problem

QUESTION = ("prompt", "problem", "Problem", "question")
"""Columns that hold what is asked; the first one that is there."""
PAPER = {"data_source", "prompt", "ability", "reward_model", "extra_info"}
"""Columns of the paper's RL data."""


def read(row: Row, id: str, seed: int, code: bool) -> Problem:
    """A row in any of the forms. ValueError if what is asked is missing or unusable."""
    if "reward_model" in row:
        problem = read_plain(row, id)
        if row.keys() <= PAPER:
            return problem
        return replace(problem, extra=problem.extra | {ROW: row})
    own = "prompt" in row
    return Problem(
        id=id,
        messages=_asked(row),
        ground_truth=_plain(row.get("answer")) if own else _known_answer(row),
        extra={KIND: MATH, ROW: row},
    )


def _asked(row: Row) -> tuple[Message, ...]:
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        return messages_of(prompt)
    return ({"role": "user", "content": text_of(row, *QUESTION)},)


def _known_answer(row: Row) -> str | None:
    """The answer as the mathematics sets write it; None without any."""
    columns = ("answer", "Answer", "solution")
    return answer_of(row) if any(row.get(name) is not None for name in columns) else None


def _plain(answer: Any) -> Any:
    """The answer; a number as the text that a model would write."""
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return str(answer)
    return answer.strip() or None if isinstance(answer, str) else answer


FAMILIES: dict[str, Family] = {TaskName.jsonl: Family(read=read)}
