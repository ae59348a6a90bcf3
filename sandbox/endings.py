"""How calls and processes end, and who brought it about, by what the kernel says."""

from __future__ import annotations

import os
import signal
from collections.abc import Container
from contextlib import suppress
from dataclasses import dataclass

from sandbox.inspection import facts, ids_of, num_threads
from sandbox.limits import OUTPUT_KILL_BYTES, Limits
from sandbox.results import Kind, SandboxFailure
from sandbox.shortage import explained, raise_if_short
from sandbox.wire import OUT_OF_MEMORY_STATUS

THERE = {"R", "S", "D", "T", "t", "I"}
"""Letters in /proc for a process that has not ended."""
_FLAGS, _EXITING = 9 - 3, 0x4
"""Field of /proc/PID/stat, counted from behind the command's name, and the kernel's mark in it for
who is on its way out."""
_MOST_CROWDED = 3.0
"""Patience grows by this factor at most."""
REPORT_S = 0.5
"""Seconds that the report of a process's end may take, once it has ended."""


@dataclass(frozen=True, slots=True)
class End:
    """How a process ended."""

    status: int | None
    """The status from wait(2); None if the spawner died first."""
    cpu_s: float = 0.0
    """CPU time of its whole life."""

    @property
    def killed(self) -> bool:
        """Whether a SIGKILL ended it, which no code can send, or the death of its spawner."""
        return self.status is None or os.waitstatus_to_exitcode(self.status) == -signal.SIGKILL


@dataclass(frozen=True, slots=True)
class Stop:
    """The supervisor's reason to end a call."""

    kind: Kind
    why: str


FLOOD = Stop(Kind.OUTPUT, f"more than {OUTPUT_KILL_BYTES >> 20} MiB of output")
HEADLESS = Stop(Kind.KILLED, "its first thread ended before the others")
FELLED = Stop(Kind.SANDBOX_FAILURE, "killed from outside (out of memory on the host?)")
"""What comes of a SIGKILL, which the filter denies to code: the kernel's, or an operator's."""
HOARD = Stop(
    Kind.SANDBOX_FAILURE,
    "other programs filled the file system of the work folders during the call: set TMPDIR to "
    "another one",
)
"""What comes of a call whose process may keep files that cannot be seen, if it turns out to have
kept none."""


def patience_s(seconds: float) -> float:
    """How long to wait for what takes a process, possibly hostile, less than `seconds` on a machine
    with a processor for everybody. Others who want one are not its doing."""
    crowd = os.getloadavg()[0] / len(os.sched_getaffinity(0))
    return seconds * min(max(1.0, crowd), _MOST_CROWDED)


class Tampered(SandboxFailure):
    """A process, or something in its place, did not fork as an honest one does."""


class Refused(SandboxFailure):
    """A process could not fork, for want of resources as far as one knows: it may later."""


def state_of(pid: int) -> str:
    """The kernel's letter for what a process does; "" if there is none. Raises OSError for want of
    something."""
    try:
        return facts(pid, "stat").rpartition(b")")[2][1:2].decode()
    except OSError as error:
        raise_if_short(error)
        return ""


def was_killed(pid: int) -> bool:
    """Whether somebody sent a process a SIGKILL, which no code can send. The kernel says so from
    then on until its end is reported, which may take seconds on a busy machine: it frees its memory
    when it gets a processor, and looks alive until then. Raises OSError for want of something."""
    try:
        pending = facts(pid, "status").partition(b"\nShdPnd:")[2].split(maxsplit=1)
    except OSError as error:
        raise_if_short(error)
        return False
    return bool(pending) and bool(int(pending[0], 16) >> (signal.SIGKILL - 1) & 1)


def is_ending(pid: int) -> bool:
    """Whether a process has ended or is about to. Raises OSError for want of something."""
    try:
        fields = facts(pid, "stat").rpartition(b")")[2].split()
    except OSError as error:
        raise_if_short(error)
        return True
    there = fields[0].decode() in THERE and not int(fields[_FLAGS]) & _EXITING
    return not there or was_killed(pid)


def headless(pid: int) -> bool:
    """Whether a process goes on although its first thread, which the kernel shows as the process,
    has ended. No honest one does."""
    if state_of(pid) != "Z":
        return False
    try:
        return num_threads(pid) > 1
    except FileNotFoundError:  # it ended
        return False


def beyond_quota(limits: Limits) -> str:
    """What is said of a process that has too much in files."""
    return f"more than {limits.files} files or {limits.file_mib} MiB of files"


def over_quota(limits: Limits) -> Stop:
    """Why a call ends whose process keeps too much in files."""
    return Stop(Kind.OUTPUT, beyond_quota(limits))


def short_of(error: OSError) -> Stop:
    """Why a call ends that lacked what the supervisor is short of."""
    return Stop(Kind.SANDBOX_FAILURE, explained(error))


def verdict_of(end: End) -> tuple[Kind, str]:
    """Kind and cause of a process that ended without our doing."""
    if end.status is None:
        return Kind.SANDBOX_FAILURE, "the spawner died"
    code = os.waitstatus_to_exitcode(end.status)
    if code == OUT_OF_MEMORY_STATUS:
        return Kind.MEMORY, "out of memory"
    if code >= 0:
        return Kind.EXITED, f"exit status {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    if -code == signal.SIGKILL:
        return FELLED.kind, FELLED.why
    return Kind.KILLED, name


def kill_strays(session: int, members: Container[int]) -> set[int]:
    """Kill every process of a kernel's session that is none of its `members`: their ids, as the
    spawner knows them."""
    killed = set[int]()
    for name in os.listdir("/proc"):
        pid = int(name) if name.isdigit() else 0
        with suppress(OSError):  # it is gone
            if pid and pid not in members and os.getsid(pid) == session:
                pidfd = os.pidfd_open(pid)
                try:
                    if os.getsid(pid) == session:
                        killed.add(ids_of(pidfd)[1])
                        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                finally:
                    os.close(pidfd)
    return killed
