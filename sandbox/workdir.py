"""The folders of sessions, looked at and removed from outside while hostile code may own them.

A tree has one folder, which its code can neither list nor change; in it lies one folder for each
of its states, under a name that only the code of that state is told.
"""

from __future__ import annotations

import itertools
import os
import secrets
from contextlib import suppress

from sandbox.limits import Limits

_PASS_ONLY, _MAKE = 0o111, 0o311


def usage(path: str, limits: Limits) -> int | None:
    """Bytes of files in a state's folder; None if that is too much, or too many files.

    Looks at a bounded number of entries. A folder that cannot be listed counts as too much: only
    hostile code makes one.
    """
    count, total, pending = 0, 0, [path]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    count += 1
                    total += entry.stat(follow_symlinks=False).st_size
                    if count > limits.files or total > limits.file_mib << 20:
                        return None
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
        except FileNotFoundError:  # removed in between
            continue
        except OSError:
            return None
    return total


def remove(path: str) -> None:
    """Remove the folder of sessions that have ended, whatever its modes and however deep it is."""
    token = secrets.token_hex(8)
    free_names = (os.path.join(path, f"{token}-{number}") for number in itertools.count())
    with suppress(OSError):  # it is gone already, or a mount point that its outer process removes
        os.chmod(path, 0o700)
        while folders := _remove_files(path):
            for folder in folders:
                os.chmod(folder, 0o700)
                for inner in _remove_files(folder):
                    os.chmod(inner, 0o700)
                    os.rename(inner, next(free_names))
                os.rmdir(folder)
        os.rmdir(path)


def _remove_files(path: str) -> list[str]:
    """Remove what is in a folder, but for the folders in it: their paths."""
    with os.scandir(path) as entries:
        found = list(entries)
    folders = [entry.path for entry in found if entry.is_dir(follow_symlinks=False)]
    for entry in found:
        if not entry.is_dir(follow_symlinks=False):
            os.unlink(entry.path)
    return folders


class TreeFolder:
    """The folder of one tree. The spawner made it, with the first state's folder in it."""

    FIRST = "0"

    def __init__(self, path: str) -> None:
        """Raises OSError."""
        self.path = path
        first = os.stat(os.path.join(path, self.FIRST))
        self._user = first.st_uid, first.st_gid
        self._guarded = first.st_uid != os.stat(path).st_uid
        if not self._guarded:  # then only the modes stand in the code's way
            os.chmod(path, _PASS_ONLY)

    def make(self) -> str:
        """A new state's folder. Raises OSError."""
        made = os.path.join(self.path, secrets.token_hex(8))
        if self._guarded:
            os.mkdir(made, 0o700)
            os.chown(made, *self._user)
            return made
        os.chmod(self.path, _MAKE)
        try:
            os.mkdir(made, 0o700)
        finally:
            os.chmod(self.path, _PASS_ONLY)
        return made

    def remove(self) -> None:
        """Remove everything; nobody works in it any longer."""
        with suppress(OSError):
            os.chmod(self.path, 0o700)
        remove(self.path)
