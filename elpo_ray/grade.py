r"""The verdict on a mathematical answer, and why.

    python -m elpo_ray.grade '\frac{1}{2}' 0.5
    python -m elpo_ray.grade --file answers.jsonl

GOLD is the right answer and ANSWER what a model put into its box; a text with a box is read as a
whole turn. A file has one object a line with `gold` and `answer`; each is printed, as a JSON line,
with its `verdict` (`equal`, `different` or `undecided`) and `why`, and keeps its further fields.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from elpo_ray.config.arguments import VERSION, Parser
from elpo_ray.config.task import RewardConfig
from elpo_ray.tasks.grading.answers import boxed_answer
from elpo_ray.tasks.grading.pool import Judgement, MathGrader

AT_ONCE = 256
"""So many lines of a file are compared together."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = Parser("grade", __doc__ or "")
    parser.add_argument("gold", nargs="?", metavar="GOLD")
    parser.add_argument("answer", nargs="?", metavar="ANSWER")
    parser.add_argument("--file", metavar="FILE.jsonl")
    given = parser.parse_args(_arguments(sys.argv[1:] if argv is None else argv))
    if (given.file is None) == (given.answer is None) or (given.file and given.gold):
        parser.error("give GOLD and ANSWER, or --file FILE.jsonl")
    return parser.run(lambda: _grade(given.gold, given.answer, given.file))


def _grade(gold: str, answer: str, file: str | None) -> None:
    """Print the verdict on `answer`, or on each line of `file`. Raises ValueError as `_rows`."""
    config = RewardConfig()
    grader = MathGrader(config.graders, config.grader_cpu_s)
    if file is None:
        [judgement] = asyncio.run(_judge(grader, [(gold, answer)]))
        print(f"{judgement.verdict}: {judgement.why}")
        return
    rows = list(_rows(Path(file)))
    for start in range(0, len(rows), AT_ONCE):
        some = rows[start : start + AT_ONCE]
        judged = asyncio.run(_judge(grader, [(row["gold"], row["answer"]) for row in some]))
        for row, judgement in zip(some, judged, strict=True):
            found = {**row, "verdict": judgement.verdict, "why": judgement.why}
            print(json.dumps(found), flush=True)


def _arguments(words: Sequence[str]) -> list[str]:
    """The command line; an answer may begin with a minus sign."""
    known = ("-h", "--help", VERSION, "--")
    options = any(word in known or word.startswith("--file") for word in words)
    return list(words) if options else ["--", *words]


async def _judge(grader: MathGrader, pairs: Sequence[tuple[str, str]]) -> list[Judgement]:
    read = [(gold, _answer_of(answer)) for gold, answer in pairs]
    return list(await asyncio.gather(*(grader.judge(gold, answer) for gold, answer in read)))


def _answer_of(text: str) -> str:
    """What the boxes in a text hold; the text itself without one."""
    boxed = boxed_answer(text)
    return text if boxed is None else boxed


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file. ValueError names the line that is none."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as fault:
        raise ValueError(
            f"--file={str(path)!r}: cannot be read ({fault}); name a file of JSON lines"
        ) from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not all(
            isinstance(row.get(name), str) for name in ("gold", "answer")
        ):
            raise ValueError(
                f"--file={str(path)!r}: line {number} is no JSON object with gold and answer as "
                "text; write one on each line"
            )
        yield row


if __name__ == "__main__":
    sys.exit(main())
