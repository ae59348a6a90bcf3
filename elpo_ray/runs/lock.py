"""Who is at work in a run folder: one process at a time.

The lock is the kernel's, so it ends with its process however that ends. On a file system without
such locks nobody is kept out.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

LOCK = ".elpo.lock"
"""The file that is locked, with the number of the process. It stays when the process has ended."""


class FolderLock:
    """The right to write into a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: int | None = None

    @property
    def begun(self) -> bool:
        """Whether somebody ever had it."""
        return self._path.exists()

    @property
    def held(self) -> bool:
        """Whether somebody has it, this process included."""
        return self._owner() is not None

    def check(self, key: str) -> None:
        """Raise ValueError, beginning with `key`, if another process has it."""
        owner = self._owner()
        if owner not in (None, str(os.getpid())):
            raise ValueError(
                f"{key}: process {owner} is at work in {self._folder}; wait until it ends, or end "
                "it first"
            )

    def take(self, key: str) -> None:
        """Have it until `release`, or until this process ends. Raises ValueError as `check`."""
        self.check(key)
        if self._file is None:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            _locked(self._file)
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    @property
    def _path(self) -> Path:
        return self._folder / LOCK

    def _owner(self) -> str | None:
        """The process that has it; None if nobody has."""
        try:
            file = os.open(self._path, os.O_RDONLY)
        except OSError:
            return None
        try:
            return None if _locked(file) else os.pread(file, 32, 0).decode() or "?"
        finally:
            os.close(file)


def _locked(file: int) -> bool:
    """Take the lock of an open file; False if another open file has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # no locks here
    return True
