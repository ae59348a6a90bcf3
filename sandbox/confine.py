"""Turn a freshly forked, single-threaded process into a session's: give up everything but Python.

Order matters: the ruleset needs descriptors that are closed later, identity goes before the
filters, and the seccomp filter comes last since it denies what the other steps call.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from sandbox import landlock, namespaces, seccomp
from sandbox.limits import Limits

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_KEEPCAPS, _PR_SET_CHILD_SUBREAPER = 1, 4, 8, 36
_CAPABILITY_VERSION, _CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 0x20080522, 1, 2
_OWN_UIDS = range(60000, 65000)
"""Below 65536, so that they also exist in the user namespace of a rootless container."""

_MAX_DESCRIPTOR = 1 << 16


TIERS = ("strong", "standard", "weak")
"""Tiers of isolation, the best first; `docs/isolation.md` says what each promises."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What this machine lets a session give up; found out by trying (`sandbox.probe`)."""

    own_uid: bool = False
    """Root only: each session runs as an unprivileged user of its own."""
    keep_read: bool = False
    """The Python installation lies where only root may go: keep the capability to pass folder
    permissions. Landlock still confines what can be opened."""
    walled: bool = False
    """The spawner, and with it all sessions, is in namespaces of its own."""
    own_user_namespace: bool = False
    """Each session gets one, so that the kernel counts its processes apart; where `walled`
    without root."""
    missing: frozenset[str] = frozenset()
    """Layers to leave out; empty unless degraded operation is allowed."""

    @property
    def tier(self) -> str:
        """One of `TIERS`."""
        if self.missing:
            return "weak"
        return "strong" if self.walled else "standard"


def prctl(option: int, value: int) -> None:
    """One-argument prctl. Raises OSError."""
    if _LIBC.prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option})")


def die_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Receive a signal when the parent process goes; ends at once if it already has."""
    prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(0)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent died."""
    prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _set_capabilities(kept: int) -> None:
    header = struct.pack("<Ii", _CAPABILITY_VERSION, 0)
    data = struct.pack("<6I", kept, kept, 0, 0, 0, 0)
    if _LIBC.capset(header, data):
        raise OSError(ctypes.get_errno(), "capset")


def _effective_capabilities() -> int:
    header, data = struct.pack("<Ii", _CAPABILITY_VERSION, 0), ctypes.create_string_buffer(24)
    if _LIBC.capget(header, data):
        raise OSError(ctypes.get_errno(), "capget")
    return int(struct.unpack_from("<I", data.raw)[0])


def _drop_identity(plan: Plan, uid: int) -> None:
    """Give up root: another user where possible, no capability but the one the plan keeps."""
    if plan.own_user_namespace:
        namespaces.own_user()
    held = _effective_capabilities()
    read = _CAP_DAC_READ_SEARCH if held >> _CAP_DAC_READ_SEARCH & 1 else _CAP_DAC_OVERRIDE
    if plan.own_uid:
        prctl(_PR_SET_KEEPCAPS, 1)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    if held:
        _set_capabilities(held & 1 << read if plan.keep_read else 0)


def tasks_of(uid: int) -> int:
    """Threads of all processes of a user that are visible here."""
    count = 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.stat(f"/proc/{name}").st_uid == uid:
                    count += len(os.listdir(f"/proc/{name}/task"))
            except OSError:  # gone in between
                continue
    return count


def _limit_resources(limits: Limits, tasks: int) -> None:
    ceilings = {
        resource.RLIMIT_AS: limits.memory_mib << 20,
        resource.RLIMIT_FSIZE: limits.file_mib << 20,
        resource.RLIMIT_NOFILE: limits.open_files,
        resource.RLIMIT_NPROC: tasks,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for which, ceiling in ceilings.items():
        _lower(which, ceiling)


def _lower(which: int, ceiling: int) -> None:
    hard = resource.getrlimit(which)[1]
    allowed = ceiling if hard == resource.RLIM_INFINITY else min(ceiling, hard)
    resource.setrlimit(which, (allowed, allowed))


DEVICES = ("/dev/null", "/dev/random", "/dev/urandom")
"""What sessions may use of them. Not /dev/zero: a mapping of it would join branches."""


def readable(packages: list[str]) -> list[str]:
    """What sessions may read: the Python installation and what its libraries load."""
    paths = sysconfig.get_paths()
    folders = {paths["stdlib"], paths["platstdlib"], os.path.join(sys.base_prefix, "lib")}
    folders |= {*packages, "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib"}
    folders |= {"/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo"}
    return sorted(path for path in folders if os.path.exists(path))


class Grants:
    """What sessions may read, opened once; each session's own folder is added to them."""

    def __init__(self, packages: list[str]) -> None:
        self.rules = [
            (os.open(path, os.O_PATH | os.O_CLOEXEC), rights)
            for group, rights in ((readable(packages), landlock.READ), (DEVICES, landlock.DEVICE))
            for path in group
            if os.path.exists(path)
        ]

    def with_workdirs(self, paths: Sequence[str]) -> int:
        """A Landlock ruleset's descriptor. Raises OSError."""
        opened = [os.open(path, os.O_PATH | os.O_CLOEXEC) for path in paths]
        try:
            return landlock.create([*self.rules, *((each, landlock.WORK) for each in opened)])
        finally:
            for descriptor in opened:
                os.close(descriptor)


class LayerError(Exception):
    """A step of `Confinement.enter` failed: which layer, which primitive, which errno."""

    def __init__(self, layer: str, error: OSError) -> None:
        super().__init__(f"{layer}: {error}")
        self.layer = layer
        self.error = error


@contextmanager
def _layer(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LayerError(name, error) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Berth:
    """What one session gets of its own, prepared before the fork."""

    folder: str
    descriptors: tuple[int, ...]
    """Become 0, 1, …; all others are closed."""
    uid: int
    tasks: int
    """Most threads that the user may have in all, while there are no branches."""
    ruleset: int | None
    """Landlock's descriptor of the file rules; None where that layer is missing."""
    tasks_of_branches: int = 0
    """How many more if there are any: then each process's threads are decided from outside, and
    one must not use up what others have."""


@dataclass(frozen=True, slots=True)
class Confinement:
    """Everything that sessions of one spawner have in common."""

    plan: Plan
    limits: Limits
    grants: Grants
    program: bytes
    """The seccomp filter; empty on an architecture without a table."""
    spawner: int
    """Process id of the spawner, as its children see it."""
    crowd: int
    """Keeps the users of its sessions apart from those of other spawners."""

    def uid(self, session: int) -> int:
        """The user that a session runs as: with `own_uid`, one apart from its live siblings."""
        if not self.plan.own_uid:
            return os.getuid()
        return _OWN_UIDS[(self.crowd * 61 + session) % len(_OWN_UIDS)]

    def ruleset(self, workdirs: Sequence[str]) -> int | None:
        """Descriptor of a session's file rules; None where that layer is missing.

        Raises LayerError.
        """
        if "landlock" in self.plan.missing:
            return None
        with _layer("landlock"):
            return self.grants.with_workdirs(workdirs)

    def enter(self, berth: Berth, announce: Callable[[int, bool], None] | None = None) -> None:
        """Confine this process for good. Raises LayerError.

        `announce` is given what decides about step forks (as from `seccomp.listen`), once
        the berth's descriptors are in place. It is not called, and nothing can fork, where the
        machine has no such thing.
        """
        with _layer("process"):
            os.setsid()
            os.chdir(berth.folder)
            for number, descriptor in enumerate(berth.descriptors):
                os.dup2(descriptor, number)
            _limit_resources(self.limits, berth.tasks + berth.tasks_of_branches)
        with _layer("identity"):
            _drop_identity(self.plan, berth.uid)
        with _layer("process"):
            prctl(_PR_SET_DUMPABLE, 0)
            die_with_parent(self.spawner)  # a change of identity clears it, so after that
        with _layer("seccomp"):
            seccomp.no_new_privs()
        if berth.ruleset is not None:
            with _layer("landlock"):
                landlock.restrict(berth.ruleset)
        os.closerange(len(berth.descriptors), _MAX_DESCRIPTOR)
        os.environ.update(HOME=berth.folder, TMPDIR=berth.folder)
        if "seccomp" in self.plan.missing:
            return
        forking = announce is not None and self._listen(announce)
        if not forking:
            _lower(resource.RLIMIT_NPROC, berth.tasks)
        with _layer("seccomp"):
            seccomp.install(self.program, forking=forking)

    @staticmethod
    def _listen(announce: Callable[[int, bool], None]) -> bool:
        """Whether step forks can be decided from outside."""
        try:
            listener, undisturbed = seccomp.listen()
        except OSError:
            return False
        announce(listener, undisturbed)
        os.close(listener)
        return True
