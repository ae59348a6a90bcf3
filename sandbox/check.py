"""`python -m sandbox.check`: which primitives work on this machine, and which tier they add up to.

Every line was found out by doing it, in a throwaway process. Exit status 1 below `standard`.
"""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import resource
import signal
import socket
import sys
import tempfile
from collections.abc import Callable

from sandbox import landlock, namespaces, seccomp
from sandbox.attempt import attempt
from sandbox.confine import TIERS, prctl
from sandbox.probe import REMEDIES, namespace_trial
from sandbox.results import SandboxUnavailable
from sandbox.supervisor import Sandbox

_PR_SET_PDEATHSIG = 1
_GIB = 1 << 30


def _must_fail(action: Callable[[], object], what: str) -> None:
    try:
        action()
    except (OSError, MemoryError):
        return
    raise OSError(0, what)


def _namespace(kind: str) -> Callable[[], None]:
    def unshare() -> None:
        if os.geteuid() != 0:
            namespaces.own_user()
        namespaces.unshare(kind)

    return unshare


def _new_root() -> None:
    with tempfile.TemporaryDirectory() as folder:
        _, error = namespace_trial([], folder)
    if error is not None:
        raise error


def _landlock() -> None:
    seccomp.no_new_privs()
    landlock.restrict(landlock.create([]))
    _must_fail(lambda: os.listdir("/"), "a folder can be listed all the same")


def _filter() -> None:
    program = seccomp.program()
    seccomp.no_new_privs()
    seccomp.install(program)
    _must_fail(socket.socket, "a socket can be opened all the same")


def _notification() -> None:
    seccomp.no_new_privs()
    seccomp.listen()


def _limits() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_GIB, _GIB))
    _must_fail(lambda: mmap.mmap(-1, 2 * _GIB), "more memory than RLIMIT_AS can be had")


def _descriptor() -> None:
    signal.pidfd_send_signal(os.pidfd_open(os.getpid()), 0)


def _other_user() -> None:
    os.setgroups([])
    os.setresuid(60000, 60000, 60000)


PRIMITIVES: list[tuple[str, str, str, Callable[[], None]]] = [
    ("process descriptors", "all", "process", _descriptor),
    ("death with the parent", "all", "process", lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)),
    ("limits of resources", "all", "process", _limits),
    ("Landlock", "standard, strong", "landlock", _landlock),
    ("seccomp filter", "standard, strong", "seccomp", _filter),
    *(
        (f"{name} namespace", "strong", "namespaces", _namespace(kind))
        for name, kind in (
            ("process", "pid"),
            ("network", "net"),
            ("mount", "mnt"),
            ("ipc", "ipc"),
            ("host name", "uts"),
        )
    ),
    ("new root and /proc", "strong", "namespaces", _new_root),
    ("user namespace", "strong without root", "namespaces", namespaces.own_user),
    ("seccomp notification", "fork snapshots", "notification", _notification),
    ("a user per session", "root, to be better", "identity", _other_user),
]
"""Name, what needs it, whose remedy applies, and how to do it."""


def _report() -> None:
    print(f"{'primitive':24}{'needed by':22}works here")
    missing = []
    for name, needed_by, layer, action in PRIMITIVES:
        if action is _other_user and os.geteuid() != 0:
            continue
        error = attempt(action)
        answer = "yes"
        if error is not None:
            code = errno.errorcode.get(error.errno or 0, str(error.errno))
            answer = f"no: {error.strerror} ({code})"
            missing.append(layer)
        print(f"{name:24}{needed_by:22}{answer}", flush=True)
    for layer in dict.fromkeys(missing):
        print(f"\n{layer}: {REMEDIES[layer]}")


async def _tier() -> str:
    """The tier that a sandbox comes to here. Raises SandboxUnavailable below `standard`."""
    async with Sandbox() as sandbox:
        session = await sandbox.open()
        result = await session.call("1 + 1")
        assert result.value == "2", result
        return result.isolation


def main() -> int:
    """Print what this machine offers and return the exit code."""
    _report()
    try:
        tier = asyncio.run(_tier())
    except SandboxUnavailable as unavailable:
        print(f"\n{unavailable}\ntier: {TIERS[-1]}, and only with allow_degraded")
        return 1
    print(f"\ntier: {tier}, seen at work")
    return 0


if __name__ == "__main__":
    sys.exit(main())
