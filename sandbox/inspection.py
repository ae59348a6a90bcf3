"""What the kernel says of a session's process, for the supervisor to compare with what must be.

Nothing here asks the process. Invariant: a process of which something cannot be seen, or looks
other than it must, is not forked and takes no call as a branch: its state is rebuilt by replay.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from sandbox.seccomp import number_of
from sandbox.shortage import raise_if_short
from sandbox.wire import WORK_FD
from sandbox.workdir import size

_LIBC = ctypes.CDLL(None, use_errno=True)
_CAPABILITY_VERSION = 0x20080522
_LINKS_OF_NONE = 2
"""Links of a folder that has none in it."""

THREADS, DESCRIPTORS = "threads", "descriptors"
"""What may keep a process from being forked."""
_FACTS_BYTES = 4096
"""More than the kernel says in a short file of `/proc`."""

Identity = tuple[int, int]
"""Device and inode number: of a file, a folder, a pipe or a socket."""


def identity(found: os.stat_result) -> Identity:
    """What the kernel knows an open file by."""
    return found.st_dev, found.st_ino


class Unseen(Exception):
    """The process is gone."""


class Hidden(Unseen):
    """The kernel does not let this supervisor look at the process."""


@dataclass(frozen=True, slots=True)
class Sight:
    """One look at a stopped process, or at one that waits for orders."""

    pid: int
    threads: int
    given: tuple[Identity, ...]
    """What its descriptors 0 to 4 are."""
    plain: bool
    """Whether its further descriptors are all plain files that were opened for reading and lie
    outside the sandbox's folders."""
    working: Identity
    """The folder that it stands in."""
    nameless: int
    """Bytes of files that it keeps without a name; 0 if nobody asked."""
    weight: int | None
    """Its share of memory, see `proportional_bytes`; None if nobody asked."""

    @classmethod
    def of(cls, pid: int, root: str, *, largest: int = 0, weigh: bool = False) -> Sight:
        """`root`: the folder that holds all work folders. `largest`: ask for `nameless` as well;
        `weigh`: for `weight`. Raises Unseen, Hidden, and OSError for want of something here."""
        try:
            try:
                return cls._of(pid, root, largest, weigh)
            except PermissionError:
                with _as_owner(pid):
                    return cls._of(pid, root, largest, weigh)
        except OSError as error:
            raise_if_short(error)
            unseen = Hidden if isinstance(error, PermissionError) else Unseen
            raise unseen(f"/proc/{pid}: {error.strerror}") from None

    @classmethod
    def _of(cls, pid: int, root: str, largest: int, weigh: bool) -> Sight:
        own: Sequence[int] = range(WORK_FD + 1)
        others = list[int]()
        if num_descriptors(pid) != len(own):
            numbers = sorted(map(int, os.listdir(f"/proc/{pid}/fd")))
            own = [number for number in numbers if number <= WORK_FD]
            others = numbers[len(own) :]
        return cls(
            pid=pid,
            threads=num_threads(pid),
            given=tuple(_identity_of(pid, number) for number in own),
            plain=all(_is_plain(pid, number, root) for number in others),
            working=identity(os.stat(f"/proc/{pid}/cwd")),
            nameless=(nameless_bytes(pid, root, largest=largest) or 0) if largest else 0,
            weight=proportional_bytes(pid) if weigh else None,
        )

    def fault(self, given: Sequence[Identity], folder: str) -> str:
        """What keeps it from being forked, in a word; empty if nothing does. `given`: what it was
        given as descriptors 0 to 3; 4 must be its work `folder`, in which it must stand. Raises
        OSError for want of something here."""
        if self.threads > 1:
            return THREADS
        try:
            honest = self.given == (*given, identity(os.stat(folder))) and self._stands_in(folder)
        except OSError as error:  # it removed the folder
            raise_if_short(error)
            honest = False
        return "" if honest and self.plain else DESCRIPTORS

    def _stands_in(self, folder: str) -> bool:
        """Whether it stands in its work folder, or in one below."""
        if self.working == identity(os.stat(folder)):
            return True
        below = os.walk(folder, onerror=raise_if_short)
        return any(self.working == identity(os.stat(path)) for path, _, _ in below)


def is_shown(pid: int) -> bool:
    """Whether the kernel shows a process to this supervisor; needs no descriptor."""
    try:
        with _as_owner(pid):
            os.stat(f"/proc/{pid}/cwd")
    except OSError:
        return False
    return True


def is_bare(pid: int, folder: Identity) -> bool:
    """Whether the kernel shows that a process has nothing open and stands in this folder. False
    also if it does not show this, or does not count descriptors (before Linux 6.2)."""
    try:
        counts = os.stat("/proc/self/fd").st_size > 0
        bare = counts and num_descriptors(pid) == 0
        return bare and identity(os.stat(f"/proc/{pid}/cwd")) == folder
    except OSError:
        return False


def ids_of(pidfd: int) -> tuple[int, int]:
    """A process's id here and in the innermost namespace it is in; -1 once it was reaped."""
    with open(f"/proc/self/fdinfo/{pidfd}", "rb", buffering=0) as file:
        _, _, after = file.read(_FACTS_BYTES).partition(b"\nPid:")
    here, _, inner = after.partition(b"\nNSpid:")
    return int(here.split()[0]), int((inner or here).split(b"\n", 1)[0].split()[-1])


def facts(pid: int, name: str) -> bytes:
    """What a short file under `/proc/PID` says. Raises OSError."""
    descriptor = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, _FACTS_BYTES)
    finally:
        os.close(descriptor)


def num_descriptors(pid: int) -> int:
    """How many descriptors a process has open, by the kernel's count, which it shows to everybody;
    0 where it does not count (before Linux 6.2). Raises OSError if the process is gone."""
    return os.stat(f"/proc/{pid}/fd").st_size


def num_threads(pid: int) -> int:
    """Threads of a process, of which the id of any will do. Raises OSError if it is gone."""
    return os.stat(f"/proc/{pid}/task").st_nlink - _LINKS_OF_NONE


def nameless_bytes(pid: int, root: str, *, largest: int = 0) -> int | None:
    """Bytes of files below `root` that have no name any more but are kept open or, if it is said
    how many a file may have at most, mapped; None where the kernel does not show them."""
    found = dict[Identity, int]()
    try:
        for number in os.listdir(f"/proc/{pid}/fd"):
            link = f"/proc/{pid}/fd/{number}"
            status = os.stat(link)
            lost = stat.S_ISREG(status.st_mode) and status.st_nlink == 0
            if lost and os.readlink(link).startswith(root):
                found[identity(status)] = size(status)
        for file in _mapped(pid, root) if largest else ():
            found.setdefault(file, largest)  # how much of it is not mapped cannot be seen
    except OSError as error:
        raise_if_short(error)
        return None
    return sum(found.values())


def _mapped(pid: int, root: str) -> set[Identity]:
    """Files below `root` without a name that are mapped. Raises OSError."""
    found = set[Identity]()
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.endswith(" (deleted)\n") and f" {root}/" in line:
                found.add(_identity(*line.split()[3:5]))
    return found


def proportional_bytes(pid: int) -> int | None:
    """The process's share of memory, by the kernel's count: each page divided by those who have
    it. None where only its owner may know."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file.read().splitlines()[1:])
    except OSError:
        return None
    return sum(int(lines[name].split()[0]) for name in ("Pss", "SwapPss")) << 10


def _identity(device: str, inode: str) -> Identity:
    """As `/proc/PID/maps` writes it."""
    major, _, minor = device.partition(":")
    return os.makedev(int(major, 16), int(minor, 16)), int(inode)


@contextmanager
def _as_owner(pid: int) -> Iterator[None]:
    """Have the kernel take this thread, where it is root's without the right to look at all
    processes, for one of the user that the process belongs to."""
    owner = os.stat(f"/proc/{pid}").st_uid
    if owner == os.geteuid() or os.geteuid() != 0:
        yield
        return
    _become(owner)
    try:
        yield
    finally:
        _become(0)


def _become(user: int) -> None:
    """For this thread alone, in whatever concerns files, and as its real user."""
    header, held = struct.pack("<Ii", _CAPABILITY_VERSION, 0), ctypes.create_string_buffer(24)
    for call in ("setresgid", "setresuid"):
        _LIBC.syscall(number_of(call), user, -1, -1)
    for call in ("setfsgid", "setfsuid"):
        _LIBC.syscall(number_of(call), user)
    _LIBC.capget(header, held)
    words = list(struct.unpack("<6I", held.raw))
    words[0], words[3] = words[1], words[4]  # a change of the user has taken some out of force
    _LIBC.capset(header, struct.pack("<6I", *words))


def _identity_of(pid: int, number: int) -> Identity:
    """What a descriptor is; nothing at all if it is closed."""
    try:
        return identity(os.stat(f"/proc/{pid}/fd/{number}"))
    except FileNotFoundError:
        return 0, 0


def _is_plain(pid: int, number: int, root: str) -> bool:
    link = f"/proc/{pid}/fd/{number}"
    found = os.stat(link)
    with open(f"/proc/{pid}/fdinfo/{number}", encoding="ascii") as file:
        facts = dict(line.split(":", 1) for line in file if ":" in line)
    reads = int(facts["flags"], 8) & os.O_ACCMODE == os.O_RDONLY
    outside = not os.readlink(link).startswith(root)
    return reads and outside and stat.S_ISREG(found.st_mode) and found.st_nlink > 0
