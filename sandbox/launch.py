"""The supervisor's side of the spawner: start it, ask it for processes, learn of their ends."""

from __future__ import annotations

import asyncio
import errno
import json
import math
import os
import secrets
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sandbox import bubblewrap
from sandbox.channels import Ends
from sandbox.confine import DEVICES, readable
from sandbox.endings import End, Tampered
from sandbox.inspection import Sight, ids_of
from sandbox.limits import Limits
from sandbox.process import SessionProcess
from sandbox.results import SandboxFailure, SandboxUnavailable
from sandbox.shortage import explained
from sandbox.workdir import TreeFolder, aside, remove

_SOURCE = str(Path(__file__).resolve().parent.parent)
_START = "import sys; sys.path.append(sys.argv[1]); from sandbox.spawner import main; main()"
_ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # or `import pandas` leaves a thread
    "MPLBACKEND": "Agg",
    "MALLOC_ARENA_MAX": "1",  # an arena a thread takes 64 MiB of address space, mostly for nothing
}
"""All that code in a session finds in its environment, besides HOME and TMPDIR."""
_MAX_MESSAGE_BYTES = 1 << 16
_START_S = 120.0
_REMOVED_S = (0.0, 0.01, 0.1, 0.5, 2.0)
"""Waits before a dead spawner's folder is removed, again and again until it is gone."""
_ANSWER_S = 30.0
_IN_MEMORY, _ROOM_BYTES = "/dev/shm", 1 << 30
_MAX_ASKED = 8
"""Requests under way at once; the spawner serves them one by one anyway."""
_NO_DESCRIPTOR = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
_EARLY_S, _MAX_EARLY = 60.0, 256
"""How long, and how many, ends of processes are remembered that nobody knows yet."""


Opened = tuple[int, list[str], int]
"""What opening a tree returns: the spawner's id of the first process, work folders, pidfd."""


class SpawnerClient:
    """A running spawner process. Made by `start`; belongs to one event loop."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        channel: socket.socket,
        root: str,
        limits: Limits,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._process = process
        self._channel = channel
        self.root = root
        """The folder that holds the work folders of all trees."""
        self.max_threads, self.max_descriptors = limits.threads, limits.open_files
        self._max_file_bytes = limits.file_mib << 20
        self._next = 0
        self._ready: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._turn = asyncio.Semaphore(_MAX_ASKED)
        self._asked: dict[int, asyncio.Future[Opened]] = {}
        self._live: dict[int, SessionProcess] = {}
        """Processes by the process id that the spawner knows."""
        self._early: dict[int, tuple[float, End]] = {}
        """Ends, and when they were heard of, of processes that are not known yet."""
        self.bereaved: dict[int, Callable[[int, End], None]] = {}
        """Told of the end of a process that is not known, by the spawner's id of its family."""
        self._folders = -1
        """The folder of all work folders as the sessions see it, through their own mounts."""
        self.alive = True
        self.isolation = ""
        """The tier in force, see `sandbox.confine.TIERS`; empty until started."""
        self.layers: tuple[str, ...] = ()
        """The kernel layers in force."""
        self._loop.add_reader(channel, self._on_message)

    @classmethod
    async def start(
        cls,
        limits: Limits,
        preload: tuple[str, ...],
        *,
        isolation: str,
        allow_degraded: bool,
        bubblewrap: bool,
    ) -> SpawnerClient:
        """Start a spawner and let it probe. Raises SandboxUnavailable or SandboxFailure."""
        try:
            return await cls._start(limits, preload, isolation, allow_degraded, bubblewrap)
        except OSError as error:
            raise SandboxFailure(f"no spawner: {explained(error)}") from error

    @classmethod
    async def _start(
        cls,
        limits: Limits,
        preload: tuple[str, ...],
        isolation: str,
        allow_degraded: bool,
        bubblewrap: bool,
    ) -> SpawnerClient:
        root = os.path.realpath(tempfile.mkdtemp(prefix="sandbox-", dir=_quick_folder()))
        os.chmod(root, 0o711)  # sessions of other users pass through, without listing
        paths = sysconfig.get_paths()
        packages = sorted({paths["purelib"], paths["platlib"]})
        try:
            outside = _bubblewrap(packages, root) if bubblewrap else []
            process, ours = _execute(outside)
        except BaseException:
            remove(root)
            raise
        client = cls(process, ours, root, limits)
        job = {
            "supervisor": os.getpid(),
            "crowd": process.pid,
            "walled": bubblewrap,
            "source": _SOURCE,
            "packages": packages,
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
        if "unimportable" in said:
            await client.close()
            raise SandboxUnavailable(
                f"preload: sessions cannot import {said['unimportable']}; install it where this "
                "Python has its packages, or leave it out"
            )
        client.isolation, client.layers = said["isolation"], tuple(said["layers"])
        if not said["ready"]:
            await client.close()
            problems = "\n".join(f"- {problem}" for problem in said["problems"])
            raise SandboxUnavailable(
                f"this machine cannot isolate code to the tier {isolation!r}:\n{problems}\n"
                "allow_degraded=True runs with less, for code you trust only"
            )
        return client

    async def spawn(self, folders: int) -> tuple[SessionProcess, TreeFolder]:
        """The first process of a new tree and the tree's folder, with so many work folders in it.

        Raises SandboxFailure.
        """
        self._next += 1
        session = self._next
        tree = os.path.join(self.root, secrets.token_hex(8))
        try:
            ends = Ends()
        except OSError as error:
            raise SandboxFailure(f"no session: {explained(error)}") from error
        process = SessionProcess(ends, tree)
        try:
            async with self._turn:
                inner, names, pidfd = await self._ask(session, tree, folders, ends)
            process.identify(ids_of(pidfd)[0], inner, pidfd)
            self._follow(process)
            await process.started()
            process.pause()
            folder = TreeFolder(tree, names)
            process.folder = os.path.join(folder.path, names[0])
            return process, folder
        except BaseException as error:
            await process.close()
            await aside(remove, tree)
            if isinstance(error, OSError):  # its folder may be gone with its spawner
                raise SandboxFailure(f"no session: {explained(error)}") from error
            raise

    def adopt(self, branch: SessionProcess, pid: int, first: SessionProcess) -> None:
        """Take the process `pid`, which waits for an answer, for a branch of `first`'s family.

        Raises OSError, and Tampered if it cannot be one.
        """
        pidfd = os.pidfd_open(pid)
        try:
            here, inner = ids_of(pidfd)
            while inner in self._live and self._on_message():  # an end that frees a process id
                pass
            if here != pid or os.getsid(pid) != first.pid or inner in self._live:
                raise Tampered("somebody else came for a branch")
        except BaseException:
            os.close(pidfd)
            raise
        self._early.pop(inner, None)
        self._live[inner] = branch
        branch.identify(pid, inner, pidfd)
        if not self.alive:  # nobody would report its end
            self._on_ended(inner, End(None))

    def open_folder(self, path: str) -> int:
        """A descriptor of a work folder for the process that works in it. Raises OSError."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        return os.open(path.removeprefix(f"{self.root}/"), flags, dir_fd=self._folders)

    def sight(self, pid: int, *, count: bool = False, weigh: bool = False) -> Sight:
        """Look at a process of a session, see `Sight.of`; `count`: ask for `nameless` as well.

        Raises Unseen, OSError as `Sight.of` does."""
        return Sight.of(pid, self.root, largest=count * self._max_file_bytes, weigh=weigh)

    def kill_tree(self, first: SessionProcess) -> None:
        """Have every process of a tree killed, named by its first one."""
        if self.alive and first.inner_pid > 0:
            with suppress(OSError):  # then it is going to die with all its trees
                self._channel.send(json.dumps({"kill": first.inner_pid}).encode())

    def _follow(self, process: SessionProcess) -> None:
        heard, end = self._early.pop(process.inner_pid, (-math.inf, End(None)))
        self._live[process.inner_pid] = process
        if not self.alive or time.monotonic() - heard < _EARLY_S:
            self._on_ended(process.inner_pid, end)

    async def _ask(self, session: int, tree: str, folders: int, ends: Ends) -> Opened:
        """Have a process forked, and the folder `tree` made for it."""
        answer: asyncio.Future[Opened] = self._loop.create_future()
        self._asked[session] = answer
        try:
            if not self.alive:
                raise SandboxFailure("the spawner died")
            request = json.dumps({"open": session, "tree": tree, "folders": folders}).encode()
            socket.send_fds(self._channel, [request], ends.given)
            async with asyncio.timeout(_ANSWER_S):
                return await answer
        except TimeoutError:
            raise SandboxFailure("no session: the spawner did not answer in time") from None
        except OSError as error:
            raise SandboxFailure(f"no session: {explained(error)}") from error
        finally:
            ends.sent()
            del self._asked[session]

    async def close(self) -> None:
        """End the spawner, and with it all its sessions, and wait until both are gone."""
        self._lose("the sandbox was closed")
        self._channel.close()
        if self._folders >= 0:
            os.close(self._folders)
            self._folders = -1
        try:
            await aside(self._process.wait, _ANSWER_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await aside(self._process.wait)
        for wait_s in _REMOVED_S:  # while the last processes end
            if not os.path.exists(self.root):
                break
            await asyncio.sleep(wait_s)
            await aside(remove, self.root)

    def _lose(self, why: str) -> None:
        """End all waits for a spawner that is gone."""
        if not self.alive:
            return
        self.alive = False
        self._loop.remove_reader(self._channel)
        waiting: list[asyncio.Future[Any]] = [self._ready, *self._asked.values()]
        for future in waiting:
            if not future.done():
                future.set_exception(SandboxFailure(why))
        for inner in list(self._live):
            self._on_ended(inner, End(None))

    def _on_ended(self, inner: int, end: End, family: int = -1) -> None:
        process = self._live.pop(inner, None)
        if process is None and family in self.bereaved and family != inner:
            self.bereaved[family](inner, end)
        elif process is None:
            while len(self._early) >= _MAX_EARLY:
                del self._early[next(iter(self._early))]
            self._early[inner] = (time.monotonic(), end)
        elif not process.end.done():
            process.end.set_result(end)

    def _on_message(self) -> bool:
        """Take one message; whether there was one."""
        if not self.alive:
            return False
        try:
            data, pidfds, _, _ = socket.recv_fds(self._channel, _MAX_MESSAGE_BYTES, 1)
        except BlockingIOError:
            return False
        except OSError:
            data, pidfds = b"", []
        if not data:
            self._lose("the spawner died")
            return False
        message = json.loads(data)
        if "ready" in message:
            self._folders = pidfds[0] if pidfds else -1
            if not self._ready.done():
                self._ready.set_result(message)
        elif "ended" in message:
            end = End(message["status"], message["cpu_s"])
            self._on_ended(message["ended"], end, message["family"])
        elif "refused" in message:
            self._refuse(message["refused"], message["why"])
        elif "failed" in message:
            self._lose(f"no spawner: {message['failed']}")
            return False
        elif not pidfds:  # it ends by itself, since its control channel is going to be closed
            self._refuse(message["opened"], explained(_NO_DESCRIPTOR))
        else:
            self._on_opened(message["opened"], (message["pid"], message["folders"], pidfds[0]))
        return True

    def _refuse(self, session: int, why: str) -> None:
        waiting = self._asked.get(session)
        if waiting is not None and not waiting.done():
            waiting.set_exception(SandboxFailure(f"no session: {why}"))

    def _on_opened(self, session: int, opened: Opened) -> None:
        waiting = self._asked.get(session)
        if waiting is not None and not waiting.done():
            waiting.set_result(opened)
        else:  # nobody waits any longer: its control channel hung up, so it ends by itself
            os.close(opened[2])


def _quick_folder() -> str | None:
    """Where to put work folders: in memory, if nobody chose a folder for temporary files and there
    is room. A disk can take a millisecond to make a folder, and each tree has many."""
    if tempfile.tempdir is not None or "TMPDIR" in os.environ:
        return None
    try:
        room = os.statvfs(_IN_MEMORY)
    except OSError:
        return None
    enough = room.f_bavail * room.f_frsize >= _ROOM_BYTES
    return _IN_MEMORY if enough and os.access(_IN_MEMORY, os.W_OK | os.X_OK) else None


def _bubblewrap(packages: list[str], root: str) -> list[str]:
    source = os.path.join(_SOURCE, "sandbox")
    return bubblewrap.command([*readable(packages), source], DEVICES, root)


def _execute(outside: list[str]) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Exec the spawner, by the command `outside` if there is one, with a clean environment and
    a channel, of which our end is returned. Raises OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [*outside, sys.executable, "-S", "-s", "-P", "-B", "-c", _START, _SOURCE]
        command.append(str(theirs.fileno()))
        try:
            process = subprocess.Popen(
                command,
                env=_ENVIRONMENT,
                cwd="/",
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            raise
    ours.setblocking(False)
    return process, ours
