"""A self-contained seccomp filter: what a Python session may ask the kernel for.

Allow-list. What is not listed answers ENOSYS, so libraries take their fallback; what is denied by
name answers EPERM, so Python raises PermissionError. Invariants: no socket but an anonymous stream
pair, no new process (threads only), no exec, no signal to anyone but oneself, no change of
permissions, owners or identity, no shared memory with other processes.

Fork snapshots need one exception: `listen` puts every step fork (`STEP_FORK`, flags that no library
uses) before the supervisor, who lets exactly those pass that it asked for, and so it does with the
`fchdir` by which the new process goes to its own work folder. The flags travel in a register, so
what was looked at is what runs. CLONE_PARENT makes the spawner the parent of every process, so that
no other process reaps it. No process that may fork sends signals, not even to itself: the filter is
inherited and cannot know the process id of a child.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

from sandbox.syscalls import ALLOWED, DENIED, FEIGNED, LACKING, NUMBERS
from sandbox.wire import WORK_FD

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7), "arm64": (1, 0xC00000B7)}
_LOAD, _JUMP, _RETURN = 0x20, 0x05, 0x06
_AND = 0x54
_JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT = 0x15, 0x35, 0x45
_X32 = 0x40000000
"""Numbers from here on are x86_64's second way into the kernel; no other architecture has them."""
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NOTIFY = 0x7FC00000
_OWN_PID = 0x5EED0BAD
"""Stands for the session's process id until `install` knows it."""
_NO_PID = 0x7FFFFFFF
_MAY_FORK = 0x5EEC0F04
"""Stands for STEP_FORK until `install` knows whether there is a listener."""
_MAY_SHOW = 0x5EED0005
"""Stands for PR_SET_DUMPABLE until `install` knows whether there is a listener."""
STEP_FORK = 0x00008000 | 17
"""Flags of the only fork there is: CLONE_PARENT and SIGCHLD."""
_SET_MODE_FILTER, _NEW_LISTENER, _WAIT_KILLABLE = 1, 8, 32
_THREAD, _TMPFILE = 0x00050F00, 0o20000000
"""What all threads have in common: memory, folder, descriptors, signals, process, semaphores."""


def _op(code: int, k: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, jump_true, jump_false, k)


def _load_argument(index: int, *, high: bool = False) -> bytes:
    """The low 32 bits: nearly all arguments tested here are C ints or flags below 2^32. The other
    half of a pointer is `high`."""
    return _op(_LOAD, 16 + 8 * index + 4 * high)


_PERMIT = _op(_RETURN, _ALLOW)
_FEIGN = _op(_RETURN, _ERRNO)
"""The call does nothing and succeeds."""


def _refuse(error: int) -> bytes:
    return _op(_RETURN, _ERRNO | error)


def _one_of(argument: int, values: tuple[int, ...]) -> bytes:
    """Allow if the argument is one of `values`, else EPERM."""
    tests = b"".join(_op(_JUMP_EQUAL, value, 0, 1) + _PERMIT for value in values)
    return _load_argument(argument) + tests + _refuse(errno.EPERM)


def _signal_to_self(pid_at: int, signal_at: int) -> bytes:
    """Own process only; SIGKILL and SIGSTOP stay the supervisor's, so they prove it was not us."""
    return (
        _load_argument(pid_at)
        + _op(_JUMP_EQUAL, _OWN_PID, 1, 0)
        + _refuse(errno.EPERM)
        + _load_argument(signal_at)
        + _op(_JUMP_EQUAL, 9, 0, 1)
        + _refuse(errno.EPERM)
        + _op(_JUMP_EQUAL, 19, 0, 1)
        + _refuse(errno.EPERM)
        + _PERMIT
    )


_STACK_ONLY = _op(_JUMP_EQUAL, 3, 0, 1) + _PERMIT + _refuse(errno.EPERM)
"""For the loaded number of a limit: RLIMIT_STACK, or EPERM."""


def _if_null(argument: int, verdict: bytes, otherwise: bytes) -> bytes:
    """`verdict` is one instruction."""
    return (
        _load_argument(argument)
        + _op(_JUMP_EQUAL, 0, 0, 3)
        + _load_argument(argument, high=True)
        + _op(_JUMP_EQUAL, 0, 0, 1)
        + verdict
        + otherwise
    )


def _named(flags_at: int) -> bytes:
    """Files have names, so that whoever counts files sees them: no O_TMPFILE."""
    return (
        _load_argument(flags_at)
        + _op(_JUMP_ANY_BIT, _TMPFILE, 0, 1)
        + _refuse(errno.EOPNOTSUPP)
        + _PERMIT
    )


def _own_only(error: int) -> bytes:
    """For calls about a process or thread, which would say whether another one exists: 0, oneself.
    A process may not name itself otherwise: the filter is inherited."""
    return _load_argument(0) + _op(_JUMP_EQUAL, 0, 0, 1) + _PERMIT + _refuse(error)


# Clocks of this machine, of this process and of its threads. A process's clock that is named by
# the process's id would tell what a sibling does.
_CLOCKS = (
    _load_argument(0)
    + _op(_JUMP_AT_LEAST, 1 << 31, 0, 2)
    + _op(_JUMP_EQUAL, 0xFFFFFFFA, 1, 0)  # this process
    + _op(_JUMP_ANY_BIT, 4, 0, 1)
    + _PERMIT
    + _refuse(errno.EINVAL)
)
# None that inherits priorities, for it says whether the thread that a futex names exists: glibc
# then has no such mutexes. Whoever maps the same file shares its futexes, also for reading only.
# Waits on what glibc takes to be shared (the end of a thread that is joined) look again instead.
_FUTEX = (
    _load_argument(1)
    + _op(_AND, 0x7F)
    + b"".join(
        _op(_JUMP_EQUAL, inherits, 0, 1) + _refuse(errno.ENOSYS)
        for inherits in (6, 7, 8, 11, 12, 13)
    )
    + _load_argument(1)
    + _op(_JUMP_ANY_BIT, 0x80, 0, 1)
    + _PERMIT
    + b"".join(_op(_JUMP_EQUAL, wait, 0, 1) + _refuse(errno.EAGAIN) for wait in (0, 9, 265))
    + b"".join(_op(_JUMP_EQUAL, wake, 0, 1) + _FEIGN for wake in (1, 3, 4, 5, 10))
    + _refuse(errno.ENOSYS)
)

_CONDITIONAL: dict[str, bytes] = {
    # Whoever closes standard output or error would lose what is printed later: both stay open.
    "close": _load_argument(0)
    + b"".join(_op(_JUMP_EQUAL, stream, 0, 1) + _FEIGN for stream in (1, 2))
    + _PERMIT,
    "futex": _FUTEX,
    # Not CLOSE_RANGE_UNSHARE: descriptors of a thread's own.
    "close_range": _load_argument(2)
    + _op(_JUMP_ANY_BIT, 2, 0, 1)
    + _refuse(errno.EINVAL)
    + _PERMIT,
    # Not MADV_MERGEABLE: who has the same page can be told by the time it takes to write to it.
    "madvise": _load_argument(2) + _op(_JUMP_EQUAL, 12, 0, 1) + _FEIGN + _PERMIT,
    "clock_gettime": _CLOCKS,
    "clock_getres": _CLOCKS,
    "clock_nanosleep": _CLOCKS,
    "getpgid": _own_only(errno.EPERM),
    "getsid": _own_only(errno.EPERM),
    "sched_getparam": _own_only(errno.EPERM),
    "sched_getscheduler": _own_only(errno.EPERM),
    # glibc asks by the thread's id, and bears that there is no such call.
    "sched_getaffinity": _own_only(errno.ENOSYS),
    # No byte out of band, which the supervisor would see and could not read.
    "sendto": _load_argument(3) + _op(_JUMP_ANY_BIT, 1, 0, 1) + _refuse(errno.EOPNOTSUPP) + _PERMIT,
    "openat": _named(2),
    "open": _named(1),
    # Private only: what is shared would join branches forked from one snapshot.
    "mmap": _load_argument(3) + _op(_JUMP_ANY_BIT, 1, 0, 1) + _refuse(errno.EPERM) + _PERMIT,
    # pthread_create passes, fork and namespaces do not, nor a thread that has something to itself:
    # whoever looks at the process would not see it.
    "clone": _load_argument(0)
    + _op(_JUMP_EQUAL, _MAY_FORK, 0, 1)
    + _PERMIT
    + _op(_AND, _THREAD)
    + _op(_JUMP_EQUAL, _THREAD, 0, 1)
    + _PERMIT
    + _refuse(errno.EAGAIN),
    # Its flags lie in memory, out of the filter's reach: glibc falls back to clone.
    "clone3": _refuse(errno.ENOSYS),
    "fork": _refuse(errno.EAGAIN),
    "vfork": _refuse(errno.EAGAIN),
    # AF_UNIX stream pairs (asyncio's self-pipe), with any of NONBLOCK and CLOEXEC.
    "socketpair": _load_argument(0)
    + _op(_JUMP_EQUAL, 1, 1, 0)
    + _refuse(errno.EPERM)
    + _one_of(1, (1, 1 | 0o4000, 1 | 0o2000000, 1 | 0o2004000)),
    "ioctl": _one_of(1, (0x5401, 0x5421, 0x541B, 0x5450, 0x5451)),
    # Not F_SETOWN and F_SETSIG: they send any signal to any process of the same user. Locks, which
    # trees could see of each other on files that they all read, are taken for granted.
    "fcntl": _load_argument(1)
    + b"".join(_op(_JUMP_EQUAL, lock, 0, 1) + _FEIGN for lock in (5, 6, 7, 36, 37, 38))
    + _one_of(1, (0, 1, 2, 3, 4, 1030)),
    # PR_SET_DUMPABLE: as the listener decides. PR_SET_PDEATHSIG, which a fork clears: to SIGKILL.
    "prctl": _load_argument(0)
    + _op(_JUMP_EQUAL, _MAY_SHOW, 0, 1)
    + _PERMIT
    + _op(_JUMP_EQUAL, 1, 0, 4)
    + _load_argument(1)
    + _op(_JUMP_EQUAL, 9, 0, 1)
    + _PERMIT
    + _refuse(errno.EPERM)
    + _one_of(0, (15, 16)),
    # Limits are the supervisor's: they may be read. Deep recursion needs a stack of another size,
    # which costs nobody else anything: it counts as memory.
    "prlimit64": _load_argument(0)
    + _op(_JUMP_EQUAL, 0, 2, 0)
    + _op(_JUMP_EQUAL, _OWN_PID, 1, 0)
    + _refuse(errno.EPERM)
    + _if_null(2, _PERMIT, _load_argument(1) + _STACK_ONLY),
    "setrlimit": _load_argument(0) + _STACK_ONLY,
    "kill": _signal_to_self(0, 1),
    "tgkill": _signal_to_self(0, 2),
}


def _any_of(numbers: list[int | None], verdict: bytes) -> bytes:
    """`verdict` if the loaded word is one of `numbers` (at most 255), else go on."""
    known = [number for number in numbers if number is not None]
    tests = (_op(_JUMP_EQUAL, number, len(known) - at, 0) for at, number in enumerate(known))
    return b"".join(tests) + _op(_JUMP, 1) + verdict


def _architecture() -> tuple[int, int]:
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise OSError(errno.ENOTSUP, f"no system call table for {machine}")
    return _ARCHITECTURES[machine]


def number_of(name: str) -> int:
    """A system call's number here. Raises OSError on an architecture without a table."""
    number = NUMBERS[name][_architecture()[0]]
    assert number is not None
    return number


def program() -> bytes:
    """The filter as BPF instructions of 8 bytes, the process id still a placeholder."""
    column, audit_arch = _architecture()
    code = _op(_LOAD, 4) + _op(_JUMP_EQUAL, audit_arch, 1, 0) + _op(_RETURN, _KILL) + _op(_LOAD, 0)
    code += _op(_JUMP_AT_LEAST, _X32, 0, 1) + _op(_RETURN, _KILL)
    for names, verdict in (
        (ALLOWED, _PERMIT),
        (DENIED, _refuse(errno.EPERM)),
        (FEIGNED, _FEIGN),
        (LACKING, _refuse(errno.EOPNOTSUPP)),
    ):
        code += _any_of([NUMBERS[name][column] for name in names], verdict)
    for name, block in _CONDITIONAL.items():
        number = NUMBERS[name][column]
        if number is not None:
            code += _op(_JUMP_EQUAL, number, 0, len(block) // 8) + block
    return code + _refuse(errno.ENOSYS)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def no_new_privs() -> None:
    """Give up, for good, privileges from setuid and file capabilities. Raises OSError."""
    if _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")


def _on(name: str, block: bytes) -> bytes:
    """`block`, which returns or goes on, for one system call."""
    return _op(_JUMP_EQUAL, NUMBERS[name][_architecture()[0]] or 0, 0, len(block) // 8) + block


def listen() -> tuple[int, bool]:
    """Have every step fork, every new thread, every change of who may look at a process and every
    `fchdir` to the work folder decided by the holder of the descriptor returned, for this process
    and its descendants. Also whether nothing but SIGKILL disturbs who waits for a decision.

    Needs `no_new_privs`. Raises OSError (Linux 5.9; one listener a process).
    """
    notify = _op(_RETURN, _NOTIFY)
    code = (
        _op(_LOAD, 0)
        + _on(
            "clone",
            _load_argument(0)
            + _op(_JUMP_EQUAL, STEP_FORK, 2, 0)
            + _op(_AND, _THREAD)
            + _op(_JUMP_EQUAL, _THREAD, 0, 1)
            + notify
            + _PERMIT,
        )
        + _on(
            "prctl", _load_argument(0) + _op(_JUMP_EQUAL, _PR_SET_DUMPABLE, 0, 1) + notify + _PERMIT
        )
        + _on("fchdir", _load_argument(0) + _op(_JUMP_EQUAL, WORK_FD, 0, 1) + notify + _PERMIT)
        + _PERMIT
    )
    described = _Program(len(code) // 8, code)
    for more in (_WAIT_KILLABLE, 0):  # the first one since Linux 5.19
        listener = _LIBC.syscall(
            number_of("seccomp"),
            _SET_MODE_FILTER,
            ctypes.c_ulong(_NEW_LISTENER | more),
            ctypes.byref(described),
        )
        if listener >= 0:
            return int(listener), bool(more)
    raise OSError(ctypes.get_errno(), "seccomp(SECCOMP_FILTER_FLAG_NEW_LISTENER)")


def install(code: bytes, *, forking: bool = False) -> None:
    """Put the calling thread, for good, under `code`. Needs `no_new_privs`. Raises OSError.

    `forking`: step forks are left to the holder of what `listen` returned.
    """
    pid = _NO_PID if forking else os.getpid()
    code = code.replace(struct.pack("<I", _OWN_PID), struct.pack("<I", pid))
    if forking:
        for placeholder, value in ((_MAY_FORK, STEP_FORK), (_MAY_SHOW, _PR_SET_DUMPABLE)):
            code = code.replace(struct.pack("<I", placeholder), struct.pack("<I", value))
    described = _Program(len(code) // 8, code)
    if _LIBC.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(described), 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_SECCOMP)")
