"""GPQA-Diamond: graduate-level questions with four options, whose order the seed shuffles."""

from __future__ import annotations

import random

from elpo_ray.config.task import TaskName
from elpo_ray.tasks.mathematics import TOOL_ADVICE
from elpo_ray.tasks.problem_set import Family
from elpo_ray.tasks.rewards import CHOICE, KIND
from elpo_ray.tasks.sources import Row, Source, text_of
from elpo_ray.types import Problem

LETTERS = "ABCD"
WRONG = tuple(f"Incorrect Answer {number}" for number in (1, 2, 3))
QUESTION = (
    "Work out the following question of {domain} step by step.\n\n{question}\n\n{options}\n\n"
)
ANSWER = r"state the capital letter of the right option as \boxed{{letter}}."
PROMPT = f"{QUESTION}{TOOL_ADVICE} Once you are certain, stop calling the tool and {ANSWER}"
PLAIN_PROMPT = f"{QUESTION}Once you are certain, {ANSWER}"
"""Where the policy cannot run code."""


def read(row: Row, id: str, seed: int, code: bool) -> Problem:
    """A row in the set's own fields; the order of the options depends on the seed and on the
    question, not on the row's place."""
    question, right = text_of(row, "Question"), text_of(row, "Correct Answer")
    options = [right, *(text_of(row, name) for name in WRONG)]
    order = list(range(len(options)))
    random.Random(f"{seed}/{question}").shuffle(order)
    listed = "\n".join(f"{LETTERS[i]}. {options[k]}" for i, k in enumerate(order))
    domain = str(row.get("High-level domain") or "science").lower()
    asked = PROMPT if code else PLAIN_PROMPT
    content = asked.format(domain=domain, question=question, options=listed)
    return Problem(
        id=id,
        messages=({"role": "user", "content": content},),
        ground_truth=LETTERS[order.index(0)],
        extra={KIND: CHOICE, "domain": domain},
    )


FAMILIES: dict[str, Family] = {
    TaskName.gpqa_diamond: Family(
        read=read,
        held_out=Source(
            name="gpqa_diamond", repo="Idavidrein/gpqa", subset="gpqa_diamond", gated=True
        ),
    )
}
