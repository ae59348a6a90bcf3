"""A grader process: `python -m elpo_ray.tasks.grading.child CPU_S MEMORY_MIB`.

Reads `{"gold": …, "answer": …}`, replies `true`, `false` or `null` (no verdict, and the process
ends). Ends itself with its standard input, and by a signal when a comparison has used up its
processor time, so that none outlives its parent at work.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys

NEARLY = 0.8
"""Share of the memory limit at which a "different" is not believed: math-verify reads a
MemoryError as inequality."""


def main() -> None:
    cpu_s, memory_mib = float(sys.argv[1]), int(sys.argv[2])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever a library prints is no reply
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    # Before the limit: imports need address space.
    from elpo_ray.tasks.grading.equality import equal

    equal("x^2+1/2", "2")  # the first comparison loads grammars and modules
    limit = memory_mib << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies.write("ready\n")
    replies.flush()
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        verdict: bool | None
        try:
            verdict = equal(request["gold"], request["answer"])
        except (MemoryError, RecursionError):
            verdict = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        if verdict is False and peak > NEARLY * limit:
            verdict = None
        replies.write(json.dumps(verdict) + "\n")
        replies.flush()
        if verdict is None:
            return


if __name__ == "__main__":
    main()
