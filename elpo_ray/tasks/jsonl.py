r"""Problems from JSON-lines files with the fields of the paper's RL data.

One object a line: `data_source`, `prompt` (chat messages), `reward_model.ground_truth`, and
optionally `extra_info`. The reward is strict: the last `\boxed{…}` of the answer turn must equal
the ground truth. Invariant: no prompt of the held-out file is ever trained on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elpo_ray.config import TaskConfig
from elpo_ray.interfaces import Tools
from elpo_ray.tasks import code_interpreter
from elpo_ray.tasks.rewards import last_boxed, outcome
from elpo_ray.types import FinishReason, Message, Problem, Score, Step


class Jsonl:
    """A task over two files, `task.train_file` and `task.eval_file`; see docs/tasks.md."""

    tools: Sequence[dict[str, Any]] = (code_interpreter.SCHEMA,)

    def __init__(self, config: TaskConfig, seed: int) -> None:
        self._seed = seed
        self._eval = _load("task.eval_file", config.eval_file, "eval")
        self._train = _load("task.train_file", config.train_file, "train")
        held_out = {json.dumps(problem.messages): problem.id for problem in self._eval}
        for problem in self._train:
            twin = held_out.get(json.dumps(problem.messages))
            if twin is not None:
                raise ValueError(
                    f"task.train_file={config.train_file!r}: {problem.id} asks the same as "
                    f"{twin} of task.eval_file; remove it from one of the files"
                )

    def train_problem(self, index: int) -> Problem:
        """The file in a new order every epoch, fixed by the seed."""
        epoch, place = divmod(index, len(self._train))
        order = list(range(len(self._train)))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)
        return self._train[order[place]]

    def eval_problems(self, count: int) -> list[Problem]:
        """The first `count` problems of the held-out file, or all of them."""
        return self._eval[:count]

    async def score(self, problem: Problem, steps: Sequence[Step], tools: Tools) -> Score:
        """Success iff the answer turn's last box equals the ground truth, spaces aside."""
        return outcome(self.answer(problem, steps) == problem.ground_truth.strip())

    def answer(self, problem: Problem, steps: Sequence[Step]) -> str | None:
        """The answer turn's last box."""
        if not steps or steps[-1].result is not None:
            return None
        if steps[-1].turn.finish is not FinishReason.STOP:
            return None
        return last_boxed(steps[-1].action_text)

    def recoverable(self, problem: Problem, steps: Sequence[Step]) -> bool | None:
        """No oracle."""
        return None

    def demonstration(self, index: int) -> list[Message] | None:
        """No demonstrations: the cold start of this task is a model of the user's."""
        return None


def _load(key: str, name: str | None, split: str) -> list[Problem]:
    """The problems of one file; ValueError naming key, file, line, fault and remedy."""
    if name is None:
        raise ValueError(f"{key}=None: name a JSON-lines file of problems (see docs/tasks.md)")
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"{key}={name!r}: no such file; give the path of a JSON-lines file")
    problems = []
    with path.open(encoding="utf-8", errors="strict") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    problems.append(_problem(line, f"{split}-{number}"))
        except UnicodeDecodeError as fault:
            raise ValueError(f"{key}={name!r}: not UTF-8 text ({fault}); re-encode it") from None
        except ValueError as fault:
            raise ValueError(f"{key}={name!r}: line {number}: {fault}") from None
    if not problems:
        raise ValueError(f"{key}={name!r}: no problems in it; put one JSON object on each line")
    return problems


def _problem(line: str, id: str) -> Problem:
    try:
        row = json.loads(line)
    except ValueError as fault:
        raise ValueError(f"not JSON ({fault}); put one object on each line") from None
    if not isinstance(row, dict):
        raise ValueError("not an object; put one JSON object on each line")
    reward_model = row.get("reward_model")
    truth = reward_model.get("ground_truth") if isinstance(reward_model, dict) else None
    if not isinstance(truth, str):
        raise ValueError("reward_model.ground_truth is not a string; give the answer as text")
    if not isinstance(row.get("data_source"), str):
        raise ValueError("data_source is not a string; name where the problem comes from")
    extra = row.get("extra_info") or {}
    if not isinstance(extra, dict):
        raise ValueError("extra_info is not an object; make it one or leave it out")
    return Problem(
        id=id,
        messages=_messages(row.get("prompt")),
        ground_truth=truth,
        extra={"data_source": row["data_source"], **extra},
    )


def _messages(prompt: Any) -> tuple[Message, ...]:
    remedy = 'use [{"role": "user", "content": "…"}]'
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(f"prompt is not a list of chat messages; {remedy}")
    for message in prompt:
        fields = (message.get("role"), message.get("content")) if isinstance(message, dict) else ()
        if not fields or not all(isinstance(field, str) for field in fields):
            raise ValueError(f"a message of prompt has no role and content as text; {remedy}")
    return tuple(prompt)
