"""Comparison of answers in a few persistent processes that can be killed.

Plain pipes rather than a pool of `multiprocessing`, whose children import the parent's main module:
in a rollout worker that means the engine. Invariants: a process works for one comparison at a time;
what bounds it is its processor time, the clock is a backstop (a busy machine must not make an easy
answer undecided); one that overran, or died, is replaced; no child outlives this process, since its
standard input ends. What the work on the answer alone overran is the answer's own size: different.
Belongs to no event loop.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import select
import signal
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum

START_S = 120.0
"""Seconds that a process may take to import its libraries on a busy machine."""
WALLS = 10
"""A comparison may take so many times its processor time by the clock."""
MEMORY_MIB = 2048
"""Address space of a grader process."""


class Verdict(StrEnum):
    """What a comparison came to."""

    EQUAL = "equal"
    DIFFERENT = "different"
    UNDECIDED = "undecided"
    """Nobody can know, or the grader ran out of time or memory, or crashed: says nothing about the
    answer."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict and its reason, one clause."""

    verdict: Verdict
    why: str


STAGES = (b"gold\n", b"answer\n", b"both\n")
VERDICTS = {True: Verdict.EQUAL, False: Verdict.DIFFERENT, None: Verdict.UNDECIDED}


class MathGrader:
    """`processes` graders; comparisons beyond that wait, outside their time."""

    def __init__(self, processes: int, cpu_s: float) -> None:
        """Nothing is started before the first comparison."""
        self._cpu_s = cpu_s
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="grader")
        self._free: queue.SimpleQueue[_Child | None] = queue.SimpleQueue()
        for _ in range(processes):
            self._free.put(None)
        weakref.finalize(self, _close, self._threads, self._free)

    async def compare(self, gold: str, answer: str) -> Verdict:
        r"""Whether two contents of `\boxed{…}` are the same mathematics."""
        return (await self.judge(gold, answer)).verdict

    async def judge(self, gold: str, answer: str) -> Judgement:
        """`compare`, with its reason."""
        if gold == answer:
            return Judgement(Verdict.EQUAL, "the same text")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._judge, gold, answer)

    def _judge(self, gold: str, answer: str) -> Judgement:
        """Ask one process, and a second one where `_Child.worth_another` says so."""
        child = self._free.get()
        try:
            for _ in range(2):
                child = child or _Child(self._cpu_s)
                found = child.ask(gold, answer)
                if not child.lost:
                    break
                again = child.worth_another
                child.kill()
                child = None
                if not again:
                    break
            return found
        finally:
            self._free.put(child)


class _Child:
    """One grader process, from the thread that holds it."""

    def __init__(self, cpu_s: float) -> None:
        """Raises RuntimeError if the process cannot start: a broken installation."""
        self._cpu_s = cpu_s
        self._asked = 0
        self._said = b""
        self.lost = False
        """The last comparison ended it, or it did not answer: of no more use."""
        self.worth_another = False
        """The last comparison may have failed without its own doing: it hardly got the processor,
        or earlier ones had filled the memory."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "elpo_ray.tasks.grading.child", str(cpu_s), str(MEMORY_MIB)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the trainer, which may still want verdicts
        )
        if self._line(time.monotonic() + START_S) != b"ready\n":
            self.kill()
            raise RuntimeError(
                "a grader process did not start: "
                "`python -m elpo_ray.tasks.grading.child 5 2048` says why"
            )

    def ask(self, gold: str, answer: str) -> Judgement:
        """Compare. Sets `lost` and `worth_another`."""
        request = json.dumps({"gold": gold, "answer": answer}).encode() + b"\n"
        self._asked += 1
        self.lost, self.worth_another = True, self._asked > 1
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
        except BrokenPipeError:
            return Judgement(Verdict.UNDECIDED, "the grader had crashed")
        deadline, stage = time.monotonic() + WALLS * self._cpu_s, b""
        while (line := self._line(deadline)) in STAGES:
            stage = line
        if line is None:
            self.worth_another = True
            return Judgement(Verdict.UNDECIDED, "the machine gave the grader no time")
        if line:
            self.lost = False
            reply = json.loads(line)
            return Judgement(VERDICTS[reply["equal"]], reply["why"])
        if self._process.wait() == -signal.SIGPROF:
            self.worth_another = False
            what = "took all its processor time"
        else:
            what = "ran out of memory, or crashed"
        if stage == b"answer\n":
            return Judgement(Verdict.DIFFERENT, f"the answer is too large: reading it {what}")
        return Judgement(Verdict.UNDECIDED, f"the comparison {what}")

    def kill(self) -> None:
        """End the process and reap it. May be called again."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue
        self._process.wait()

    def _line(self, deadline: float) -> bytes | None:
        """One line; nothing if the process died; None at the deadline."""
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(pipe)
        while b"\n" not in self._said:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                return None
            part = os.read(pipe, 4096)
            if not part:
                return b""
            self._said += part
        line, _, self._said = self._said.partition(b"\n")
        return line + b"\n"


def _close(threads: ThreadPoolExecutor, free: queue.SimpleQueue[_Child | None]) -> None:
    threads.shutdown(wait=False, cancel_futures=True)
    while not free.empty():
        child = free.get()
        if child is not None:
            child.kill()
