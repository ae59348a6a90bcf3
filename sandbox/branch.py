"""How a session's process becomes two: the fork itself, and the work folder under a lasting name.

Runs inside, next to hostile code. Invariant: code finds its files by the same absolute path in
every branch, although each branch has a copy of its own.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import select
import signal
import socket
import stat
from dataclasses import dataclass

from sandbox.seccomp import STEP_FORK, number_of
from sandbox.wire import CONTROL_FD, STREAMS_MARK, WORK_FD

_LIBC = ctypes.PyDLL(None, use_errno=True)
"""Keeps the interpreter lock: the process must be alone in itself when it forks."""
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_DESCRIPTORS = "/proc/self/fd"
_LASTING = f"{_DESCRIPTORS}/{WORK_FD}"
_CHUNK = 1 << 20
_FOLDER = os.O_RDONLY | os.O_DIRECTORY
_STREAMS_ROOM = socket.CMSG_SPACE(4 * (CONTROL_FD + 1))
_ORPHANED_STATUS, _UNBORN_STATUS = 73, 74


def fork() -> int:
    """0 in the branch, the branch's process id here, or negative: what prevented it."""
    none = ctypes.c_long(0)
    flags = ctypes.c_long(STEP_FORK)
    made = int(_LIBC.syscall(ctypes.c_long(number_of("clone")), flags, none, none, none, none))
    return made if made >= 0 else -ctypes.get_errno()


@dataclass(frozen=True, slots=True)
class Luggage:
    """What a branch takes along, put together before the fork: a new process is slow at first."""

    readings: list[_Reading]
    inner: str
    """Where it stands, from its work folder on."""
    has_files: bool


def take_over(place: Place, luggage: Luggage, folder: str, ticket: int, spawner: int) -> None:
    """Go on as a branch that works in `folder`, and end when the spawner does.

    What it has open until now is not its own: the supervisor gives it other descriptors when it
    asks, with its `ticket`, to stand in its work folder, a control channel above all.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)  # a fork clears it
    if os.getppid() != spawner:
        os._exit(_ORPHANED_STATUS)
    problem, most = 0, place.numbers.stop
    try:
        if luggage.has_files:
            _close(0, WORK_FD)
            _close(WORK_FD + 1, most)  # a copy needs some: the code may have taken all there are
            _copy_all(folder)
        os.chdir(folder)
    except OSError as error:
        problem = error.errno or errno.EIO
    _close(0, most)
    if _be_born(ticket, problem) == 0:  # it stands in the folder, for the kernel did as it was told
        _close(0, CONTROL_FD)  # what the supervisor puts there that is not sure of the rest
        _close(WORK_FD + 1, most)
    place.control.recvmsg(len(STREAMS_MARK), _STREAMS_ROOM)  # with what becomes 0 to 2, perhaps 4
    for reading in luggage.readings:
        reading.resume()
    place.settle(folder, luggage.inner)


def _close(first: int, stop: int) -> None:
    """As `os.closerange`, by the one call that closes standard output and error too."""
    _LIBC.syscall(*map(ctypes.c_ulong, (number_of("close_range"), first, stop - 1, 0)))


def _be_born(ticket: int, problem: int) -> int:
    """Stand in the work folder, when the supervisor lets it: then 0. If it could see that this
    process stands there, it gives it the control channel instead: CONTROL_FD. Never returns if it
    does neither."""
    call = number_of("fchdir"), WORK_FD, ticket, problem
    words = [ctypes.c_ulong(word) for word in call]
    while (born := int(_LIBC.syscall(*words))) < 0:
        if ctypes.get_errno() != errno.EINTR:
            os._exit(_UNBORN_STATUS)
    return born


def show_owner(visible: bool) -> None:
    """Let processes of the same user see this one's `/proc` entries, or no longer."""
    _LIBC.prctl(_PR_SET_DUMPABLE, int(visible), 0, 0, 0)


class _Reading:
    """A file that is being read, to be opened once more, so that the branch has a position of its
    own in it."""

    def __init__(self, number: int) -> None:
        """Raises OSError if descriptor `number` is anything else."""
        reads = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        if not (reads and stat.S_ISREG(os.fstat(number).st_mode)):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        self._number, self._path = number, os.readlink(f"/proc/self/fd/{number}")
        if not os.path.samestat(os.stat(self._path), os.fstat(number)):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        self._at = os.lseek(number, 0, os.SEEK_CUR)

    def resume(self) -> None:
        again = os.open(self._path, os.O_RDONLY)
        os.lseek(again, self._at, os.SEEK_SET)
        if again != self._number:
            os.dup2(again, self._number, inheritable=False)
            os.close(again)


class Place:
    """The work folder and the descriptors. Made once, in the first process of a tree."""

    def __init__(self) -> None:
        self._getcwd, self._folder = os.getcwd, os.getcwd()
        self._given = _first_descriptors()
        self.control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, CONTROL_FD)
        self.numbers = range(WORK_FD + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        """Those that descriptors of the code's own may have."""
        self._beyond = select.poll()
        for number in self.numbers:
            self._beyond.register(number)
        try:
            self._lasts = os.path.samestat(os.stat(_LASTING), os.stat("."))
        except OSError:  # no /proc here: then absolute paths are good for one state only
            self._lasts = False
        if self._lasts:
            vars(os).update(getcwd=self._cwd, getcwdb=lambda: os.fsencode(self._cwd()))
        self._tell()

    def open_descriptors(self) -> list[int]:
        """Those that the code has opened. Raises OSError if it has changed any of its first ones,
        which a branch cannot go on with."""
        if _first_descriptors() != self._given:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if self._lasts and os.stat(_DESCRIPTORS).st_size == self.numbers.start:  # none beyond
            return []
        closed = {number for number, event in self._beyond.poll(0) if event & select.POLLNVAL}
        return [number for number in self.numbers if number not in closed]

    def pack(self) -> Luggage:
        """What a branch will take along. Raises OSError if it cannot take all there is."""
        readings = [_Reading(number) for number in self.open_descriptors()]
        here, top = self._getcwd(), self._top()
        inner = here[len(top) + 1 :] if here.startswith(top) else ""
        return Luggage(readings, inner, _may_have_files(WORK_FD))

    def settle(self, folder: str, inner: str) -> None:
        """Go on at `inner` in the work folder, in which this process stands now."""
        self._given = _first_descriptors()
        if inner:
            os.chdir(inner)
        if not self._lasts:
            self._folder = folder
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


def _first_descriptors() -> list[tuple[int, int]]:
    """What is open under the numbers that every process is given, by device and inode. Raises
    OSError if one is not."""
    return [(each.st_dev, each.st_ino) for each in map(os.fstat, range(WORK_FD + 1))]


def _may_have_files(folder: int) -> bool:
    """Whether an open folder is not empty, as far as one can know: to look takes a descriptor."""
    try:
        return bool(os.listdir(folder))
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        return True


def _copy_all(folder: str) -> None:
    """Put a copy of everything into `folder`, an empty one. However deep the folders are, only two
    are open at a time, and those above them are not."""
    umask = os.umask(0)
    waiting: list[tuple[str, ...]] = [()]
    while waiting:
        parts = waiting.pop()
        source, target = _opened(".", parts, WORK_FD), _opened(folder, parts)
        waiting += [(*parts, name) for name in _copy(source, target)]
        os.close(source)
        os.close(target)
    os.umask(umask)


def _opened(top: str, parts: tuple[str, ...], at: int | None = None) -> int:
    """The folder that the `parts` of its path name below `top`, which is seen from `at`."""
    current = os.open(top, _FOLDER, dir_fd=at)
    for part in parts:
        inner = os.open(part, _FOLDER, dir_fd=current)
        os.close(current)
        current = inner
    return current


def _copy(source: int, target: int) -> list[str]:
    """All plain files of one open folder into another, and the folders in it, which stay empty:
    their names. There is nothing else."""
    folders = list[str]()
    with os.scandir(source) as entries:
        found = list(entries)
    for entry in reversed(found):  # a file system in memory lists the newest first
        mode = entry.stat(follow_symlinks=False).st_mode & 0o777
        if entry.is_dir(follow_symlinks=False):
            os.mkdir(entry.name, mode | 0o700, dir_fd=target)
            folders.append(entry.name)
        else:
            _copy_file(entry.name, mode, source, target)
    return folders


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
