"""The paper's RL mix (Gen-Verse/Open-AgentRL-30K) and its cold-start conversations (…-SFT-3K).

One row: `data_source`, `prompt` (chat messages), `reward_model.ground_truth` and optionally
`extra_info`. Unlike the original loader, each row is read by its own `data_source`, not by that of
the first row of its file.
"""

from __future__ import annotations

import re
from typing import Any

from elpo_ray.config.task import TaskName
from elpo_ray.tasks.grading.answers import asks_for_line
from elpo_ray.tasks.grading.programs import read_tests
from elpo_ray.tasks.livecodebench import STDIN, submission
from elpo_ray.tasks.mathematics import NUMERIC, NUMERIC_LINE, math_prompt
from elpo_ray.tasks.problem_set import Family
from elpo_ray.tasks.rewards import ANSWER_LINE, CODE, KIND, MATH
from elpo_ray.tasks.sources import Row, Source
from elpo_ray.types import Message, Problem

OWN_PROMPT = ("math_dapo", "mega-science")
"""Data sources whose prompts already say what to do; they only get the note on units."""
TESTS = re.compile(r'\s*\{\s*(?:\}|"(?:[^"\\]|\\.)*"\s*:)')
"""The beginning of a JSON object."""
READS_STDIN = "reads_stdin"
"""Key of `Problem.extra` of a code problem."""


def read(row: Row, id: str, seed: int, code: bool) -> Problem:
    """A row of the RL mix, asked as the recipe asks it."""
    problem = read_plain(row, id)
    *before, last = problem.messages
    text, source = last["content"], row["data_source"]
    if problem.extra[KIND] == CODE:
        how = f"{STDIN} " if problem.extra[READS_STDIN] else ""
        text = f"{text}\n\n{how}{submission(code)}"
    elif problem.extra.get(ANSWER_LINE):
        text = f"{text}\n\n{NUMERIC_LINE}"
    elif source in OWN_PROMPT:
        text = f"{text}\n\n{NUMERIC}"
    else:
        text = math_prompt(text, code)[0]["content"] + f" {NUMERIC}"
    messages = (*before, {**last, "content": text})
    return Problem(problem.id, messages, problem.ground_truth, extra=problem.extra)


def read_plain(row: Row, id: str) -> Problem:
    """The prompt as it stands. ValueError if a field is missing or unusable."""
    source, reward_model = row.get("data_source"), row.get("reward_model")
    if not isinstance(source, str):
        raise ValueError("data_source is not a string; name where the problem comes from")
    extra = row.get("extra_info") or {}
    if not isinstance(extra, dict):
        raise ValueError("extra_info is not an object; make it one or leave it out")
    truth = reward_model.get("ground_truth") if isinstance(reward_model, dict) else None
    kind = CODE if _are_tests(truth) else MATH
    if kind == CODE:
        first = read_tests(truth)[0]
        extra = {**extra, READS_STDIN: first.call is None and first.check is None}
    elif not isinstance(truth, str) or not truth.strip():
        raise ValueError("reward_model.ground_truth is not a string; give the answer as text")
    else:
        truth = truth.strip()
    messages = messages_of(row.get("prompt"))
    if kind == MATH and asks_for_line(messages[-1]["content"]):
        extra = {**extra, ANSWER_LINE: True}
    return Problem(
        id=id,
        messages=messages,
        ground_truth=truth,
        extra={**extra, "data_source": source, KIND: kind},
    )


def _are_tests(truth: Any) -> bool:
    """Whether a ground truth is a program's tests, or their JSON, rather than an answer."""
    if not isinstance(truth, str):
        return isinstance(truth, dict)
    return TESTS.match(truth) is not None


def messages_of(prompt: Any) -> tuple[Message, ...]:
    """A prompt that is a list of chat messages. ValueError if it is none."""
    remedy = 'use [{"role": "user", "content": "…"}]'
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(f"prompt is not a list of chat messages; {remedy}")
    for message in prompt:
        fields = (message.get("role"), message.get("content")) if isinstance(message, dict) else ()
        if not fields or not all(isinstance(field, str) for field in fields):
            raise ValueError(f"a message of prompt has no role and content as text; {remedy}")
    return tuple({"role": m["role"], "content": m["content"]} for m in prompt)


FAMILIES: dict[str, Family] = {
    TaskName.open_agentrl: Family(
        read=read,
        train=Source(name="open_agentrl", repo="Gen-Verse/Open-AgentRL-30K"),
        demonstrations=Source(name="open_agentrl-sft", repo="Gen-Verse/Open-AgentRL-SFT-3K"),
    ),
}
