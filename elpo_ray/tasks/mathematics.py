r"""Mathematics with a short answer: AIME 2024 and 2025, MATH500, MATH and GSM8K.

Rows have `problem` (GSM8K: `question`) and `answer`; MATH only a `solution` whose last `\boxed{…}`
is the answer, GSM8K one that ends with `#### answer`.
"""

from __future__ import annotations

from elpo_ray.config.task import TaskName
from elpo_ray.tasks.grading.answers import boxed_answer
from elpo_ray.tasks.problem_set import Family
from elpo_ray.tasks.rewards import KIND, MATH
from elpo_ray.tasks.sources import Row, Source, text_of
from elpo_ray.types import Message, Problem

NUMERIC = "Put only the numerical value in the box, without units."
NUMERIC_LINE = "Put only the numerical value after `Answer:`, without units."
TOOL_ADVICE = (
    "You can run Python code with the tool to calculate and to check results. Decide on a plan "
    "before you use it."
)
PROMPT = (
    "Work out the following problem step by step.\n\n{problem}\n\n"
    + TOOL_ADVICE
    + " Once you are certain of the result, stop calling the tool and state it as "
    r"\boxed{{answer}}."
)
PLAIN_PROMPT = (
    "Work out the following problem step by step.\n\n{problem}\n\n"
    r"Once you are certain of the result, state it as \boxed{{answer}}."
)
"""Where the policy cannot run code."""


def read(row: Row, id: str, seed: int, code: bool) -> Problem:
    """A problem of any of these sets."""
    problem = text_of(row, "problem", "Problem", "question")
    return Problem(
        id=id,
        messages=math_prompt(problem, code),
        ground_truth=answer_of(row),
        extra={KIND: MATH, "problem": problem},
    )


def math_prompt(problem: str, code: bool) -> tuple[Message, ...]:
    """The question as the agent sees it, who may run code or not."""
    asked = PROMPT if code else PLAIN_PROMPT
    return ({"role": "user", "content": asked.format(problem=problem)},)


def answer_of(row: Row) -> str:
    """The gold answer of a row, without what surrounds it. ValueError if there is none."""
    if any(row.get(name) is not None for name in ("answer", "Answer")):
        answer = text_of(row, "answer", "Answer")
        marked = answer.rpartition("####")[2].strip()  # GSM8K's answer is its solution
        if "####" in answer and marked:
            return marked.replace(",", "")
        return answer
    boxed = boxed_answer(text_of(row, "answer", "solution"))
    if not boxed:
        raise ValueError(r"no answer, and no \boxed{…} in solution: give the answer as text")
    return boxed


FAMILIES: dict[str, Family] = {
    TaskName.aime24: Family(
        read=read, held_out=Source(name="aime24", repo="Maxwell-Jia/AIME_2024")
    ),
    TaskName.aime25: Family(
        read=read, held_out=Source(name="aime25", repo="math-ai/aime25", split="test")
    ),
    TaskName.math500: Family(
        read=read, held_out=Source(name="math500", repo="HuggingFaceH4/MATH-500", split="test")
    ),
    TaskName.math: Family(
        read=read,
        train=Source(name="math-train", repo="DigitalLearningGmbH/MATH-lighteval"),
        held_out=Source(name="math", repo="DigitalLearningGmbH/MATH-lighteval", split="test"),
    ),
    TaskName.gsm8k: Family(
        read=read,
        train=Source(name="gsm8k-train", repo="openai/gsm8k", subset="main"),
        held_out=Source(name="gsm8k", repo="openai/gsm8k", subset="main", split="test"),
    ),
}
