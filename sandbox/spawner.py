"""The spawner: a small, clean, single-threaded process that forks the sessions of one host.

It was exec'd with an environment of its own, so it holds nothing worth stealing; its forks inherit
its imports and nothing else. It serves one supervisor over a sequenced-packet socket and never
reads a byte from a session. When the supervisor goes (its channel ends; SIGTERM by PDEATHSIG), it
ends all sessions, removes their folders and ends. When it goes itself, the kernel kills them.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from typing import Any

from sandbox import pages, runner, workdir
from sandbox.confine import (
    TIERS,
    Berth,
    Confinement,
    LayerError,
    adopt_orphans,
    die_with_parent,
    tasks_of,
)
from sandbox.limits import Limits
from sandbox.probe import OPTIONAL_WHEN_DEGRADED, look_around, probe, wall_off
from sandbox.shortage import explained
from sandbox.wire import CONTROL_FD, LISTENER_MARKS, WORK_FD
from sandbox.workdir import make_folders

SUPERVISOR_FD = 3
"""Fixed, so that no descriptor received later collides with a session's numbers 0 to 4."""

MAX_MESSAGE_BYTES = 1 << 16
_COMMON_IMPORTS = (
    "cmath collections copy dataclasses datetime decimal enum fractions functools heapq itertools "
    "json math operator random re statistics string typing"
)
"""Cheap and often used, so no session pays for them."""
_WARM_UP = {
    "sympy": "from sympy import *\nx, y = symbols('x y')\n"
    "solve(x**2 - 5*x + 6, x), solve([x + y - 3, x - y - 1], [x, y]), factor(x**2 - 1)\n"
    "simplify(sin(x)**2 + cos(x)**2), diff(sin(x), x), integrate(x**2, (x, 0, 1)), N(sqrt(2))",
}
"""Modules that load and cache much only once they are used."""
_RECOUNT_S = 5.0
_REFUSED_STATUS = 71
_LIBC, _SA_NOCLDSTOP = ctypes.CDLL(None), 1
_TASKS_OF_OTHER_TREES = 512
"""Allowance where all trees share one user."""


class Spawner:
    """Forks the first process of each tree on request; reports the end of every process.

    Those that a tree forks later are children of this process too (CLONE_PARENT)."""

    def __init__(self, supervisor: socket.socket, confinement: Confinement, root: str) -> None:
        self._supervisor = supervisor
        self._confinement = confinement
        self._root = root
        self._sessions: dict[int, int] = {}
        """Number by process id of the first processes that are not reaped yet: each leads the
        process group of its tree, and keeps the group's number from being used again."""
        self._tasks = (0, float("-inf"))

    def serve(self) -> None:
        """Until the supervisor hangs up."""
        poll = select.poll()
        reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        _hear_of_ends()
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for descriptor in (SUPERVISOR_FD, reading):
            poll.register(descriptor, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll()}
            if reading in ready:
                os.read(reading, MAX_MESSAGE_BYTES)
                self._reap()
            if SUPERVISOR_FD in ready and not self._answer():
                return

    def end_all(self) -> None:
        """Kill and reap every session, remove their folders."""
        for pid in list(self._sessions):
            self._kill(pid)
        while self._sessions:
            self._reap(block=True)
        workdir.remove(self._root)

    def say(self, *pidfd: int, **message: Any) -> None:
        """Send one message to the supervisor."""
        try:
            socket.send_fds(self._supervisor, [json.dumps(message).encode()], pidfd)
        except BrokenPipeError:
            return  # the supervisor is gone: the next read says so

    def _answer(self) -> bool:
        """Serve one request; False when the supervisor hung up."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._supervisor, MAX_MESSAGE_BYTES, 4)
        except ConnectionError:
            return False
        if not data:
            return False
        message = json.loads(data)
        if "kill" in message:
            self._kill(message["kill"])
            return True
        session = message["open"]
        try:
            pid, pidfd, folders = self._open(
                session, message["tree"], message["folders"], descriptors
            )
        except OSError as error:
            self.say(refused=session, why=explained(error))
        except LayerError as failed:
            self.say(refused=session, why=f"{failed.layer}: {explained(failed.error)}")
        else:
            self.say(pidfd, opened=session, pid=pid, folders=folders)
            os.close(pidfd)
        for descriptor in descriptors:
            os.close(descriptor)
        return True

    def _open(
        self, session: int, tree: str, num_folders: int, descriptors: list[int]
    ) -> tuple[int, int, list[str]]:
        """Fork the first process of a tree, with the folder `tree`; `descriptors` are its stdin,
        stdout, stderr and control channel.

        Its process id as it is seen here, its pidfd, which means the same everywhere, and the
        names of the tree's work folders, the first one in use.
        """
        uid = self._confinement.uid(session)
        try:
            names = make_folders(tree, num_folders, None if uid == os.getuid() else uid)
        except OSError:
            workdir.remove(tree)
            raise
        paths = [os.path.join(tree, name) for name in names]
        limits = self._confinement.limits
        kept = 2 * limits.snapshots  # those given up take their time to end
        working = os.open(paths[0], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        ruleset = self._confinement.ruleset(paths)
        berth = Berth(
            folder=paths[0],
            descriptors=(*descriptors, working),
            uid=uid,
            tasks=self._other_tasks(uid) + limits.threads + kept,
            tasks_of_branches=limits.threads * kept,
            ruleset=ruleset,
        )
        try:
            pid = os.fork()
            if pid == 0:
                _become_session(self._confinement, berth)
        finally:
            os.close(working)
            if ruleset is not None:
                os.close(ruleset)
        self._sessions[pid] = session
        return pid, os.pidfd_open(pid), names

    def _other_tasks(self, uid: int) -> int:
        """RLIMIT_NPROC counts all of a user's threads: those that are not of one tree."""
        if self._confinement.plan.own_uid or self._confinement.plan.own_user_namespace:
            return 0
        now = time.monotonic()
        if now - self._tasks[1] > _RECOUNT_S:
            self._tasks = (tasks_of(uid), now)
        return self._tasks[0] + _TASKS_OF_OTHER_TREES

    def _kill(self, pid: int) -> None:
        """End a whole tree, named by its first process."""
        if pid in self._sessions:
            with suppress(ProcessLookupError):  # it does not lead a group yet
                os.killpg(pid, signal.SIGKILL)
            os.kill(pid, signal.SIGKILL)

    def _reap(self, block: bool = False) -> None:
        """Collect the dead; with the first process of a tree dies the rest of it."""
        while True:
            flags = os.WEXITED | os.WNOWAIT | (0 if block else os.WNOHANG)
            try:
                dead = os.waitid(os.P_ALL, 0, flags)
            except ChildProcessError:
                return
            if dead is None:
                return
            pid, block = dead.si_pid, False
            family = os.getsid(pid)
            self._kill(pid)
            first = self._sessions.pop(pid, None) is not None
            _, status, usage = os.wait4(pid, 0)
            if first:
                self._sweep()
            cpu_s = usage.ru_utime + usage.ru_stime
            self.say(ended=pid, family=family, status=status, cpu_s=cpu_s)

    def _sweep(self) -> None:
        """Kill orphans that came to us, the subreaper, out of every group that we know."""
        me = os.getpid()
        known = {*self._sessions, os.getpgid(0)}
        try:
            with open(f"/proc/{me}/task/{me}/children", encoding="ascii") as file:
                children = [int(word) for word in file.read().split()]
        except FileNotFoundError:  # a kernel without CONFIG_PROC_CHILDREN
            return
        for pid in children:
            if os.getpgid(pid) not in known:
                os.kill(pid, signal.SIGKILL)


def _become_session(confinement: Confinement, berth: Berth) -> None:
    """The forked side: confine, then serve cells. Never returns."""
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        try:
            confinement.enter(berth, announce=_hand_over)
        except LayerError as failed:
            os.dup2(berth.descriptors[CONTROL_FD], CONTROL_FD)
            runner.say_start(str(failed))
            os._exit(_REFUSED_STATUS)
        gc.enable()
        runner.serve(confinement.limits.output_kib << 10)
    finally:
        os._exit(_REFUSED_STATUS)


def _hand_over(listener: int, undisturbed: bool) -> None:
    """Leave the decision about step forks to the supervisor."""
    with socket.socket(fileno=os.dup(CONTROL_FD)) as control:
        socket.send_fds(control, [LISTENER_MARKS[undisturbed]], [listener])


def _hear_of_ends() -> None:
    """Have the kernel wake this process up when a child ends, but not when one is stopped or goes
    on, which happens many times a call."""
    signal.signal(signal.SIGCHLD, lambda *_: None)
    action = _Action()
    _LIBC.sigaction(int(signal.SIGCHLD), None, ctypes.byref(action))
    action.flags |= _SA_NOCLDSTOP
    _LIBC.sigaction(int(signal.SIGCHLD), ctypes.byref(action), None)


class _Action(ctypes.Structure):
    """C's `struct sigaction`."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


class Unimportable(Exception):
    """A module that sessions are to find imported cannot be."""


def _import(names: list[str]) -> None:
    """Once here, so that no session has to. Raises Unimportable."""
    for name in names:
        try:
            importlib.import_module(name)
            exec(_WARM_UP.get(name, ""), {})
        except BaseException as error:  # code of the module
            raise Unimportable(f"{name!r}: {type(error).__name__}: {error}") from error
    if "numpy" in sys.modules:
        importlib.import_module("numpy.random")  # lazy, and seeded at the start of each session
    if "tempfile" in sys.modules:
        vars(sys.modules["tempfile"])["tempdir"] = None  # each session has a place of its own


def main() -> None:
    """Read the job from the supervisor, find out what can be enforced, serve."""
    adopt_orphans()
    os.dup2(int(sys.argv[2]), SUPERVISOR_FD, inheritable=False)
    if int(sys.argv[2]) != SUPERVISOR_FD:
        os.close(int(sys.argv[2]))
    os.dup2(0, WORK_FD, inheritable=False)  # keeps the number from being given to anything else
    sys.argv[:] = [""]
    supervisor = socket.socket(fileno=SUPERVISOR_FD)
    try:
        _serve(supervisor, json.loads(supervisor.recv(MAX_MESSAGE_BYTES)))
    except OSError as error:
        with suppress(OSError):
            supervisor.send(json.dumps({"failed": explained(error)}).encode())
        raise SystemExit(1) from None  # all is said


def _serve(supervisor: socket.socket, job: dict[str, Any]) -> None:
    def hang_up(*_: object) -> None:
        with suppress(OSError):
            supervisor.shutdown(socket.SHUT_RDWR)  # `serve` then ends as if the other side had

    signal.signal(signal.SIGTERM, hang_up)
    if job["walled"]:
        os.environ.pop("PWD", None)  # bubblewrap's
        unwalled = look_around()
    else:
        die_with_parent(job["supervisor"], signal.SIGTERM)
        unwalled = wall_off(job["packages"], job["root"])
    sys.path[:] = [*(path for path in sys.path if path != job["source"]), *job["packages"], ""]
    os.environ.update(
        HOME=job["root"], TMPDIR=job["root"]
    )  # some modules want a place of their own
    try:
        _import([*_COMMON_IMPORTS.split(), *job["preload"]])
    except Unimportable as unimportable:
        supervisor.send(json.dumps({"ready": False, "unimportable": str(unimportable)}).encode())
        return
    confinement, problems = probe(
        Limits(**job["limits"]),
        job["packages"],
        job["root"],
        walled=unwalled is None,
        crowd=job["crowd"],
    )
    plan = confinement.plan
    can_run = all(problem.layer in OPTIONAL_WHEN_DEGRADED for problem in problems)
    enough = TIERS.index(plan.tier) <= TIERS.index(job["isolation"])
    runs = can_run and (job["allow_degraded"] or enough)
    spawner = Spawner(supervisor, confinement, job["root"])
    layers = [name for name in OPTIONAL_WHEN_DEGRADED if name not in plan.missing]
    lacking = [*problems, *([unwalled] if unwalled else [])]
    folders = os.open(job["root"], os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    spawner.say(
        folders,
        ready=runs,
        isolation=plan.tier,
        layers=[*(["namespaces"] if plan.walled else []), *layers],
        problems=[str(problem) for problem in lacking],
    )
    os.close(folders)
    gc.collect()
    gc.disable()
    gc.freeze()
    pages.put_together()
    try:
        if runs:
            spawner.serve()
    finally:
        spawner.end_all()
