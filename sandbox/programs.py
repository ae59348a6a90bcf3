"""Programs and processes, which code in a session may not start: it is told so plainly.

The kernel refuses them whatever happens here, but its answer (no more processes, no such
permission, a file system that is read only) depends on how it was tried.
"""

from __future__ import annotations

import _posixsubprocess  # not only where it is used: what it holds is replaced
import errno
import sys
import threading
from contextlib import suppress
from typing import Any

with suppress(ImportError):  # not every Python has it
    import _multiprocessing

_STARTERS = {
    "fork_exec", "_fork_exec", "posix_spawn", "posix_spawnp", "_posix_spawn", "system",
    "fork", "forkpty", "execv", "execve",
}  # fmt: skip
"""Functions that start a program or a process."""
_RECURSIVE = 0
"""Kind of a lock that whoever holds it may take once more."""


def _refuse(*_: object, **__: object) -> None:
    raise PermissionError(
        errno.EPERM, "not allowed here: the sandbox starts no programs and no processes"
    )


def refuse_programs() -> None:
    """Replace what starts them, in this process. Among threads `multiprocessing` works on."""
    for name in (_posixsubprocess.__name__, "subprocess", "posix", "os"):
        module = vars(sys.modules[name]) if name in sys.modules else {}
        for starts in _STARTERS & set(module):
            module[starts] = _refuse
    if "_multiprocessing" in sys.modules:
        vars(_multiprocessing)["SemLock"] = ThreadLock


class ThreadLock:
    """A semaphore with the interface of `_multiprocessing.SemLock`, among threads: there are no
    other processes that it could be shared with. `multiprocessing.pool.ThreadPool` needs some."""

    SEM_VALUE_MAX = 2**31 - 1

    def __init__(self, kind: int, value: int, maxvalue: int, name: str, unlink: bool) -> None:
        self.kind, self.maxvalue, self.handle, self.name = kind, maxvalue, 0, None
        self._free = threading.Semaphore(value)
        self._owner, self._taken = 0, 0

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """Take it; False if that is not possible at once, or within `timeout` seconds."""
        if self.kind == _RECURSIVE and self._is_mine():
            self._taken += 1
            return True
        patience = max(0.0, timeout) if block and timeout is not None else None
        if not self._free.acquire(block, patience):
            return False
        self._owner = threading.get_ident()
        self._taken += 1
        return True

    def release(self) -> None:
        """Give it back. Raises AssertionError if it is another thread's, ValueError if it is free
        already."""
        if self.kind == _RECURSIVE:
            if not self._is_mine():
                raise AssertionError("attempt to release recursive lock not owned by thread")
        elif self._get_value() >= self.maxvalue:
            raise ValueError("semaphore or lock released too many times")
        self._taken -= 1
        if self.kind != _RECURSIVE or not self._taken:
            self._free.release()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _count(self) -> int:
        return self._taken

    def _is_mine(self) -> bool:
        return self._taken > 0 and self._owner == threading.get_ident()

    def _get_value(self) -> int:
        value: Any = vars(self._free)["_value"]
        return int(value)

    def _is_zero(self) -> bool:
        return self._get_value() == 0

    def _after_fork(self) -> None:
        """There are no forks."""
