"""The supervisor's side of the spawner: start it, ask it for sessions, hear of their ends."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sandbox.limits import Limits
from sandbox.process import End, SessionProcess
from sandbox.results import SandboxFailure, SandboxUnavailable
from sandbox.workdir import remove

_SOURCE = str(Path(__file__).resolve().parent.parent)
_START = "import sys; sys.path.append(sys.argv[1]); from sandbox.spawner import main; main()"
_ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
"""All that code in a session finds in its environment, besides HOME and TMPDIR."""
_MAX_MESSAGE_BYTES = 1 << 16
_START_S = 120.0
_ANSWER_S = 30.0
_MAX_ASKED = 8
"""Requests under way at once; the spawner serves them one by one anyway."""


class SpawnerClient:
    """A running spawner process. Made by `start`; belongs to one event loop."""

    def __init__(self, process: subprocess.Popen[bytes], channel: socket.socket, root: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._process = process
        self._channel = channel
        self._root = root
        self._next = 0
        self._ready: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._turn = asyncio.Semaphore(_MAX_ASKED)
        self._asked: dict[int, asyncio.Future[tuple[int, int]]] = {}
        self._live: dict[int, SessionProcess] = {}
        self._early: dict[int, End] = {}
        """Ends heard of before the session's maker went on."""
        self.alive = True
        self.isolation = ""
        """The tier in force, see `sandbox.confine.TIERS`; empty until started."""
        self.layers: tuple[str, ...] = ()
        """The kernel layers in force."""
        self._loop.add_reader(channel, self._on_message)

    @classmethod
    async def start(
        cls, limits: Limits, preload: tuple[str, ...], *, isolation: str, allow_degraded: bool
    ) -> SpawnerClient:
        """Start a spawner and let it probe. Raises SandboxUnavailable or SandboxFailure."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        root = tempfile.mkdtemp(prefix="sandbox-")
        os.chmod(root, 0o711)  # sessions of other users pass through, without listing
        process = _execute(theirs)
        ours.setblocking(False)
        client = cls(process, ours, root)
        paths = sysconfig.get_paths()
        job = {
            "supervisor": os.getpid(),
            "source": _SOURCE,
            "packages": sorted({paths["purelib"], paths["platlib"]}),
            "preload": preload,
            "limits": asdict(limits),
            "root": root,
            "isolation": isolation,
            "allow_degraded": allow_degraded,
        }
        try:
            ours.send(json.dumps(job).encode())
            async with asyncio.timeout(_START_S):
                said = await client._ready
        except TimeoutError:
            await client.close()
            raise SandboxFailure("the spawner did not start in time") from None
        except BaseException:
            await client.close()
            raise
        client.isolation, client.layers = said["isolation"], tuple(said["layers"])
        if not said["ready"]:
            await client.close()
            problems = "\n".join(f"- {problem}" for problem in said["problems"])
            raise SandboxUnavailable(
                f"this machine cannot isolate code to the tier {isolation!r}:\n{problems}\n"
                "allow_degraded=True runs with less, for code you trust only"
            )
        return client

    async def spawn(self) -> SessionProcess:
        """A fresh, confined session process. Raises SandboxFailure."""
        async with self._turn:
            self._next += 1
            session = self._next
            with ExitStack() as ours:
                ends, pid, pidfd = await self._ask(session, ours)
                ours.pop_all()  # from here on they belong to the process
        process = SessionProcess(pid, pidfd, ends, os.path.join(self._root, str(session)))
        self._live[session] = process
        if session in self._early or not self.alive:
            self._on_ended(session, self._early.pop(session, End(None)))
        await process.started()
        return process

    async def _ask(
        self, session: int, ours: ExitStack
    ) -> tuple[tuple[socket.socket, int, int], int, int]:
        """Have a process forked: our ends (closed by `ours`), its pid and pidfd."""
        answer = self._asked[session] = self._loop.create_future()
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.enter_context(control)
        with theirs, ExitStack() as given:
            passed = [os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)]
            given.callback(os.close, passed[0])
            readers = []
            for _ in ("stdout", "stderr"):
                reading, writing = os.pipe()
                ours.callback(os.close, reading)
                given.callback(os.close, writing)
                readers.append(reading)
                passed.append(writing)
            for descriptor in (control.fileno(), *readers):
                os.set_blocking(descriptor, False)
            try:
                if not self.alive:
                    raise SandboxFailure("the spawner died")
                request = json.dumps({"open": session}).encode()
                socket.send_fds(self._channel, [request], [*passed, theirs.fileno()])
                async with asyncio.timeout(_ANSWER_S):
                    pid, pidfd = await answer
            except (OSError, TimeoutError) as error:
                raise SandboxFailure(f"no session from the spawner: {error!r}") from error
            finally:
                del self._asked[session]
        return (control, readers[0], readers[1]), pid, pidfd

    async def close(self) -> None:
        """End the spawner, and with it all its sessions, and wait until both are gone."""
        self._lose("the sandbox was closed")
        self._channel.close()
        try:
            await asyncio.to_thread(self._process.wait, _ANSWER_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
        if os.path.exists(self._root):  # it did not get to do so
            await asyncio.to_thread(remove, self._root)

    def _lose(self, why: str) -> None:
        """The spawner is gone: nobody waits for it any longer."""
        if not self.alive:
            return
        self.alive = False
        self._loop.remove_reader(self._channel)
        waiting: list[asyncio.Future[Any]] = [self._ready, *self._asked.values()]
        for future in waiting:
            if not future.done():
                future.set_exception(SandboxFailure(why))
        for session in list(self._live):
            self._on_ended(session, End(None))

    def _on_ended(self, session: int, end: End) -> None:
        process = self._live.pop(session, None)
        if process is None:
            if session in self._asked:
                self._early[session] = end
        elif not process.end.done():
            process.end.set_result(end)

    def _on_message(self) -> None:
        try:
            data, pidfds, _, _ = socket.recv_fds(self._channel, _MAX_MESSAGE_BYTES, 1)
        except BlockingIOError:
            return
        except OSError:
            data, pidfds = b"", []
        if not data:
            self._lose("the spawner died")
            return
        message = json.loads(data)
        if "ready" in message:
            self._ready.set_result(message)
        elif "ended" in message:
            self._on_ended(message["ended"], End(message["status"], message["cpu_s"]))
        elif "refused" in message:
            waiting = self._asked.get(message["refused"])
            if waiting is not None and not waiting.done():
                waiting.set_exception(SandboxFailure(f"no session: {message['why']}"))
        else:
            self._on_opened(message["opened"], pidfds[0])

    def _on_opened(self, session: int, pidfd: int) -> None:
        waiting = self._asked.get(session)
        if waiting is not None and not waiting.done():
            waiting.set_result((_pid_of(pidfd), pidfd))
        else:  # nobody waits any longer: its control channel hung up, so it ends by itself
            os.close(pidfd)


def _pid_of(pidfd: int) -> int:
    """The process id here, whatever namespace the process is in; -1 once it was reaped."""
    with open(f"/proc/self/fdinfo/{pidfd}", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pid:"))


def _execute(channel: socket.socket) -> subprocess.Popen[bytes]:
    """Exec the spawner, with a clean environment and `channel`."""
    with channel:
        command = [sys.executable, "-S", "-s", "-P", "-B", "-c", _START, _SOURCE]
        command.append(str(channel.fileno()))
        return subprocess.Popen(
            command,
            env=_ENVIRONMENT,
            cwd="/",
            stdin=subprocess.DEVNULL,
            pass_fds=[channel.fileno()],
            start_new_session=True,
        )
