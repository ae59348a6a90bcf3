"""The grade command: a verdict with its reason, for one answer or for a file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

Done = subprocess.CompletedProcess[str]


def grade(*arguments: str) -> Done:
    command = [sys.executable, "-m", "elpo_ray.grade", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"),
    [
        (r"\frac{1}{2}", "0.5", "equal"),
        ("-7", r"-\frac{14}{2}", "equal"),
        ("7", r"It is $\boxed 7$.", "equal"),
        ("7", "10^{10^{10}}", "different"),
    ],
)
def test_one_answer(gold: str, answer: str, verdict: str) -> None:
    done = grade(gold, answer)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{verdict}: ") and done.stdout.count("\n") == 1


def test_a_file_keeps_its_fields_and_order(tmp_path: Path) -> None:
    rows = [
        {"gold": "7", "answer": str(number), "id": number, "note": "\u2028ü\ud800"}
        for number in range(300)
    ]
    file = tmp_path / "answers.jsonl"
    file.write_text("\n\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    done = grade("--file", str(file))
    assert (done.returncode, done.stderr) == (0, "")
    judged = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["verdict"] for row in judged] == ["different"] * 7 + ["equal"] + ["different"] * 292
    assert all(row.pop("why") and row.pop("verdict") for row in judged)
    assert judged == rows


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"gold": "1", "answer": "1"}\n{nope', "line 2 is no JSON object with gold and answer"),
        ('{"gold": "1"}', "line 1 is no JSON object with gold and answer"),
        ('{"gold": 1, "answer": "1"}', "line 1 is no JSON object with gold and answer"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(
    tmp_path: Path, text: str | None, fault: str
) -> None:
    file = tmp_path / "answers.jsonl"
    if text is not None:
        file.write_text(text)
    done = grade("--file", str(file))
    assert (done.returncode, done.stdout) == (2, "")
    assert fault in done.stderr and done.stderr.count("\n") == 1 and str(file) in done.stderr


@pytest.mark.parametrize("arguments", [[], ["7"], ["7", "8", "9"], ["7", "--file", "x"]])
def test_a_command_line_without_two_answers_is_refused(arguments: list[str]) -> None:
    done = grade(*arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
