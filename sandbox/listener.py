"""What the processes of a family ask the kernel for and only their supervisor may grant.

Whoever asks waits in the kernel until it is answered. Invariant: what is found out about it, and
done to it, between a question and a successful answer holds at the moment of the answer, for it
does not run in between; if it does (a signal, on old kernels; its death) the answer fails.
"""

from __future__ import annotations

import errno
import fcntl
import select
import struct
from contextlib import suppress
from dataclasses import dataclass

from sandbox.inspection import num_descriptors, num_threads
from sandbox.seccomp import STEP_FORK, number_of

_RECEIVE, _ANSWER, _INSTALL = 0xC0502100, 0xC0182101, 0x40182103
_SET_FLAGS, _WAKE_HERE = 0x40082104, 1
_NOTICE = struct.Struct("=QI4xi12x3Q24x")
"""Number of the question, process or thread, system call, the first three arguments."""
_CONTINUE, _AT_NUMBER, _AND_ANSWER = 1, 1, 2


@dataclass(frozen=True, slots=True)
class Question:
    """One system call that waits for its answer."""

    listener: int
    number: int
    task: int
    """The process id, or that of a thread."""
    call: int
    arguments: tuple[int, int, int]

    @classmethod
    def next(cls, listener: int) -> Question | None:
        """The one that waits longest; None if its asker died meanwhile."""
        notice = bytearray(_NOTICE.size)
        try:
            fcntl.ioctl(listener, _RECEIVE, notice)
        except OSError:
            return None
        number, task, call, *arguments = _NOTICE.unpack(notice)
        return cls(listener, number, task, call, (arguments[0], arguments[1], arguments[2]))

    @property
    def forks(self) -> bool:
        """It wants to become two processes."""
        return self._is("clone") and self.arguments[0] & 0xFFFFFFFF == STEP_FORK

    @property
    def threads(self) -> bool:
        """It wants one more thread."""
        return self._is("clone") and not self.forks

    @property
    def shows(self) -> bool:
        """It wants to show itself to its owner, or to hide."""
        return self._is("prctl")

    @property
    def settles(self) -> bool:
        """It wants to stand in its work folder."""
        return self._is("fchdir")

    def _is(self, name: str) -> bool:
        return self.call == number_of(name)

    def grant(self) -> bool:
        """Let the kernel do it; whether that came to pass."""
        return self._answer(0, _CONTINUE)

    def refuse(self, error: int) -> bool:
        """Answer with an errno; whether that came to pass."""
        return self._answer(-error, 0)

    def _answer(self, error: int, flags: int) -> bool:
        try:
            fcntl.ioctl(self.listener, _ANSWER, struct.pack("=QqiI", self.number, 0, error, flags))
        except OSError:
            return False  # it died or was disturbed meanwhile: then it may ask again
        return True

    @property
    def num_threads(self) -> int:
        """Threads of the process that asks, all together; 0 if it died."""
        try:
            return num_threads(self.task)
        except OSError:
            return 0

    def furnish(self, descriptors: dict[int, int], most: int) -> None:
        """Leave the process, whatever it had open, copies of these descriptors alone, by number.
        It can have none from `most` on. Should there be more, they are replaced by copies of one of
        these. Raises OSError."""
        for number, descriptor in descriptors.items():
            self._install(descriptor, number)
        if num_descriptors(self.task) == len(descriptors):
            return
        for number in set(range(most)).difference(descriptors):
            try:
                self._install(descriptor, number)
            except OSError as error:
                if error.errno != errno.EBADF:  # beyond its limit
                    raise

    def answer_with(self, descriptor: int, number: int) -> None:
        """Leave the process a copy of the descriptor and let it go on, at once; the kernel does not
        do what it asked for. Raises OSError."""
        self._install(descriptor, number, _AND_ANSWER)

    def _install(self, descriptor: int, number: int, flags: int = 0) -> None:
        place = struct.pack("=QIIII", self.number, _AT_NUMBER | flags, descriptor, number, 0)
        fcntl.ioctl(self.listener, _INSTALL, place)


def prepare(listener: int) -> None:
    """Have who asks and who answers wake each other on the processor that they are on: they take
    turns, and share what is in its cache. Kernels before Linux 6.6 do not offer it."""
    with suppress(OSError):
        fcntl.ioctl(listener, _SET_FLAGS, _WAKE_HERE)


def is_orphaned(listener: int) -> bool:
    """Whether nobody is left who could ask."""
    poll = select.poll()
    poll.register(listener, 0)
    return bool(poll.poll(0))
