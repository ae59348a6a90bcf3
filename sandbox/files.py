"""Files that a caller puts into a session's work folder or gets from it, from outside.

The code of the session takes no part: its process is stopped meanwhile, and no byte goes through
it. What it has left in the folder is not trusted: each part of a path is opened by itself, a link
is never followed, and only a plain file is read.
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import stat
from contextlib import suppress
from pathlib import PurePosixPath

from sandbox.limits import Limits
from sandbox.process import SessionProcess
from sandbox.results import BROKEN, CallResult, FileRefused, Kind, Put, SandboxFailure
from sandbox.shortage import explained
from sandbox.workdir import Contents, aside, contents, size

_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_PLAIN_MODE, _FOLDER_MODE = 0o644, 0o755
_PAGE = 4096
_HOST_SHORT = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO}
"""Errors of the host; all others come from the name, or from what the code left in its place."""


def checked(name: str, data: bytes, limits: Limits, *, kept: bool) -> Put:
    """What to put under `name` in a session; `kept`: whether that keeps anything.

    Raises FileRefused, TypeError.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise TypeError(f"put({name!r:.100}, …): use bytes, not {type(data).__name__}")
    most = limits.file_mib << 20
    length = memoryview(data).nbytes
    if length > most:
        raise FileRefused(f"put({name!r:.100}, …): {length:,} bytes; a session may have {most:,}")
    if not kept:
        raise FileRefused(
            f"put({name!r:.100}, …): the session keeps nothing, so no call would find the file; "
            "put it into a session that is opened with another `keep`"
        )
    return Put("/".join(parts_of(name)), bytes(data))


def parts_of(name: str) -> tuple[str, ...]:
    """The parts of a relative path that stays below where it begins. Raises FileRefused."""
    if not isinstance(name, str):
        raise FileRefused(f"file {name!r:.100}: use a relative path as str")
    parts = PurePosixPath(name).parts
    try:
        sound = b"\0" not in os.fsencode(name) and all(len(os.fsencode(p)) < 256 for p in parts)
    except UnicodeEncodeError:
        sound = False
    if not parts or name.startswith("/") or ".." in parts or not sound:
        raise FileRefused(f"file {name!r:.100}: use a relative path below the work folder, no ..")
    return parts


async def put(process: SessionProcess, file: Put, limits: Limits) -> CallResult:
    """Put a file into the work folder of a process, in the place of a call: all of it or, if it is
    refused, nothing. Raises SandboxFailure."""
    if not await process.ready():
        lost = await process.killed_from_outside() or not (process.alive or process.ended_itself)
        process.kill()
        if lost:
            raise SandboxFailure("the session's process was lost")
        return BROKEN  # it ended itself, or does not do as it is told
    writing = asyncio.ensure_future(aside(_write, process.folder, file, limits))
    try:
        await asyncio.shield(writing)
    except FileRefused as refused:
        _check_there(process)
        name = type(refused).__name__
        return CallResult(kind=Kind.ERROR, error_type=name, traceback=str(refused))
    except BaseException:
        await asyncio.wait({writing})  # before the folder can be somebody else's
        process.kill()
        raise
    process.holdings.count(process.folder, limits)
    return CallResult(kind=Kind.OK)


async def get(process: SessionProcess, name: str, limits: Limits) -> bytes:
    """A file in the work folder of a process. Raises FileRefused, SandboxFailure."""
    if not await process.stopped():
        raise SandboxFailure("the session's process was lost")
    try:
        return await aside(_read, process.folder, name, limits)
    except FileRefused:
        _check_there(process)
        raise


def _check_there(process: SessionProcess) -> None:
    """Raise SandboxFailure if the process was lost, and perhaps its folder with it."""
    if not process.alive and not process.ended_itself:
        raise SandboxFailure("the session's process was lost")


def _refusal(name: str, error: OSError) -> Exception:
    if error.errno in _HOST_SHORT:
        return SandboxFailure(f"file {name!r}: {explained(OSError(error.errno, error.strerror))}")
    return FileRefused(f"file {name!r}: {error.strerror}")


def _open_folder(folder: str, parts: tuple[str, ...], owner: os.stat_result | None) -> int:
    """Descriptor of the folder below `folder` that `parts` name. With an `owner`, those that are
    not there are made. Raises OSError."""
    current = os.open(folder, _FOLDER)
    for part in parts:
        try:
            if owner is not None:
                with suppress(FileExistsError):
                    os.mkdir(part, _FOLDER_MODE, dir_fd=current)
                    _hand_over(part, current, owner)
            inner = os.open(part, _FOLDER, dir_fd=current)
        finally:
            os.close(current)
        current = inner
    return current


def _hand_over(part: str, folder: int, owner: os.stat_result) -> None:
    """Give what was made to the user of the session."""
    if owner.st_uid != os.geteuid():
        os.chown(part, owner.st_uid, owner.st_gid, dir_fd=folder, follow_symlinks=False)


def _write(folder: str, file: Put, limits: Limits) -> None:
    """Raises FileRefused, SandboxFailure."""
    *above, last = parts_of(file.name)
    found = contents(folder, limits)
    if found is None or not _fits(found, file, limits):
        most = f"{limits.files} files and folders, {limits.file_mib} MiB"
        raise FileRefused(f"put({file.name!r}, …): no room; a session may have {most}")
    try:
        owner = os.stat(folder)
        within = _open_folder(folder, tuple(above), owner)
    except OSError as error:
        raise _refusal(file.name, error) from None
    aside_name = f".{secrets.token_hex(16)}"
    try:
        writing = os.open(aside_name, _NEW, _PLAIN_MODE, dir_fd=within)
        try:
            view = memoryview(file.data)
            while view:
                view = view[os.write(writing, view) :]
        finally:
            os.close(writing)
        _hand_over(aside_name, within, owner)
        os.rename(aside_name, last, src_dir_fd=within, dst_dir_fd=within)
    except OSError as error:
        raise _refusal(file.name, error) from None
    finally:
        with suppress(OSError):
            os.unlink(aside_name, dir_fd=within)
        os.close(within)


def _fits(found: Contents, file: Put, limits: Limits) -> bool:
    """Whether there is room for it, in the place of what has its name now."""
    old = found.files.get(file.name)
    above = len(parts_of(file.name)) - 1  # at most so many folders are new
    count = found.count + (0 if old else 1 + above)
    taken = -(-len(file.data) // _PAGE) * _PAGE
    total = found.total - (old[0] if old else 0) + taken
    return count <= limits.files and total <= limits.file_mib << 20


def _read(folder: str, name: str, limits: Limits) -> bytes:
    """Raises FileRefused, SandboxFailure."""
    *above, last = parts_of(name)
    most = limits.file_mib << 20
    opened = list[int]()
    try:
        opened.append(_open_folder(folder, tuple(above), None))
        flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
        opened.append(os.open(last, flags, dir_fd=opened[-1]))
        status = os.fstat(opened[-1])
        if not stat.S_ISREG(status.st_mode):
            raise FileRefused(f"file {name!r}: it is no plain file")
        if size(status) > most:
            raise FileRefused(f"file {name!r}: it has more than {limits.file_mib} MiB")
        with open(f"/proc/self/fd/{opened[-1]}", "rb") as file:
            return file.read(most)
    except OSError as error:
        raise _refusal(name, error) from None
    finally:
        for descriptor in opened:
            os.close(descriptor)
