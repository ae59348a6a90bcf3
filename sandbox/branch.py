"""How a session's process becomes two: the fork itself, and the work folder under a lasting name.

Runs inside, next to hostile code. Invariant: code finds its files by the same absolute path in
every branch, although each branch has a copy of its own.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import signal
import stat

from sandbox.seccomp import STEP_FORK, number_of
from sandbox.wire import WORK_FD

_LIBC = ctypes.PyDLL(None)
"""Keeps the interpreter lock: the process must be alone in itself when it forks."""
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_LASTING = f"/proc/self/fd/{WORK_FD}"
_CHUNK = 1 << 20
_ORPHANED_STATUS = 73


def fork() -> int:
    """0 in the branch, the branch's process id here, negative if the supervisor refused."""
    none = ctypes.c_long(0)
    flags = ctypes.c_long(STEP_FORK)
    return int(_LIBC.syscall(ctypes.c_long(number_of("clone")), flags, none, none, none, none))


def take_over(descriptors: list[int], spawner: int) -> None:
    """Make a branch use the descriptors meant for it and end when the spawner does."""
    for number, given in enumerate(descriptors):
        os.dup2(given, number)
    _reopen()
    _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)  # a fork clears it
    if os.getppid() != spawner:
        os._exit(_ORPHANED_STATUS)


def show_owner(visible: bool) -> None:
    """Let processes of the same user see this one's `/proc` entries, or no longer."""
    _LIBC.prctl(_PR_SET_DUMPABLE, int(visible), 0, 0, 0)


def _reopen() -> None:
    """Open the files that are being read once more, so that the branch has positions of its own in
    them. What cannot be opened stays as it is: the supervisor sees that, and does not use it."""
    for number in range(WORK_FD + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0]):
        try:
            mode = os.fstat(number).st_mode
            if not stat.S_ISREG(mode) or fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE:
                continue
            again = os.open(os.readlink(f"/proc/self/fd/{number}"), os.O_RDONLY)
        except OSError:
            continue
        os.lseek(again, os.lseek(number, 0, os.SEEK_CUR), os.SEEK_SET)
        os.dup2(again, number, inheritable=False)
        os.close(again)


class Place:
    """The work folder. Made once, in the first process of a tree."""

    def __init__(self) -> None:
        self._getcwd, self._folder = os.getcwd, os.getcwd()
        try:
            self._lasts = os.path.samestat(os.stat(_LASTING), os.stat("."))
        except OSError:  # no /proc here: then absolute paths are good for one state only
            self._lasts = False
        if self._lasts:
            vars(os).update(getcwd=self._cwd, getcwdb=lambda: os.fsencode(self._cwd()))
        self._tell()

    def move(self, folder: str) -> None:
        """Go on in `folder`, an empty one, with a copy of everything."""
        here, top = self._getcwd(), self._top()
        inner = here[len(top) + 1 :] if here.startswith(top) else ""
        flags = os.O_RDONLY | os.O_DIRECTORY
        source = os.open(".", flags, dir_fd=WORK_FD)  # a position of its own in the listing
        target = os.open(folder, flags)
        umask = os.umask(0)
        _copy(source, target)
        os.umask(umask)
        os.dup2(target, WORK_FD)
        os.close(source)
        os.close(target)
        self._folder = folder
        os.chdir(os.path.join(folder, inner))
        self._tell()

    def _cwd(self) -> str:
        path, top = self._getcwd(), self._top()
        return _LASTING + path[len(top) :] if path.startswith(top) else path

    def _top(self) -> str:
        """Where the work folder is now: once a process has branches, its folder was renamed."""
        return os.readlink(_LASTING) if self._lasts else self._folder

    def _tell(self) -> None:
        name = _LASTING if self._lasts else self._folder
        os.environ.update(HOME=name, TMPDIR=name)


def _copy(source: int, target: int) -> None:
    """All plain files and folders of one open folder into another; there is nothing else."""
    with os.scandir(source) as entries:
        for entry in reversed(list(entries)):  # a file system in memory lists the newest first
            mode = entry.stat(follow_symlinks=False).st_mode & 0o777
            if not entry.is_dir(follow_symlinks=False):
                _copy_file(entry.name, mode, source, target)
                continue
            os.mkdir(entry.name, mode | 0o700, dir_fd=target)
            inner = [
                os.open(entry.name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=at)
                for at in (source, target)
            ]
            _copy(*inner)
            for descriptor in inner:
                os.close(descriptor)


def _copy_file(name: str, mode: int, source: int, target: int) -> None:
    writing = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode, dir_fd=target)
    try:
        reading = os.open(name, os.O_RDONLY, dir_fd=source)
    except PermissionError:  # its own umask locked the code out: so it stays, as an empty file
        os.close(writing)
        return
    while data := os.read(reading, _CHUNK):
        os.write(writing, data)
    os.close(reading)
    os.close(writing)
