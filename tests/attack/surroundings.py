"""Make this process an ordinary user, or deny it what a container denies, before a sandbox starts.

All of it is done to the calling process for good, so it happens in processes of their own.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_X86 = platform.machine() == "x86_64"
_NEW_NAMESPACE = 0x7E020000
"""All CLONE_NEW* flags."""
_CONTAINER_DENIES = {  # x86_64, others
    "bpf": (321, 280), "fsopen": (430, 430), "io_uring_setup": (425, 425), "keyctl": (250, 219),
    "mount": (165, 40), "mount_setattr": (442, 442), "move_mount": (429, 429),
    "open_by_handle_at": (304, 265), "open_tree": (428, 428), "perf_event_open": (298, 241),
    "pivot_root": (155, 41), "setns": (308, 268), "umount2": (166, 39), "unshare": (272, 97),
    "userfaultfd": (323, 282),
}  # fmt: skip
_CLONE, _CLONE3 = (56, 220), 435
_CONTAINER_CAPABILITIES = (0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31)
"""What Docker leaves to root: CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID, SETPCAP,
NET_BIND_SERVICE, NET_RAW, SYS_CHROOT, MKNOD, AUDIT_WRITE, SETFCAP."""
_LANDLOCK, _PRCTL, _SECCOMP = 444, (157, 167), (317, 277)


class Absent(Exception):
    """These surroundings cannot be had on this machine."""


def _check(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), what)


def _op(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("<HBBI", code, yes, no, k)


def _deny(number: int, error: int) -> bytes:
    return _op(0x15, number, 0, 1) + _op(0x06, 0x50000 | error)


def _install(code: bytes) -> None:
    code += _op(0x06, 0x7FFF0000)

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))

    _check(_LIBC.prctl(38, 1, 0, 0, 0), "no_new_privs")
    program = Program(len(code) // 8, code)
    _check(_LIBC.prctl(22, 2, ctypes.byref(program), 0, 0), "seccomp")


def like_a_container() -> None:
    """The capabilities and the filter of Docker's default: no namespaces, no mounts."""
    if os.geteuid() == 0:
        for capability in range(64):
            if capability not in _CONTAINER_CAPABILITIES:
                _LIBC.prctl(24, capability, 0, 0, 0)  # EINVAL above the last one
        kept = sum(1 << capability for capability in _CONTAINER_CAPABILITIES)
        header = struct.pack("<Ii", 0x20080522, 0)
        _check(_LIBC.capset(header, struct.pack("<6I", kept, kept, kept, 0, 0, 0)), "capset")
    code = _op(0x20, 0)
    for numbers in _CONTAINER_DENIES.values():
        code += _deny(numbers[not _X86], errno.EPERM)
    code += _deny(_CLONE3, errno.ENOSYS)
    code += _op(0x15, _CLONE[not _X86], 0, 3)
    code += _op(0x20, 16) + _op(0x45, _NEW_NAMESPACE, 0, 1) + _op(0x06, 0x50000 | errno.EPERM)
    _install(code)


def without_landlock() -> None:
    """As before Linux 5.13, or under an old container runtime."""
    _install(_op(0x20, 0) + _deny(_LANDLOCK, errno.ENOSYS))


def without_seccomp() -> None:
    """No further filter can be installed."""
    code = _op(0x20, 0) + _deny(_SECCOMP[not _X86], errno.EPERM)
    code += _op(0x15, _PRCTL[not _X86], 0, 3)
    code += _op(0x20, 16) + _op(0x15, 22, 0, 1) + _op(0x06, 0x50000 | errno.EINVAL)
    _install(code)


def _closed_above(path: Path) -> Path | None:
    """The uppermost folder over `path` that others may not pass."""
    for folder in reversed(path.parents):
        if not folder.stat().st_mode & 0o001:
            return folder
    return None


def _open_way(path: Path) -> None:
    """Replace closed folders, in this mount namespace, by ones with only the way to `path`."""
    while (closed := _closed_above(path)) is not None:
        below = closed / path.relative_to(closed).parts[0]
        descriptor = os.open(below, os.O_PATH)
        _mount("tmpfs", str(closed), "tmpfs", 0)
        closed.chmod(0o755)
        below.mkdir()
        _mount(f"/proc/self/fd/{descriptor}", str(below), "", 4096 | 16384)
        os.close(descriptor)


def _mount(source: str, target: str, kind: str, flags: int) -> None:
    words = (word.encode() for word in (source, target, kind))
    _check(_LIBC.mount(*words, ctypes.c_ulong(flags), None), "mount")


def ordinary_user(needed: list[Path]) -> None:
    """Give up root for an ordinary user who can read the `needed` paths. Raises Absent."""
    if os.geteuid() != 0:
        return
    if any(_closed_above(path) for path in needed):
        try:
            _check(_LIBC.unshare(0x20000), "unshare")
            _mount("none", "/", "", (1 << 18) | 16384)
            for path in needed:
                _open_way(path)
        except OSError as error:
            raise Absent(f"no ordinary user can read the Python installation ({error})") from None
    uid = 61000 + os.getpid() % 3000
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
