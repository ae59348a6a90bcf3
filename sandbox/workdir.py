"""The folders of sessions, looked at and removed from outside while hostile code may own them.

A tree has one folder, which its code can neither list nor change, and in it a work folder for each
of its states, under a name that only the code of that state knows. They are all made beforehand:
file rules are laid down once, and name them one by one.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import stat
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from sandbox.limits import Limits
from sandbox.results import WorkFile
from sandbox.shortage import is_shortage

_BLOCK = 512
_THREADS = ThreadPoolExecutor(8, thread_name_prefix="sandbox")
"""Not the event loop's own: that could not be shut down where no thread can be started."""
_LISTED, _LISTED_CHARS = 64, 1 << 13
"""Most files that a result lists, and most characters of their names together."""

_Result = TypeVar("_Result")


def size(found: os.stat_result) -> int:
    """Bytes of a file: those that it takes, or would take if it were copied."""
    return max(found.st_size, found.st_blocks * _BLOCK)


@dataclass(slots=True)
class Contents:
    """What is in a state's folder."""

    count: int = 0
    """Files and folders."""
    total: int = 0
    """Bytes of them."""
    files: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """Size, time of the last change and inode number of everything but folders, by the path within
    the folder."""

    def changed_from(self, before: Contents | None) -> tuple[WorkFile, ...]:
        """Files that are new or other than `before`, by name, without hidden ones."""
        old = before.files if before is not None else {}
        found, chars = list[WorkFile](), 0
        for name in sorted(name for name, seen in self.files.items() if old.get(name) != seen):
            chars += len(name)
            if len(found) < _LISTED and chars <= _LISTED_CHARS and "/." not in f"/{name}":
                found.append(WorkFile(name, self.files[name][0]))
        return tuple(found)


def contents(path: str, limits: Limits) -> Contents | None:
    """What is in a state's folder; None if that is too much, or too many files.

    Looks at a bounded number of entries. What its own user may not read is opened up to him first:
    no branch could copy it. A folder that still cannot be listed counts as too much. Raises OSError
    if this supervisor is short of something.
    """
    found, pending = Contents(), [path]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    status = _opened_up(entry.path, entry.stat(follow_symlinks=False))
                    found.count += 1
                    found.total += size(status)
                    if found.count > limits.files or found.total > limits.file_mib << 20:
                        return None
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                        continue
                    seen = status.st_size, status.st_ctime_ns, status.st_ino
                    found.files[entry.path[len(path) + 1 :]] = seen
        except FileNotFoundError:  # removed in between
            continue
        except OSError as error:
            if is_shortage(error):
                raise
            return None
    return found


def _opened_up(path: str, found: os.stat_result) -> os.stat_result:
    """A file or folder, once its owner may read it: code makes some that not even it may, by a mode
    or a umask. Raises OSError."""
    is_folder = stat.S_ISDIR(found.st_mode)
    needed = 0o700 if is_folder else 0o400
    if found.st_mode & needed == needed or not (is_folder or stat.S_ISREG(found.st_mode)):
        return found
    held = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with suppress(PermissionError):
            os.chmod(f"/proc/self/fd/{held}", stat.S_IMODE(found.st_mode) | needed)
        return os.fstat(held)
    finally:
        os.close(held)


def usage(path: str, limits: Limits) -> int | None:
    """Bytes of files in a state's folder; None as for `contents`."""
    found = contents(path, limits)
    return None if found is None else found.total


def remove(path: str) -> None:
    """Remove a folder of sessions that have ended, whatever its modes and however deep it is."""
    with suppress(OSError):  # it is gone already, or a mount point that its outer process removes
        os.chmod(path, 0o700)
        _empty(path)
        os.rmdir(path)


def _empty(path: str) -> None:
    token = secrets.token_hex(8)
    free_names = (os.path.join(path, f"{token}-{number}") for number in itertools.count())
    while folders := _remove_files(path):
        for folder in folders:
            os.chmod(folder, 0o700)
            for inner in _remove_files(folder):
                os.chmod(inner, 0o700)
                os.rename(inner, next(free_names))
            os.rmdir(folder)


def _remove_files(path: str) -> list[str]:
    """Remove what is in a folder, but for the folders in it: their paths."""
    with os.scandir(path) as entries:
        found = list(entries)
    folders = [entry.path for entry in found if entry.is_dir(follow_symlinks=False)]
    for entry in found:
        if not entry.is_dir(follow_symlinks=False):
            os.unlink(entry.path)
    return folders


def make_folders(tree: str, count: int, user: int | None) -> list[str]:
    """A tree's folder with `count` work folders, of another `user` if need be: their names."""
    os.mkdir(tree, 0o711)
    names = [secrets.token_hex(8) for _ in range(count)]
    for name in names:
        path = os.path.join(tree, name)
        os.mkdir(path, 0o700)
        if user is not None:
            os.chown(path, user, user)
    return names


async def aside(work: Callable[..., _Result], *arguments: object) -> _Result:
    """Call what may take long, once, in a thread; here, if the system lets no thread be started:
    what was handed to the threads then is still with them, and another one may come to it."""
    done, turn = list[_Result](), threading.Lock()

    def once() -> _Result:
        with turn:
            if not done:
                done.append(work(*arguments))
            return done[0]

    try:
        return await asyncio.get_running_loop().run_in_executor(_THREADS, once)
    except RuntimeError:
        return once()


class TreeFolder:
    """A tree's folder, seen from the supervisor. A folder that is used again gets another name, so
    that who knew the old one is none the wiser."""

    def __init__(self, path: str, names: Sequence[str]) -> None:
        """`names` as from `make_folders`; the first one is in use. The others get new ones before
        they are, and so does the tree's folder: code could find the old ones in what it has of the
        spawner's memory. Raises OSError."""
        self.path = os.path.join(os.path.dirname(path), secrets.token_hex(8))
        os.rename(path, self.path)
        self._free: list[str] = []
        self._fresh = [os.path.join(self.path, name) for name in names[1:]]

    def take(self) -> str | None:
        """An empty work folder's path, which nobody has seen; None if all are in use. Raises
        OSError."""
        if self._free:
            return self._free.pop()
        return self.rename(self._fresh.pop()) if self._fresh else None

    def give_back_empty(self, folder: str) -> bool:
        """Give back a folder of which nothing has to be removed, which takes no time; False if
        that cannot be done."""
        try:
            with os.scandir(folder) as entries:
                if next(entries, None) is not None:
                    return False
            os.chmod(folder, 0o700)
            self._free.append(self.rename(folder))
        except OSError:
            return False
        return True

    def give_back(self, folder: str) -> None:
        """Its process has ended: empty it for the next one. It is lost if that fails."""
        with suppress(OSError):
            os.chmod(folder, 0o700)
            _empty(folder)
            self.give_back_empty(folder)

    def rename(self, folder: str) -> str:
        """Give a folder in use a name that its code never saw: the new path. Raises OSError."""
        renamed = os.path.join(self.path, secrets.token_hex(8))
        os.rename(folder, renamed)
        return renamed

    def remove(self) -> None:
        """Remove everything; no process works in it any longer."""
        remove(self.path)
