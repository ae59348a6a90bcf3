r"""Answers: what a turn is read as, what counts as equal, and a grader that cannot be broken."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elpo_ray.tasks.grading.answers import (
    answer_line,
    asks_for_line,
    boxed_answer,
    choice_letter,
    last_boxed,
    last_program,
    strict_box,
)
from elpo_ray.tasks.grading.equality import equal
from elpo_ray.tasks.grading.pool import MathGrader, Verdict


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("204", "204.0"),
        ("204", " $204$. "),
        ("204", r"\frac{408}{2}"),
        ("204", "x = 204"),
        ("204", "204 apples"),
        ("204", r"204 \text{ km/h}"),
        ("18", r"\$18"),
        ("1234", "1,234"),
        ("1234", "1{,}234"),
        ("1234", r"1\,234"),
        (r"10,\!080", "10 080"),
        (r"\frac{1}{2}", "0.5"),
        (r"\frac 59", "5/9"),
        (r"\frac{1}{3}", "0.333333333"),
        (r"1\frac{4}{5}", r"\dfrac95"),
        (r"90^\circ", "90°"),
        (r"90^\circ", r"90\text{ degrees}"),
        ("3, 5, 7", r"\{7,5,3\}"),
        (r"1 \pm \sqrt{19}", r"1-\sqrt{19}, 1+\sqrt{19}"),
        ("2k+2", "2(k+1)"),
        ("6 - 5i", "-5i+6"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)"),
        ("x=5", "5"),
        ("x \\in [-2,7]", "[-2,7]"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"\text{(C)}", "(C)"),
        ("52_8", r"52_{\text{eight}}"),
        ("52_8", "52"),
        (r"\begin{pmatrix} 1/5 \\ -2 \end{pmatrix}", r"\begin{bmatrix} 0.2 \\ -2 \end{bmatrix}"),
    ],
)
def test_the_same_in_another_form(gold: str, answer: str) -> None:
    assert equal(gold, answer)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("204", "205"),
        ("204", "-204"),
        ("12", "1 2"),
        ("18", "18 thousand"),
        ("18", "18 or 19"),
        ("18", "18, 19"),
        (r"\frac{1}{3}", "0.333"),
        (r"\frac{1}{3}", "3"),
        ("(3,4]", "[3,4]"),
        ("(2,4)", "(4,2)"),
        ("3, 5, 7", "3, 5"),
        ("2k+2", "2k+3"),
        ("x=5", "y=5"),
        (r"\text{east}", "west"),
        ("52_8", "52_9"),
        (r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}",
         r"\begin{pmatrix} -1 & 1 \\ 0 & -1 \end{pmatrix}"),
        ("204", ""),
        ("204", "9" * 10**6),
        ("204", "(" * 1000 + "204" + ")" * 1000),
        ("204", "\x00\\\\{"),
    ],
)  # fmt: skip
def test_another_answer(gold: str, answer: str) -> None:
    assert not equal(gold, answer)


@pytest.fixture(scope="module")
def grader() -> Iterator[MathGrader]:
    yield MathGrader(1, cpu_s=1.0)


ANSWERS = [
    json.loads(line)
    for line in (Path(__file__).parent / "answers.jsonl").read_text(encoding="utf-8").splitlines()
]
"""Each line has a gold answer, other forms of it and wrong answers that look like it."""


@pytest.mark.parametrize("row", ANSWERS, ids=lambda row: f"{row['kind']}: {row['gold'][:40]}")
def test_answers_of_every_kind(grader: MathGrader, row: dict[str, Any]) -> None:
    for wanted in ("equal", "different"):
        pairs = [(row["gold"], answer) for answer in row[wanted]]
        verdicts = compare(grader, *pairs)
        wrong = [pair for pair, v in zip(pairs, verdicts, strict=True) if v.value != wanted]
        assert not wrong, f"not {wanted}"


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("7", "10^{10^{10}}"),
        ("7", "(x+1)^{5000}"),
        ("7", r"\sum_{k=1}^{10^9} k^k"),
        ("7", r"\int_0^1 \sin(\sin(\sin(e^{x^{x^x}}))) dx"),
        ("7", r"\prod_{n=1}^{1000000} n"),
        ("2^{10^9}", "7"),
    ],
)
def test_a_giant_is_different_after_a_second_of_work(
    grader: MathGrader, gold: str, answer: str
) -> None:
    compare(grader, ("1/2", "0.5"))  # the process is there
    assert compare(grader, (gold, answer)) == [Verdict.DIFFERENT]


def compare(grader: MathGrader, *pairs: tuple[str, str]) -> list[Verdict]:
    async def all_at_once() -> list[Verdict]:
        return await asyncio.gather(*(grader.compare(gold, answer) for gold, answer in pairs))

    return asyncio.run(all_at_once())


def test_work_without_end_hurts_no_other_answer(grader: MathGrader) -> None:
    endless = r"\int_0^1 \sin(\sin(\sin(e^{x^{x^x}}))) dx"
    pairs = [("1/2", "0.5"), ("7", endless), (endless, "7"), ("7", "8"), ("7", "7.0")]
    assert compare(grader, *pairs) == [
        Verdict.EQUAL,
        Verdict.DIFFERENT,  # the answer's own size
        Verdict.UNDECIDED,  # the gold answer's: nobody can know
        Verdict.DIFFERENT,
        Verdict.EQUAL,
    ]


def test_a_verdict_has_a_reason(grader: MathGrader) -> None:
    for gold, answer, why in [
        ("7", "8", "7 is not 8"),
        ("1/2", "0.5", "the same value"),
        ("[1,2]", "(1,2)", "the sets of numbers differ"),
        ("7", "9" * 10**5, "100000 characters"),
    ]:
        assert why in asyncio.run(grader.judge(gold, answer)).why


def test_a_killed_grader_is_replaced(grader: MathGrader) -> None:
    assert compare(grader, ("1/2", "0.5")) == [Verdict.EQUAL]
    child = grader._free.get()
    assert child is not None
    os.kill(child._process.pid, 9)
    grader._free.put(child)
    assert compare(grader, ("1/2", "0.5"), ("1/2", "0.6")) == [Verdict.EQUAL, Verdict.DIFFERENT]


def test_a_machine_without_time_is_waited_for(grader: MathGrader) -> None:
    assert compare(grader, ("1/2", "0.5")) == [Verdict.EQUAL]
    child = grader._free.get()
    assert child is not None
    grader._free.put(child)
    os.kill(child._process.pid, signal.SIGSTOP)
    go_on = threading.Timer(2.5, os.kill, (child._process.pid, signal.SIGCONT))
    go_on.start()
    assert compare(grader, ("1/4", "0.25")) == [Verdict.EQUAL]
    go_on.join()
    assert grader._free.get() is child
    grader._free.put(child)


def test_a_large_owner_does_not_count_as_the_grader_s_memory() -> None:
    """The process of a rollout worker is larger than a grader may be."""
    code = (
        "import asyncio\nfrom elpo_ray.tasks.grading.pool import MEMORY_MIB, MathGrader\n"
        "large = b'x' * (MEMORY_MIB << 20)\n"
        "print(asyncio.run(MathGrader(1, 1.0).compare('7', '8')).value)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout == "different\n", run.stderr


def test_graders_end_with_their_owner() -> None:
    grader = MathGrader(1, cpu_s=1.0)
    compare(grader, ("1/2", "0.5"))
    child = grader._free.get()
    assert child is not None
    grader._free.put(child)
    pid = child._process.pid
    del grader, child
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError(f"grader {pid} lives on")


def test_last_boxed_balances_braces() -> None:
    assert last_boxed(r"a \boxed{1} \boxed{ {x}_{y} } b") == "{x}_{y}"
    assert last_boxed(r"\boxed{open") is None
    assert last_boxed("none") is None
    assert last_boxed(r"\boxed{" * 10**5) is None


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so our answer is $\boxed 2$.", "2"),
        (r"$\boxed 25$ in all", "25"),
        (r"thus \boxed -3.5.", "-3.5"),
        (r"it is $\boxed\frac{1}{2}$", r"\frac{1}{2}"),
        (r"it is \boxed \pi, so", r"\pi"),
        (r"\boxed 7 is the answer", "7"),
        (r"\boxed {7}", "7"),
        ("\\boxed\n{7}", "7"),
        (r"\fbox{7}", "7"),
        (r"\framebox{7}", "7"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"$x=\boxed{3}$ and $y=\boxed{4}$.", "3, 4"),
        (r"\boxed{3} or \boxed{4}", "3, 4"),
        (r"\(\boxed{3}\), \(\boxed{4}\), and \(\boxed{5}\)", "3, 4, 5"),
        (r"$\boxed{3}\text{ and }\boxed{4}$", "3, 4"),
        (r"\boxed{3} and $y$ is \boxed{4}", "3, 4"),
        (r"\boxed{3}, \boxed{3}", "3"),
        (r"\boxed{3}, no: \boxed{4}", "4"),
        (r"First \boxed{3}. Then \boxed{4}", "4"),
        (r"\boxed{3} is wrong and \boxed{4} is right", "4"),
        ("\\boxed{3}\n\n\\boxed{4}", "4"),
        (r"\boxed{x=\boxed{3}}", "3"),
        (r"\boxedx{7}", None),
        (r"\boxed", None),
        (r"\boxed{open", None),
        (r"\boxed{3} and \boxed{open", None),
    ],
)
def test_boxes(text: str, content: str | None) -> None:
    assert boxed_answer(text) == content


@pytest.mark.parametrize(
    "hostile",
    [r"\boxed{" * 10**5, "\n" * 10**6, "Answer" * 10**5, r"\boxed " * 10**5, "$ " * 10**5,
     r"\boxed{1}, " * 10**5, "{" * 10**6, r"\boxed{1}" + " " * 10**6 + r"\boxed{2}"],
)  # fmt: skip
def test_reading_takes_time_linear_in_the_text(hostile: str) -> None:
    start = time.process_time()
    boxed_answer(hostile)
    answer_line(hostile)
    choice_letter(hostile)
    asks_for_line(hostile)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("So it is 7.\nAnswer: 7", "7"),
        ("Answer: 6\nNo.\n**Answer:** $7$\n", "$7$"),
        ("**Answer: 7**", "7"),
        ("Final answer: 7", "7"),
        (r"Answer: \boxed{7}", "7"),
        (r"Answer: $\boxed{7}$.", "7"),
        ("the answer is: 7", None),
        ("Answer:\n7", None),
        ("7", None),
    ],
)
def test_the_answer_line(text: str, said: str | None) -> None:
    assert answer_line(text) == said


@pytest.mark.parametrize(
    ("prompt", "asks"),
    [
        ("The last line of your response should be of the form Answer: $Answer", True),
        ("Finish with a last line 'Answer: ' followed by the number.", True),
        ("Write `Answer: N` on its own line.", True),
        ("Your reply must end with Answer: and the value", True),
        ("Question: how many?\nAnswer:", False),
        (r"Put the answer into \boxed{}.", False),
        ("The line y = x. Answer: with a number?", False),
    ],
)
def test_prompts_that_ask_for_an_answer_line(prompt: str, asks: bool) -> None:
    assert asks_for_line(prompt) is asks


def test_strict_box_lies_within_the_last_hundred_characters() -> None:
    box = r"\boxed{7}"
    assert strict_box(box + "x" * 91) == "7"
    assert strict_box(box + "x" * 92) is None


@pytest.mark.parametrize(
    ("text", "letter"),
    [("B", "B"), ("(b)", "B"), (r"\text{B}", "B"), (r"\textbf{(C)}", "C"), ("B. Helium", "B"),
     ("Option D", "D"), ("Helium", None), ("", None), ("42", None), ("**B**", "B"), ("$B$", "B"),
     (r"\mathbf{(B)}", "B"), ("B) 5 m/s", "B"), ("B: Helium", "B"), ("The answer is B", "B"),
     ("B.", "B"), ("[B]", "B"), (r"\text{B. } C_6H_{12}", "B"), ("(B), because it is smaller", "B"),
     ("B is correct", "B"), ("A or B", None), ("A/B", None), ("A and C", None), ("A, B", None),
     ("(A) or (B)", None), (r"\text{A or B}", None), ("A, B and C", None), ("B & C", None),
     ("C_6H_{12}", None), ("C6H12", None), ("CO_2", None), ("A+B", None), ("B^+", None),
     ("A molecule", None), ("CD", None), ("D_2O", None), ("B'", None), (r"C\,_6", None)],
)  # fmt: skip
def test_choice_letter(text: str, letter: str | None) -> None:
    assert choice_letter(text) == letter


def test_last_program_is_the_last_closed_python_block() -> None:
    text = "```python\na\n```\n```\nplain\n```\n```py\nb = 1\n```\nso"
    assert last_program(text) == "b = 1\n"
    assert last_program("```python\nfirst\n```\n```python\nopen") == "first\n"
    assert last_program("no code") is None
