"""Namespaces for the spawner and all it forks: own processes, empty network, almost empty root.

`enter` splits the calling process: the caller goes on as process 1 of a new process namespace, and
the one that was exec'd stays outside only to end with it. Invariants: when either of them goes,
the kernel ends every process inside; inside, no path leads to a file but the granted ones, and no
network interface has an address. As root no user namespace is made, so that sessions may still
get a user each; as an ordinary user there is no other way to the rest.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import struct
from collections.abc import Iterable
from contextlib import suppress

from sandbox import workdir
from sandbox.attempt import attempt
from sandbox.seccomp import number_of

_LIBC = ctypes.CDLL(None, use_errno=True)
KINDS = {
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
    "mnt": 0x00020000,
    "ipc": 0x08000000,
    "uts": 0x04000000,
}
"""What `unshare` is asked for."""
_NOSUID, _NODEV, _NOEXEC, _BIND, _REC, _PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
_DETACH, _AT_FDCWD, _AT_RECURSIVE = 2, -100, 0x8000
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV, _ATTR_NOEXEC = 1, 2, 4, 8
_HOST_NAME = b"sandbox"
_ROOT = ".root"
"""Where the new root is put together; gone once it is in use."""


def _check(result: int, what: str) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), what)


def unshare(*kinds: str) -> None:
    """Move this process (for "pid": its children) to new namespaces. Raises OSError."""
    flags = sum(KINDS[kind] for kind in kinds)
    _check(_LIBC.unshare(flags), f"unshare({', '.join(kinds)})")


def own_user() -> None:
    """Into a new user namespace, as the same user and group. Raises OSError."""
    uid, gid = os.geteuid(), os.getegid()
    unshare("user")
    for name, line in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1")):
        _write(name, line)
    _write("gid_map", f"{gid} {gid} 1")


def _write(name: str, line: str) -> None:
    try:
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(line)
    except OSError as error:
        raise OSError(error.errno, f"write to /proc/self/{name}") from error


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    words = (word.encode() for word in (source, target, kind))
    _check(_LIBC.mount(*words, ctypes.c_ulong(flags), data.encode()), f"mount({kind or 'bind'})")


def _restrict(path: str, attributes: int, flags: int = 0) -> None:
    """Add mount attributes. Raises OSError (ENOSYS before Linux 5.12)."""
    wanted = struct.pack("<QQQQ", attributes, 0, 0, 0)
    _check(
        _LIBC.syscall(442, _AT_FDCWD, path.encode(), flags, wanted, len(wanted)), "mount_setattr"
    )


def resolve(path: str, links: dict[str, str]) -> str:
    """The path without symbolic links; those that were met are added to `links`."""
    walked = "/"
    for part in path.strip("/").split("/"):
        walked = os.path.join(walked, part)
        if os.path.islink(walked):
            links[walked] = os.readlink(walked)
            target = os.path.join(os.path.dirname(walked), links[walked])
            return resolve(os.path.normpath(target + path[len(walked) :]), links)
    return walked


def outermost(paths: Iterable[str]) -> list[str]:
    """Those that lie in no other one."""
    kept: list[str] = []
    for path in sorted(set(paths)):
        if not any(path.startswith(f"{outer}/") for outer in kept):
            kept.append(path)
    return kept


def _bind(path: str, root: str, attributes: int, below: int = _REC) -> None:
    """Show `path`, with what is mounted `below` it, by the same name under `root`."""
    there = root + path
    if os.path.isdir(path):
        os.makedirs(there, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(there), exist_ok=True)
        os.close(os.open(there, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    _mount(path, there, "", _BIND | below)
    _restrict(there, attributes | _ATTR_NOSUID, _AT_RECURSIVE)


def _mount_proc(target: str) -> None:
    """A /proc in which nobody finds the processes of others, where the kernel has such a thing."""
    flags = _NOSUID | _NODEV | _NOEXEC
    try:
        _mount("proc", target, "proc", flags, "hidepid=2")
    except OSError:
        _mount("proc", target, "proc", flags)


def _furnish(readable: list[str], devices: list[str], writable: str) -> None:
    """Make the root of this mount namespace one that holds the named paths, /proc, no more."""
    _mount("none", "/", "", _REC | _PRIVATE)
    root = os.path.join(writable, _ROOT)
    os.mkdir(root, 0o755)
    _mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, "mode=755,size=1m,nr_inodes=4096")
    links: dict[str, str] = {}
    found = (resolve(path, links) for path in readable if os.path.exists(path))
    for path in outermost(found):
        _bind(path, root, _ATTR_RDONLY | _ATTR_NODEV)
    for path in devices:
        _bind(path, root, _ATTR_NOEXEC)
    _bind(resolve(writable, links), root, _ATTR_NODEV | _ATTR_NOEXEC, below=0)
    for link, target in links.items():
        if not os.path.lexists(root + link):
            os.makedirs(os.path.dirname(root + link), exist_ok=True)
            os.symlink(target, root + link)
    os.mkdir(f"{root}/proc")
    _mount_proc(f"{root}/proc")
    os.chdir(root)
    _check(_LIBC.syscall(number_of("pivot_root"), b".", b"."), "pivot_root")
    _check(_LIBC.umount2(b".", _DETACH), "umount2")
    os.chdir("/")
    os.rmdir(root)
    _restrict("/", _ATTR_RDONLY)


def _split(*, privileged: bool) -> int:
    """Fork into a new process namespace: 0 inside, else the process id of the inner one."""
    if not privileged:
        own_user()
    unshare("pid")
    outer = os.pidfd_open(os.getpid())
    child = os.fork()
    if child == 0:
        _check(_LIBC.prctl(1, signal.SIGKILL, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")
        if select.select([outer], [], [], 0)[0]:
            os._exit(0)
    os.close(outer)
    return child


def _wall_off(readable: list[str], devices: list[str], writable: str) -> None:
    unshare("mnt", "net", "ipc", "uts")
    _check(_LIBC.sethostname(_HOST_NAME, len(_HOST_NAME)), "sethostname")
    _furnish(readable, devices, writable)


def enter(readable: list[str], devices: list[str], writable: str, *, privileged: bool) -> None:
    """Go on inside new namespaces. `trial` said that they work.

    `readable` and `devices` exist inside by the same names, `writable` is the only folder to
    write to; the outer process removes it at the end. `privileged`: root without a user namespace.
    """
    child = _split(privileged=privileged)
    if child == 0:
        _wall_off(readable, devices, writable)
        return
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    _, status = os.waitpid(child, 0)  # an init's end is reported after all others'
    workdir.remove(writable)
    os._exit(min(abs(os.waitstatus_to_exitcode(status)), 255))


def look_around() -> None:
    """Raises OSError for what is still within reach."""
    if os.getpid() != 1 or [name for name in os.listdir("/proc") if name.isdigit()] != ["1"]:
        raise OSError(0, "processes outside are visible")
    if os.path.exists("/etc/passwd") or os.path.exists("/usr/bin/env"):
        raise OSError(0, "files outside are visible")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        if probe.connect_ex(("192.0.2.1", 9)) == 0:
            raise OSError(0, "a network is reachable")


def trial(
    readable: list[str], devices: list[str], writable: str, *, privileged: bool
) -> OSError | None:
    """Do what `enter` does in a throwaway process, then look around; what failed, if anything."""

    def enter_and_look() -> None:
        inner = _split(privileged=privileged)
        if inner:
            os.waitpid(inner, 0)
            os._exit(0)
        _wall_off(readable, devices, writable)
        look_around()

    error = attempt(enter_and_look)
    with suppress(OSError):
        os.rmdir(os.path.join(writable, _ROOT))
    return error
