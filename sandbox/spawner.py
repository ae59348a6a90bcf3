"""The spawner: a small, clean, single-threaded process that forks the sessions of one host.

It was exec'd with an environment of its own, so it holds nothing worth stealing; its forks inherit
its imports and nothing else. It serves one supervisor over a sequenced-packet socket and never
reads a byte from a session. When the supervisor goes (its channel ends; SIGTERM by PDEATHSIG), it
ends all sessions, removes their folders and ends. When it goes itself, the kernel kills them.
"""

from __future__ import annotations

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

from sandbox import runner, workdir
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
from sandbox.probe import OPTIONAL_WHEN_DEGRADED, probe, wall_off

SUPERVISOR_FD = 3
"""Fixed, so that no descriptor received later collides with a session's numbers 0 to 3."""

MAX_MESSAGE_BYTES = 1 << 16
_COMMON_IMPORTS = (
    "cmath collections copy dataclasses datetime decimal enum fractions functools heapq itertools "
    "json math operator random re statistics string typing"
)
"""Cheap and often used, so no session pays for them."""
_RECOUNT_S = 5.0
_REFUSED_STATUS = 71


class Spawner:
    """Forks sessions on request and reports their ends."""

    def __init__(self, supervisor: socket.socket, confinement: Confinement, root: str) -> None:
        self._supervisor = supervisor
        self._confinement = confinement
        self._root = root
        self._poll = select.poll()
        self._sessions: dict[int, tuple[int, int]] = {}
        """Session number and pidfd by process id, of those not reaped yet."""
        self._tasks = (0, float("-inf"))

    def serve(self) -> None:
        """Until the supervisor hangs up."""
        self._poll.register(self._supervisor, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in self._poll.poll()}
            if ready - {SUPERVISOR_FD}:
                self._reap()
            if SUPERVISOR_FD in ready and not self._answer():
                return

    def end_all(self) -> None:
        """Kill and reap every session, remove their folders."""
        for pid in self._sessions:
            os.kill(pid, signal.SIGKILL)
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
        session = json.loads(data)["open"]
        try:
            pidfd = self._open(session, descriptors)
        except (OSError, LayerError) as error:
            self.say(refused=session, why=str(error))
        else:
            self.say(pidfd, opened=session)
        for descriptor in descriptors:
            os.close(descriptor)
        return True

    def _open(self, session: int, descriptors: list[int]) -> int:
        """Fork a session; `descriptors` are its stdin, stdout, stderr and control channel.

        Its pidfd: process ids mean nothing to the supervisor, outside the namespaces.
        """
        uid = self._confinement.uid(session)
        folder = os.path.join(self._root, str(session))
        os.mkdir(folder, 0o700)
        if uid != os.getuid():
            os.chown(folder, uid, uid)
        ruleset = self._confinement.ruleset(folder)
        berth = Berth(
            folder=folder,
            descriptors=tuple(descriptors),
            uid=uid,
            tasks=self._allowed_tasks(uid),
            ruleset=ruleset,
        )
        try:
            pid = os.fork()
            if pid == 0:
                _become_session(self._confinement, berth)
        finally:
            if ruleset is not None:
                os.close(ruleset)
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            os.kill(pid, signal.SIGKILL)
            raise
        self._sessions[pid] = (session, pidfd)
        self._poll.register(pidfd, select.POLLIN)
        return pidfd

    def _allowed_tasks(self, uid: int) -> int:
        """RLIMIT_NPROC counts all of a user's threads: those of others on top of our own."""
        if self._confinement.plan.own_uid or self._confinement.plan.own_user_namespace:
            return self._confinement.limits.threads
        now = time.monotonic()
        if now - self._tasks[1] > _RECOUNT_S:
            self._tasks = (tasks_of(uid), now)
        return self._tasks[0] + self._confinement.limits.threads

    def _reap(self, block: bool = False) -> None:
        """Collect the dead, killing first whatever their process group still holds."""
        while True:
            flags = os.WEXITED | os.WNOWAIT | (0 if block else os.WNOHANG)
            try:
                dead = os.waitid(os.P_ALL, 0, flags)
            except ChildProcessError:
                return
            if dead is None:
                return
            pid, block = dead.si_pid, False
            known = self._sessions.pop(pid, None)
            if known:
                with suppress(ProcessLookupError):  # died before it led a group
                    os.killpg(pid, signal.SIGKILL)
            _, status, usage = os.wait4(pid, 0)
            if known:
                session, pidfd = known
                self._poll.unregister(pidfd)
                os.close(pidfd)
                self._sweep()
                self.say(ended=session, status=status, cpu_s=usage.ru_utime + usage.ru_stime)

    def _sweep(self) -> None:
        """Kill orphans that came to us, the subreaper: children that are no session."""
        me = os.getpid()
        try:
            with open(f"/proc/{me}/task/{me}/children", encoding="ascii") as file:
                children = [int(word) for word in file.read().split()]
        except FileNotFoundError:  # a kernel without CONFIG_PROC_CHILDREN
            return
        for pid in children:
            if pid not in self._sessions:
                os.kill(pid, signal.SIGKILL)


def _become_session(confinement: Confinement, berth: Berth) -> None:
    """The forked side: confine, then serve cells. Never returns."""
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            confinement.enter(berth)
        except LayerError as failed:
            os.dup2(berth.descriptors[runner.CONTROL_FD], runner.CONTROL_FD)
            runner.say_start(str(failed))
            os._exit(_REFUSED_STATUS)
        gc.enable()
        runner.serve(confinement.limits.output_kib << 10)
    finally:
        os._exit(_REFUSED_STATUS)


def _import(names: list[str]) -> None:
    """Once here, so that no session has to."""
    for name in names:
        importlib.import_module(name)
    if "numpy" in sys.modules:
        importlib.import_module("numpy.random")  # lazy, and seeded at the start of each session


def main() -> None:
    """Read the job from the supervisor, find out what can be enforced, serve."""
    adopt_orphans()
    os.dup2(int(sys.argv[2]), SUPERVISOR_FD, inheritable=False)
    if int(sys.argv[2]) != SUPERVISOR_FD:
        os.close(int(sys.argv[2]))
    sys.argv[:] = [""]
    supervisor = socket.socket(fileno=SUPERVISOR_FD)
    job = json.loads(supervisor.recv(MAX_MESSAGE_BYTES))

    def hang_up(*_: object) -> None:
        with suppress(OSError):
            supervisor.shutdown(socket.SHUT_RDWR)  # `serve` then ends as if the other side had

    signal.signal(signal.SIGTERM, hang_up)
    die_with_parent(job["supervisor"], signal.SIGTERM)
    outer = os.getpid()
    unwalled = wall_off(job["packages"], job["root"])
    sys.path[:] = [*(path for path in sys.path if path != job["source"]), *job["packages"], ""]
    _import([*_COMMON_IMPORTS.split(), *job["preload"]])
    confinement, problems = probe(
        Limits(**job["limits"]), job["packages"], job["root"], walled=unwalled is None, crowd=outer
    )
    plan = confinement.plan
    can_run = all(problem.layer in OPTIONAL_WHEN_DEGRADED for problem in problems)
    enough = TIERS.index(plan.tier) <= TIERS.index(job["isolation"])
    runs = can_run and (job["allow_degraded"] or enough)
    spawner = Spawner(supervisor, confinement, job["root"])
    layers = [name for name in OPTIONAL_WHEN_DEGRADED if name not in plan.missing]
    lacking = [*problems, *([unwalled] if unwalled else [])]
    spawner.say(
        ready=runs,
        isolation=plan.tier,
        layers=[*(["namespaces"] if plan.walled else []), *layers],
        problems=[str(problem) for problem in lacking],
    )
    gc.collect()
    gc.disable()
    gc.freeze()
    try:
        if runs:
            spawner.serve()
    finally:
        spawner.end_all()
