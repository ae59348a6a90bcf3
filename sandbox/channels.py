"""The channels between one process of a session and its supervisor."""

from __future__ import annotations

import os
import resource
import socket

from sandbox.inspection import identity
from sandbox.wire import CONTROL_FD, STREAMS_MARK

_SPARE = 16
"""Descriptors that must be left for looking at processes once one has its channels."""


class Ends:
    """The supervisor's ends of one process's channels, and those of the process: stdin, which is at
    its end, stdout, stderr and control. No two processes are given the same."""

    def __init__(self) -> None:
        """Raises OSError, also when so few descriptors are left that nobody could look after the
        process."""
        self._given: list[int] = []
        self.pipes: list[int] = []
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            stdin, unused = os.pipe()
            os.close(unused)
            self._given.append(stdin)
            for _ in ("stdout", "stderr"):
                reading, writing = os.pipe()
                self.pipes.append(reading)
                self._given.append(writing)
            _require_spare(max(self._given))
        except OSError:
            theirs.close()
            self.close()
            raise
        self._given.append(theirs.detach())
        self.identities = tuple(identity(os.fstat(end)) for end in self._given)
        """What the kernel knows the given ends by, also once they are in the process."""
        for descriptor in (self.control.fileno(), *self.pipes):
            os.set_blocking(descriptor, False)

    @property
    def given(self) -> list[int]:
        """stdin, stdout, stderr and control of the process, in the order of its descriptors."""
        return list(self._given)

    def hand_over_streams(self, *more: int) -> None:
        """Send the process the others through its control channel, and `more` descriptors behind
        them. Raises OSError."""
        socket.send_fds(self.control, [STREAMS_MARK], [*self._given[:CONTROL_FD], *more])

    def sent(self) -> None:
        """The process has its ends: close our copies."""
        while self._given:
            os.close(self._given.pop())

    def close(self) -> None:
        """Close everything."""
        self.sent()
        self.control.close()
        while self.pipes:
            os.close(self.pipes.pop())


def _require_spare(descriptor: int) -> None:
    """Raises OSError if few more descriptors can be had than one that was just opened: the kernel
    gives out the lowest numbers first."""
    if descriptor + _SPARE < resource.getrlimit(resource.RLIMIT_NOFILE)[0]:
        return
    spare = list[int]()
    try:
        for _ in range(_SPARE):
            spare.append(os.dup(descriptor))
    finally:
        for each in spare:
            os.close(each)
