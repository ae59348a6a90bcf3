"""LiveCodeBench, release v6: programming contests, judged by public and private tests.

Rows have the set's own fields. `task.contest_from` and `contest_until` cut a window out of it.
"""

from __future__ import annotations

from datetime import date
from typing import Any

from elpo_ray.config.task import TaskConfig, TaskName
from elpo_ray.tasks.grading.programs import read_public
from elpo_ray.tasks.problem_set import Family
from elpo_ray.tasks.rewards import KIND, LIVECODEBENCH
from elpo_ray.tasks.sources import Row, Source, text_of
from elpo_ray.types import Problem

STRATEGY = "Think about the algorithm and its running time first"
TRIAL = ", then use the tool to try your program on examples."
STDIN = "The program reads from standard input and writes to standard output."
SUBMIT = "submit the whole program in one ```python block."
TEST_FIELDS = ("public_test_cases", "private_test_cases", "metadata")


def read(row: Row, id: str, seed: int, code: bool) -> Problem:
    """The tests stay packed until a program is judged."""
    for name in TEST_FIELDS[:2]:
        text_of(row, name)
    return Problem(
        id=id,
        messages=({"role": "user", "content": _prompt(row, code)},),
        ground_truth={name: row.get(name) for name in TEST_FIELDS},
        extra={KIND: LIVECODEBENCH, "contest_date": str(row.get("contest_date") or "")},
    )


def _prompt(row: Row, code: bool) -> str:
    starter = str(row.get("starter_code") or "").strip()
    parts = ["Solve the following programming problem in Python.", text_of(row, "question_content")]
    examples = [
        f"Input:\n{given.strip()}\nOutput:\n{out.strip()}" for given, out in read_public(row)
    ]
    if examples:
        parts.append("Examples:\n\n" + "\n\n".join(examples))
    if starter:
        parts.append(f"Complete this code and keep its names:\n\n```python\n{starter}\n```")
    else:
        parts.append(STDIN)
    return "\n\n".join([*parts, submission(code)])


def submission(code: bool) -> str:
    """How to arrive at a program; `code`: by trying it."""
    if not code:
        return f"{STRATEGY}. Then {SUBMIT}"
    return f"{STRATEGY}{TRIAL} Once it works, stop calling the tool and {SUBMIT}"


def within(row: Row, config: TaskConfig) -> bool:
    """Whether the contest was held in the configured window. ValueError without a date."""
    if config.contest_from is None and config.contest_until is None:
        return True
    value: Any = row.get("contest_date")
    day = str(value)[:10]
    try:
        date.fromisoformat(day)
    except ValueError:
        raise ValueError(
            f"contest_date={value!r}: not a date; leave task.contest_from and contest_until out"
        ) from None
    return (config.contest_from or "") <= day <= (config.contest_until or "9999")


FAMILIES: dict[str, Family] = {
    TaskName.livecodebench_v6: Family(
        read=read,
        keep=within,
        held_out=Source(
            name="livecodebench_v6",
            repo="livecodebench/code_generation_lite",
            files=("test6.jsonl",),
        ),
    )
}
