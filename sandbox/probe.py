"""Find out by trying what this machine can enforce.

A forked process is confined like a session and then attacks: it opens a readable file, a socket,
forks, executes. Only what was seen to fail counts as denied; versions are not looked at.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace

from sandbox import namespaces, seccomp
from sandbox.confine import DEVICES, Berth, Confinement, Grants, LayerError, Plan, readable
from sandbox.limits import Limits

OPTIONAL_WHEN_DEGRADED = ("landlock", "seccomp")
"""Layers that `allow_degraded` may do without; the others are needed to run at all."""

REMEDIES = {
    "landlock": "needs Linux 5.13 or newer with Landlock enabled (boot with lsm=landlock,...) and "
    "a container runtime whose seccomp profile lets landlock_* pass (Docker 20.10.13 or newer)",
    "seccomp": "needs a kernel with CONFIG_SECCOMP_FILTER, on x86_64 or aarch64, and a container "
    "runtime that lets prctl(PR_SET_SECCOMP) pass",
    "identity": "run as an ordinary user, or as root with CAP_SETUID and CAP_SETGID",
    "namespaces": "only `strong` needs them: give root CAP_SYS_ADMIN, or let an ordinary user make "
    "user namespaces (sysctl user.max_user_namespaces above 0; on Ubuntu 24.04 sysctl "
    "kernel.apparmor_restrict_unprivileged_userns=0), and in a container run under a seccomp "
    "profile that lets unshare and mount pass and with an unmasked /proc",
    "process": "check the rlimits of the container and that its working directory is writable",
    "notification": "needs Linux 5.5 and that no filter with a listener is in force already (a "
    "container runtime's own); without it every branch is restored by replay",
}
"""What to do where a layer does not hold."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One layer that does not hold here."""

    layer: str
    primitive: str
    errno: int

    def __str__(self) -> str:
        name = errno.errorcode.get(self.errno, str(self.errno))
        return f"{self.layer}: {self.primitive} ({name}); {REMEDIES[self.layer]}"


def _succeeds(attack: Callable[[], object]) -> bool:
    try:
        attack()
    except OSError:
        return False
    return True


def _fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def _execute() -> None:
    """Before the filter's answer the kernel does not even look for the program."""
    try:
        os.execv("/no/such/program", ["program"])
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise


def _attack(canary: str, missing: frozenset[str]) -> Problem | None:
    """The first attack that gets through, or the first need that is not met."""
    if not _succeeds(lambda: os.close(os.open("probe", os.O_RDWR | os.O_CREAT, 0o600))):
        return Problem("process", "write to the session's own folder", errno.EACCES)
    os.unlink("probe")
    if not _succeeds(lambda: os.close(os.open(os.__file__, os.O_RDONLY))):
        return Problem("identity", f"read {os.__file__}", errno.EACCES)
    attacks: list[tuple[str, str, Callable[[], object]]] = [
        ("landlock", "a file outside could be opened", lambda: os.open(canary, os.O_RDONLY)),
        ("seccomp", "a socket could be opened", socket.socket),
        ("seccomp", "a process could be started", _fork),
        ("seccomp", "a program could be executed", _execute),
    ]
    for layer, name, attack in attacks:
        if layer not in missing and _succeeds(attack):
            return Problem(layer, name, 0)
    return None


def _try(confinement: Confinement, canary: str, workdir: str) -> Problem | None:
    """Fork, confine, attack; the problem that came up, if any."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writing, 1)
        try:
            berth = Berth(
                folder=workdir,
                descriptors=(0, 1, 2),
                uid=confinement.uid(0),
                tasks=1 << 20,  # so that a fork can only fail by the filter
                ruleset=confinement.ruleset([workdir]),
            )
            confinement.enter(berth)
            problem = _attack(canary, confinement.plan.missing)
        except LayerError as failed:
            error = failed.error
            problem = Problem(failed.layer, error.strerror or str(error), error.errno or 0)
        os.write(1, json.dumps(astuple(problem) if problem else []).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    if not said:  # a program replaced it, or the filter killed Python itself
        return Problem("seccomp", "the probe process died", 0)
    report = json.loads(said)
    return Problem(*report) if report else None


def _rooms(packages: list[str], root: str) -> tuple[list[str], list[str], str]:
    return readable(packages), [path for path in DEVICES if os.path.exists(path)], root


def namespace_trial(packages: list[str], root: str) -> tuple[bool, OSError | None]:
    """Whether root's privilege makes namespaces here, and why none can be made, if so.

    `root` is the folder to write to.
    """
    rooms = _rooms(packages, root)
    if os.geteuid() == 0 and namespaces.trial(*rooms, privileged=True) is None:
        return True, None
    return False, namespaces.trial(*rooms, privileged=False)


def wall_off(packages: list[str], root: str) -> Problem | None:
    """Move this process into namespaces if they work here; why they do not, otherwise.

    Raises OSError if something was too short to find out."""
    privileged, error = namespace_trial(packages, root)
    if error is not None and error.errno in (errno.EAGAIN, errno.ENOMEM, errno.EMFILE):
        raise error  # they may well work here, once that is no longer short
    if error is not None:
        return Problem("namespaces", error.strerror or str(error), error.errno or 0)
    namespaces.enter(*_rooms(packages, root), privileged=privileged)
    return None


def look_around() -> Problem | None:
    """Whether the walls that others put around this process leave anything in sight."""
    try:
        namespaces.look_around()
    except OSError as error:
        return Problem("namespaces", error.strerror or str(error), error.errno or 0)
    return None


def _plans(walled: bool) -> list[Plan]:
    """What to try, the strictest first."""
    if os.geteuid() == 0:
        own = Plan(own_uid=True, walled=walled)
        return [own, replace(own, keep_read=True), Plan(walled=walled)]
    if walled:  # a setuid bwrap may have made what this user may not
        return [Plan(own_user_namespace=True, walled=True), Plan(walled=True)]
    return [Plan()]


def probe(
    limits: Limits, packages: list[str], root: str, *, walled: bool, crowd: int
) -> tuple[Confinement, list[Problem]]:
    """The strictest confinement that works here, and the mandatory layers it has to go without.

    `root` is the pool's folder: it gets a canary that must stay unreadable and a trial workdir.
    `walled` says that `wall_off` succeeded, `crowd` is as in `Confinement`.
    """
    canary, workdir = os.path.join(root, "canary"), os.path.join(root, "probe")
    with open(canary, "w", encoding="ascii") as file:
        file.write("readable to everybody but a session")
    os.mkdir(workdir, 0o777)
    os.chmod(workdir, 0o777)
    problems: list[Problem] = []
    try:
        program = seccomp.program()
    except OSError as error:
        program = b""
        problems.append(Problem("seccomp", str(error.strerror), error.errno or 0))
    plans = _plans(walled)
    trial = Confinement(plans.pop(0), limits, Grants(packages), program, os.getpid(), crowd)
    missing = frozenset(problem.layer for problem in problems)
    while True:
        trial = replace(trial, plan=replace(trial.plan, missing=missing))
        problem = _try(trial, canary, workdir)
        if problem is None:
            break
        if problem.layer in OPTIONAL_WHEN_DEGRADED:
            problems.append(problem)
            missing |= {problem.layer}
        elif plans:
            trial = replace(trial, plan=plans.pop(0))
        else:
            problems.append(problem)
            break
    os.rmdir(workdir)
    return trial, problems
