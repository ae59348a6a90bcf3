"""Problems and verifiers of reasoning_gym, in processes of their own.

Problems too, because some kinds depend on the hashes of texts, which are the same only in processes
that are started so.

Some verifiers evaluate the answer as an expression: it may take for ever, or be no mere expression.
Invariants: a process works for one answer at a time; one that overran or died is replaced; none
outlives this process, since its standard input ends. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import subprocess
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any

START_S = 120.0
"""Seconds that a process may take to import its libraries on a busy machine."""
WALLS = 10
"""A verifier may take so many times its processor time by the clock."""
KEPT = ("PATH", "PYTHONPATH", "HOME", "LANG", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
"""Environment variables that a process sees."""


@cache
def maker(*command: str) -> Maker:
    """The one that tasks of the same kind and settings share."""
    return Maker(command)


class Maker:
    """Makes problems, one after the other, for any thread."""

    def __init__(self, command: Sequence[str]) -> None:
        """`command` starts a process of `verifier_child`, which happens with the first problem."""
        self._command = command
        self._child: subprocess.Popen[bytes] | None = None
        self._turn = threading.Lock()

    def entry(self, number: int) -> dict[str, Any]:
        """`question` and `answer` of a number, and the `program` that solves it (`gym_programs`),
        null where there is none. RuntimeError if the process fails."""
        with self._turn:
            return self._asked(number)

    def _asked(self, number: int) -> dict[str, Any]:
        if self._child is None:
            self._child = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=_environment(),
                start_new_session=True,
            )
            weakref.finalize(self, self._child.kill)
            self._child.stdout.readline()  # type: ignore[union-attr]
        pipes = self._child.stdin, self._child.stdout
        assert pipes[0] is not None and pipes[1] is not None
        try:
            pipes[0].write(json.dumps({"number": number}).encode() + b"\n")
            pipes[0].flush()
            made: dict[str, Any] = json.loads(pipes[1].readline())
        except (BrokenPipeError, ValueError):
            raise RuntimeError(f"no problem: `{shlex.join(self._command)}` says why") from None
        return made


class Verifiers:
    """At most `processes` at once; answers beyond that wait, outside their time."""

    def __init__(
        self,
        command: Sequence[str],
        processes: int,
        cpu_s: float,
    ) -> None:
        """`command` starts a process of `verifier_child` with that much processor time. Nothing is
        started before the first answer."""
        self._command = command
        self._cpu_s = cpu_s
        self._room = asyncio.Semaphore(processes)
        self._free: list[asyncio.subprocess.Process] = []

    async def score(self, number: int, answer: str) -> float | None:
        """What the verifier gives for an answer to the problem of that number. An answer that takes
        all the processor time, or ends the process, is wrong: 0. None if the verifier crashed, ran
        out of memory, or got no time from the machine."""
        async with self._room:
            child = self._free.pop() if self._free else await self._started()
            try:
                said = await self._ask(child, {"number": number, "answer": answer})
            except BaseException:
                child.kill()
                raise
            if said is not None:
                self._free.append(child)
                value: float | None = said["value"]
                return value
            with suppress(ProcessLookupError):
                child.kill()
            ended = await child.wait()
            return 0.0 if ended == -signal.SIGPROF or ended >= 0 else None

    async def _started(self) -> asyncio.subprocess.Process:
        """A process that is ready. RuntimeError if it cannot start: a broken installation."""
        child = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=_environment(),
            start_new_session=True,  # Ctrl-C is for the trainer, which may still want verdicts
        )
        if await self._line(child, START_S) != b"ready\n":
            child.kill()
            raise RuntimeError(f"a verifier did not start: `{shlex.join(self._command)}` says why")
        return child

    async def _ask(
        self, child: asyncio.subprocess.Process, request: dict[str, Any]
    ) -> dict[str, Any] | None:
        """The process's reply; None once it is of no more use."""
        assert child.stdin is not None
        try:
            child.stdin.write(json.dumps(request).encode() + b"\n")
            await child.stdin.drain()
        except (BrokenPipeError, ConnectionResetError):
            return None
        line = await self._line(child, WALLS * self._cpu_s)
        reply: dict[str, Any] | None = json.loads(line) if line.endswith(b"\n") else None
        return reply

    async def _line(self, child: asyncio.subprocess.Process, timeout_s: float) -> bytes:
        """One line; less if the process died, nothing at the time limit."""
        assert child.stdout is not None
        try:
            async with asyncio.timeout(timeout_s):
                return await child.stdout.readline()
        except TimeoutError:
            return b""


def _environment() -> dict[str, str]:
    """What a process sees. With this hash seed a number always gives the same problem."""
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    return kept | {"PYTHONHASHSEED": "0"}
