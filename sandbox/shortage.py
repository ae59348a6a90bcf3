"""What the supervisor says when the machine lets it have no more of something.

A shortage is the infrastructure's: it is never put down to the code in a session, and its message
names what is short and who decides about that.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from sandbox.results import SandboxFailure

_REMEDIES = {
    errno.EMFILE: "this process may open no more files: raise ulimit -n",
    errno.ENFILE: "this machine may open no more files: raise sysctl fs.file-max",
    errno.EAGAIN: "no more processes or threads may be started: raise ulimit -u, the container's "
    "limit on processes (pids.max) or sysctl kernel.pid_max",
    errno.ETIME: "this machine is too busy: run less beside the sandbox, or fewer sessions at once",
    errno.ENOMEM: "this machine, or this container, has no more memory",
    errno.ENOSPC: "the file system of the work folders is full: make room, or set TMPDIR to "
    "another one",
    errno.EDQUOT: "this user's quota on the file system of the work folders is used up",
}
_FULL_BYTES, _FULL_FILES = 1 << 20, 16
"""A file system with less than this is full."""


def is_shortage(error: OSError) -> bool:
    """Whether the machine had no more of something, so that it says nothing about a session."""
    return error.errno in _REMEDIES


def raise_if_short(error: OSError) -> None:
    """Raise an error that says nothing about a session."""
    if is_shortage(error):
        raise error


@contextmanager
def explaining(what: str) -> Iterator[None]:
    """Raise SandboxFailure in the place of an OSError: `what` did not come to pass."""
    try:
        yield
    except OSError as error:
        raise SandboxFailure(f"{what}: {explained(error)}") from error


def explained(error: OSError) -> str:
    """The error, and what to do about it if something is short."""
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{error}; {remedy}" if remedy else str(error)


def full(folder: str) -> bool:
    """Whether the file system that a folder lies on has no room, as the kernel counts it."""
    try:
        room = os.statvfs(folder)
    except OSError:  # it is gone
        return False
    few_files = room.f_files > 0 and room.f_favail < _FULL_FILES
    return few_files or room.f_bavail * room.f_frsize < _FULL_BYTES
