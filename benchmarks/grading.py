r"""What the grader of mathematical answers gets right, what it survives and how fast it is.

    python benchmarks/grading.py FILE.jsonl [FILE.jsonl …] [--cpu-s 2] [--processes 2]

Every line of a file has an `answer` (AIME, MATH500, GSM8K, …). Prints JSON with three tests and the
answers graded per second. Every gold answer and at least six equivalent forms of it should be
judged equal. Wrong variants should be judged different. A thousand hostile answers must neither
hang nor crash the grader.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # beside this file lies a `sandbox`

from elpo_ray.tasks.grading.answers import boxed_answer  # noqa: E402
from elpo_ray.tasks.grading.pool import MathGrader, Verdict  # noqa: E402

INTEGER = re.compile(r"-?\d+")
FRACTION = re.compile(r"(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}")
TUPLE = re.compile(r"[(\[].*,.*[)\]]")
WORD = re.compile(r"\\text\{\(?([A-Za-z]+)\)?\}")
BASED = re.compile(r"(\d+)_\{?(\d+)\}?")
SHOWN = 40
"""So many misjudged pairs of each kind are printed."""


def equivalents(gold: str) -> list[str]:
    """At least six other ways to write a gold answer."""
    forms = [
        f" {gold} ",
        f"${gold}$",
        rf"\displaystyle {gold}",
        rf"\,{gold}\;",
        f"{gold}.",
        re.sub(r"(?<![{\d_,\\!])([-+=])(?!\s*[\d.]*})", r" \1 ", gold).strip(),
        rf"\({gold}\)",
        gold.replace(r"\frac", r"\dfrac").replace(r"\left", "").replace(r"\right", ""),
    ]
    number = gold.replace(",\\! ", "").replace(",\\!", "").replace(r"\$", "")
    if INTEGER.fullmatch(number):
        value = int(number)
        forms += [f"{value:,}", f"{value:,}".replace(",", "{,}"), f"{value:,}".replace(",", r"\,"),
                  f"{value}.0", f"{value}.00", rf"\frac{{{2 * value}}}{{2}}", f"{2 * value}/2",
                  rf"{value}\text{{ apples}}", f"{value} dollars", rf"\${value}",
                  f"x = {value}"]  # fmt: skip
        if "$" not in gold:  # two units are compared
            forms += [rf"{value} \mathrm{{cm}}", f"{value}^\\circ"]
    if found := FRACTION.fullmatch(number):
        ratio = Fraction(int(found[1] + found[2]), int(found[3]))
        top, bottom = ratio.numerator, ratio.denominator
        forms += [f"{top}/{bottom}", rf"\frac{{{3 * top}}}{{{3 * bottom}}}",
                  rf"\tfrac{{{top}}}{{{bottom}}}", f"{top / bottom:.12f}"]  # fmt: skip
    if TUPLE.fullmatch(gold) and "left" not in gold:
        forms.append(rf"\left{gold[:-1]}\right{gold[-1]}")
    if re.fullmatch(r"[^(\[{]*,\s?[^)\]}!]*", gold) and not re.search(r"\d,\d{3}", gold):
        parts = [part.strip() for part in gold.split(",")]
        forms += [", ".join(reversed(parts)), rf"\{{{','.join(reversed(parts))}\}}"]
    if found := WORD.fullmatch(gold):
        forms += [found[1], rf"\textbf{{{found[1]}}}", rf"\mathrm{{{found[1]}}}"]
    if found := BASED.fullmatch(gold):
        forms += [f"{found[1]}_{{{found[2]}}}", f"{found[1]}_{found[2]}"]
    if "pmatrix" in gold:
        forms.append(gold.replace("pmatrix", "bmatrix"))
    return forms


def wrong_variants(gold: str) -> list[str]:
    """Answers that look like a gold answer and are not."""
    if found := WORD.fullmatch(gold):
        other = "D" if len(found[1]) == 1 else "Nobody"
        return [rf"\text{{{other}}}", other, f"not {found[1]}"]
    unit = re.search(r"\\(?:text|mbox)", gold)  # units are not compared
    numbers = list(re.finditer(r"\d+", gold[: unit.start()] if unit else gold))
    variants = []
    for found in numbers:
        for changed in (int(found[0]) + 1, 10 * int(found[0]) + 7):
            variants.append(gold[: found.start()] + str(changed) + gold[found.end() :])
    if INTEGER.fullmatch(gold):
        value = int(gold)
        variants += [
            str(value + 0.5),
            rf"\frac{{{value}}}{{7}}" if value else "7",
            f"{value}, {value + 1}",
            f"x > {value}",
            f"{value} + i",
        ]
        variants += [str(-value), f"{value} thousand"] if value else []
    elif numbers and not re.search(r"[=<>\\]?in\b|=|circ|text|mbox|_|,|cup|matrix", gold):
        variants += [f"({gold}) + 1", f"({gold}) \\cdot 2", f"({gold}) - x"]
    if FRACTION.fullmatch(gold):
        sign, top, bottom = FRACTION.fullmatch(gold).groups()  # type: ignore[union-attr]
        variants += [rf"{sign}\frac{{{bottom}}}{{{top}}}", f"{int(top) / int(bottom) + 0.01:.3f}"]
    return variants


def hostile_answers(count: int, rng: random.Random) -> list[str]:
    """Deep nesting, huge numbers, work without end, broken LaTeX, noise."""

    def noise(length: int) -> str:
        return "".join(chr(rng.choice((rng.randrange(32, 127), rng.randrange(1, 0x3000))))
                       for _ in range(length))  # fmt: skip

    makers = [
        lambda n: "(" * (5 + n % 90) + "1" + ")" * (5 + n % 90),
        lambda n: "{" * (n % 38) + r"\frac{1}{2}" + "}" * (n % 38),
        lambda n: r"\frac{1}{" * (10 + n % 28) + "2" + "}" * (10 + n % 28),
        lambda n: r"\sqrt{" * (5 + n % 30) + "x+1" + "}" * (5 + n % 30),
        lambda n: str(rng.randrange(1, 10)) * 10**6,
        lambda n: str(rng.randrange(1, 10)) * (500 + n % 400),
        lambda n: "0." + "3" * (500 + n % 400),
        lambda n: "+".join(f"x_{{{i}}}" for i in range(60)),
        lambda n: noise(rng.randrange(1, 300)),
        lambda n: "\\" * rng.randrange(1, 300),
        lambda n: "{" * rng.randrange(1, 300),
        lambda n: r"\begin{pmatrix}" + "1 & " * 150 + r"1\end{pmatrix}",
        lambda n: r"\text{" + "a" * 500 + "}",
        lambda n: "__import__('os').system('echo broken out >&2')",
        lambda n: "\x00" * 50 + "204",
        lambda n: r"\boxed{" * 30 + "205" + "}" * 30,
        lambda n: "1" + ",000" * 200,
        lambda n: "204 " * 200,
        lambda n: r"\frac{0}{0}" + r"+\frac{1}{0}" * (n % 5),
        lambda n: f"(x+1)^{{{n % 30}}}(x-1)^{{{n % 17}}}",
    ]
    endless = [
        "9^{9^{9^{9}}}", "10^{10^{10}}", r"10000000!!", r"(10^8)!", r"\binom{10^9}{5 \cdot 10^8}",
        r"\sum_{k=1}^{10^{12}} \frac{1}{k^k}", r"\int_0^1 \sin(\sin(\sin(e^{x^{x^x}}))) dx",
        r"\lim_{n \to \infty} \left(1+\frac{1}{n}\right)^{n^{n^n}}", r"(x+y+z+w)^{500}-1",
        r"\prod_{k=1}^{10^9} (1+\frac{1}{k^2})", r"\sqrt{2}^{\sqrt{2}^{\sqrt{2}^{10^{9}}}}",
        r"x^{99999}-x^{99998}+\sin(x)^{77777}", "7" * 300 + "^{" + "7" * 30 + "}",
    ]  # fmt: skip
    # One in fifty is endless: each of those costs all the time it is given.
    return [endless[n // 50 % len(endless)] if n % 50 == 0 else makers[n % len(makers)](n)
            for n in range(count)]  # fmt: skip


async def judge(grader: MathGrader, pairs: list[tuple[str, str]]) -> tuple[list[Verdict], float]:
    """The verdict on each (gold answer, content of a box), and the seconds for all of them."""
    start = time.perf_counter()
    boxed = [(gold, boxed_answer(rf"So it is $\boxed{{{answer}}}$.")) for gold, answer in pairs]
    verdicts = await asyncio.gather(*(grader.compare(gold, box or "") for gold, box in boxed))
    return verdicts, time.perf_counter() - start


async def measure(files: list[str], processes: int, cpu_s: float) -> dict[str, object]:
    lines = [line for name in files for line in Path(name).read_text("utf-8").splitlines()]
    golds = [json.loads(line)["answer"] for line in lines]
    grader = MathGrader(processes, cpu_s)
    await judge(grader, [("1", "2")] * processes)  # starts the processes
    report: dict[str, object] = {"gold answers": len(golds)}
    forms = [(gold, form) for gold in golds for form in {gold, *equivalents(gold)}]
    least = min(len(set(equivalents(gold)) - {gold}) for gold in golds)
    report["least forms of a gold answer, itself not counted"] = least
    wrong = [(gold, form) for gold in golds for form in set(wrong_variants(gold))]
    hostile = [("204", answer) for answer in hostile_answers(1000, random.Random(0))]
    for title, pairs, right in (
        ("gold against itself", [(gold, f"{gold} ") for gold in golds], Verdict.EQUAL),
        ("equivalent", forms, Verdict.EQUAL),
        ("wrong", wrong, Verdict.DIFFERENT),
        ("hostile", hostile, Verdict.DIFFERENT),
    ):
        print(f"{title}: {len(pairs)} pairs", file=sys.stderr)
        verdicts, seconds = await judge(grader, pairs)
        missed = [(*pair, v) for pair, v in zip(pairs, verdicts, strict=True) if v is not right]
        report[title] = {
            "pairs": len(pairs),
            "verdicts": dict(Counter(verdicts)),
            "seconds": round(seconds, 1),
            "answers/s": round(len(pairs) / seconds, 1),
            "not as wanted": [[text[:80] for text in pair] for pair in missed[:SHOWN]],
        }
    alive, _ = await judge(grader, [("1/2", "0.5")])
    report["works after the hostile answers"] = alive == [Verdict.EQUAL]
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+")
    parser.add_argument("--cpu-s", type=float, default=5.0)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    report = asyncio.run(measure(args.files, args.processes, args.cpu_s))
    print(json.dumps(report, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
