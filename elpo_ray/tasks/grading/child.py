"""A grader process: `python -m elpo_ray.tasks.grading.child CPU_S MEMORY_MIB`.

Reads `{"gold": …, "answer": …}`, says `gold`, `answer` or `both` when the work on one of them or on
both begins, and replies `{"equal": …, "why": …}`. Ends itself with its standard input, when its
memory ran out, and by a signal when a comparison has used up its processor time, so that none
outlives its parent at work.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys

NEARLY = 0.8
"""Share of the memory limit at which a "different" is not believed: sympy and math-verify read a
MemoryError as inequality."""
ANSWER_CPU_S = 0.9
"""Seconds of processor time for the answer alone, which no answer of a usual size needs."""
WARM = (
    r"x^2+\frac{1}{2}", r"\sqrt{2}\cdot 3", r"e^{i\pi/4}", r"2\sin x", r"\binom{5}{2}!",
    r"f(x)=2x+3",
    r"\frac{x+1}{x-1}", r"|x-1|", r"\log_{2}8", r"\sum_{k=1}^{n}k", r"\left(a+b\right)^{2}",
)  # fmt: skip
"""Formulas that are read first: the parser learns its grammar from them."""


def peak_bytes() -> int:
    """The most memory that this program held, in bytes.

    `ru_maxrss` would begin with what the parent held when it started this process, and a rollout
    worker holds gigabytes."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10


def main() -> None:
    """Answer requests on standard input until it ends."""
    cpu_s, memory_mib = float(sys.argv[1]), int(sys.argv[2])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever a library prints is no reply
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    sys.set_int_max_str_digits(0)  # what is too large is seen to, and time is kept
    # Before the limit: imports need address space.
    from elpo_ray.tasks.grading.equality import equal, judge

    for formula in WARM:
        equal(formula, "2")
    limit = memory_mib << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def say(line: str) -> None:
        replies.write(line + "\n")
        replies.flush()

    def stage(name: str) -> None:
        say(name)
        share = ANSWER_CPU_S if name == "answer" else cpu_s
        signal.setitimer(signal.ITIMER_PROF, min(cpu_s, share))

    say("ready")
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        try:
            found = judge(request["gold"], request["answer"], stage)
        except (MemoryError, RecursionError):
            return
        signal.setitimer(signal.ITIMER_PROF, 0)
        if found.equal is False and peak_bytes() > NEARLY * limit:
            return
        say(json.dumps({"equal": found.equal, "why": found.why}))


if __name__ == "__main__":
    main()
