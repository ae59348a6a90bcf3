"""A verifier's process: `python -m elpo_ray.tasks.grading.verifier_child NAME OPTIONS CPU_S`.

Reads `{"number": …}` and replies `{"question": …, "answer": …}`. Reads `{"number": …, "answer": …}`
and replies `{"value": …}`: what reasoning_gym's verifier gives, 0 for an answer that it cannot
read, null for no verdict. Ends itself with its standard input, and by a signal when an answer has
used up its processor time. Code in an answer, which some verifiers would evaluate, opens no file
for writing, starts no process and no connection.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
from typing import Any

FORBIDDEN = (
    "subprocess.", "socket.", "ctypes.", "shutil.", "os.system", "os.exec", "os.posix_spawn",
    "os.fork", "os.spawn", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate",
    "os.chmod", "os.chown", "os.link", "os.symlink", "os.kill", "os.putenv", "pty.", "signal.",
)  # fmt: skip
"""How the events of Python's audit table begin that an answer may not cause."""
MEMORY_MIB = 2048
"""Address space."""


def main() -> None:
    """Answer requests on standard input until it ends."""
    name, options, cpu_s = sys.argv[1], json.loads(sys.argv[2]), float(sys.argv[3])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever a library prints is no reply
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    # Before the limits: imports need address space, and may write caches.
    from elpo_ray.tasks.gym_programs import PROGRAMS
    from elpo_ray.tasks.reasoning_gym import dataset_of

    dataset = dataset_of(name, options, 0)
    _value(dataset, dataset[0], "0")
    limit = MEMORY_MIB << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(kind, (0, 0))

    def say(line: str) -> None:
        replies.write(line + "\n")
        replies.flush()

    sys.addaudithook(_forbid)
    say("ready")
    for line in sys.stdin:
        request = json.loads(line)
        dataset = dataset_of(name, options, request["number"])
        entry = dataset[0]
        if "answer" not in request:
            made = {name: entry[name] for name in ("question", "answer")}
            program = PROGRAMS.get(name)
            made["program"] = program(entry["metadata"]) if program else None
            say(json.dumps(made))
            continue
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        value = _value(dataset, entry, request["answer"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        say(json.dumps({"value": value}))


def _forbid(event: str, given: tuple[Any, ...]) -> None:
    """An audit hook: raise PermissionError for what no verifier needs."""
    reading = event == "open" and not (given[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if event.startswith(FORBIDDEN) or (event == "open" and not reading):
        raise PermissionError(event)


def _value(dataset: Any, entry: Any, answer: str) -> float | None:
    """What the verifier gives for an answer to a problem of the data set."""
    try:
        value = float(dataset.score_answer(answer, entry))
    except MemoryError:
        return None
    except (Exception, SystemExit):  # other people's code could not read the answer
        return 0.0
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    main()
