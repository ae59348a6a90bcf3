"""What one call came to, and the state that a prefix of calls left behind.

Plain picklable data. Everything in a `CallResult` but `kind` and the clocks was said by the code
that ran, so it is data to show and never an instruction. A `SessionState` never changes: a call
makes a new one.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

from sandbox.limits import MAX_CODE_BYTES

ACCIDENTAL = re.compile(r"\b0x[0-9a-fA-F]{6,}|/sandbox-\w{1,16}(?:/\w{1,32}){1,2}")
"""Memory addresses and work folders: never the same twice. Linear in hostile text."""

FENCED = re.compile(r"\s*(`{3,}|~{3,})[^\n`]*\n(.*?)[ \t]*\1\s*", re.DOTALL)
"""Code, the second group, that stands in a Markdown fence."""

KEPT = "kept"
"""`CallResult.snapshot` of a process from which branches can be forked."""


class Keep(StrEnum):
    """What a session leaves behind for others of its tree."""

    STATES = "states"
    """Every state that it was in, as a snapshot: each call runs in a fork of the one before."""
    NEWEST = "newest"
    """Where it stands and no more: its calls follow each other in one process, without forks."""
    NOTHING = "nothing"
    """Each call starts from where the session was opened."""


class ReplayReason(StrEnum):
    """Why a state was rebuilt by a replay. The first six are also said by `CallResult.snapshot`."""

    THREADS = "threads"
    """Its process had more than one, and went on with another session."""
    DESCRIPTORS = "descriptors"
    """Its process had open what a fork would share, and went on with another session."""
    UNSEEN = "unseen"
    """The kernel did not show its process, or not as it must be, so that it was not forked."""
    UNSUPPORTED = "unsupported"
    """Nothing can be forked here."""
    CHEAP = "cheap"
    """A replay is sooner done than a fork."""
    NEWEST = "newest"
    """Only the newest state of its session was kept."""
    EVICTED = "evicted"
    """Its snapshot was given up for want of room."""
    TAMPERED = "tampered"
    """Its snapshot did not fork as an honest one does."""
    LOST = "lost"
    """Its process ended, or could not fork."""
    ELSEWHERE = "elsewhere"
    """It was never here, or its tree was released."""
    DEEP = "deep"
    """Its process had too many ancestors; this is not said of a result, only counted."""


class Kind(StrEnum):
    """How one call ended. Evidence from outside the process goes before the child's word."""

    OK = "ok"
    """The code ran to its end."""
    ERROR = "error"
    """The code raised."""
    TIMEOUT = "timeout"
    """Killed at its wall-clock or CPU limit."""
    MEMORY = "memory"
    """MemoryError: an allocation went over the address-space limit."""
    OUTPUT = "output"
    """Killed for printing too much, or for leaving too many or too large files."""
    KILLED = "killed"
    """Died of a signal of its own making, or broke the control channel."""
    EXITED = "exited"
    """`sys.exit` (the session lives on) or the process ended itself."""
    SANDBOX_FAILURE = "sandbox_failure"
    """The sandbox failed, not the code: retry, count, never score."""


class SandboxFailure(Exception):
    """The sandbox, not the code in it, failed. Worth a retry in another session."""


class ReplayDiverged(SandboxFailure):
    """A state could not be rebuilt: a call came to another result than when it was recorded.

    Another host would diverge as well."""


class FileRefused(ValueError):
    """A file cannot be put or got: because of its name or size, of what the code has left in its
    place, or because the code broke its session."""


class SandboxUnavailable(Exception):
    """This machine cannot enforce a mandatory layer: names primitive, errno and remedy."""


class WorkFile(NamedTuple):
    """A file of a session."""

    name: str
    """Its path within the work folder."""
    size: int
    """Bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallResult:
    """The outcome of one call."""

    kind: Kind
    """How the call ended."""
    stdout: str = ""
    """Head and tail of what was printed; a marker names the bytes left out."""
    stderr: str = ""
    """What was written to standard error, shortened in the same way."""
    value: str | None = None
    """`repr` of the last expression; None when it is None or the code has none."""
    error_type: str | None = None
    """Class name of the exception."""
    traceback: str = ""
    """The exception as Python prints it, with the caller's own frames only; of a process that
    was lost, why."""
    figures: tuple[bytes, ...] = ()
    """PNG images of the matplotlib figures that were shown or left open, in that order. They are
    bounded (`sandbox.limits`, `sandbox.png`), but the code can draw what it wants."""
    files: tuple[WorkFile, ...] = ()
    """Files that the call made or changed, by name; hidden ones are left out, and so are those
    beyond a bound."""
    truncated: tuple[str, ...] = ()
    """Which of stdout, stderr, value and traceback lack their middle; "figures" if some are left
    out."""
    duration_s: float = 0.0
    """Wall clock from the start of the execution."""
    cpu_s: float = 0.0
    """CPU time of all threads, measured from outside."""
    queue_s: float = 0.0
    """Waiting for a free session and a free processor, not part of `duration_s`."""
    restored_by: str = "fresh"
    """How the state before this call came about: "fresh" (by the session's own calls), "fork" (of
    a snapshot that another session, or this one before it lost a call, had left) or "replay"."""
    replay_reason: str = ""
    """Why by "replay", see `ReplayReason`; empty otherwise."""
    isolation: str = ""
    """The tier that the code ran in, see `docs/isolation.md`; empty if it did not run."""
    state_kept: bool = True
    """False if the process was lost: the next call continues from the state before this one."""
    snapshot: str = ""
    """`KEPT`, or why branches from here must be replayed, see `ReplayReason`; "newest" or "nothing"
    as asked for; empty if the process was lost."""
    node: str = ""
    """Names the state after this call, the same in every process that is in it; empty if lost."""
    refused: bool = False
    """The code was not run, because it is too long: the session is as it was."""

    def digest(self) -> str:
        """Fingerprint of what a repetition must reproduce; no clock, address, folder. Images and
        sizes of files are no part of it: they may depend on versions, fonts and dates."""
        said = (self.kind.value, self.stdout, self.value, self.error_type)
        masked = ACCIDENTAL.sub("~", repr(said))
        return hashlib.sha256(masked.encode("ascii", "backslashreplace")).hexdigest()[:32]


BROKEN = CallResult(
    kind=Kind.KILLED,
    traceback="an earlier call broke the session's process, and what it ran before does not come "
    "out the same when it is repeated",
    state_kept=False,
)
"""What comes of a call where code left nothing that could go on."""


def check_type(name: str, value: object, wanted: type | tuple[type, ...], use: str) -> None:
    """Raise TypeError unless an argument is of a type that is `wanted`; `use` says which."""
    if not isinstance(value, wanted):
        raise TypeError(f"{name}={value!r:.100}: use {use}")


def check_opening(setup: object, at: object, tree: object, keep: object) -> None:
    """Raise TypeError or ValueError if a session cannot be opened with these arguments."""
    check_type("setup", setup, str, "a string of Python code")
    check_type("at", at, (SessionState, type(None)), "the `state` of a session, or None")
    check_type("tree", tree, (str, type(None)), "a string, or None for a tree of its own")
    if not isinstance(keep, Keep):
        names = ", ".join(f"Keep.{each.name}" for each in Keep)
        raise ValueError(f"keep={keep!r:.100}: use one of {names}")
    assert isinstance(setup, str)
    refused = refusal(setup)
    if refused is not None:
        raise ValueError(f"setup: {refused.traceback.partition(': ')[2]}")


def refusal(code: str) -> CallResult | None:
    """What a call with too long a code comes to; None for one that may run. Raises TypeError."""
    check_type("code", code, str, "a string")
    if len(code.encode("utf-8", "surrogatepass")) <= MAX_CODE_BYTES:
        return None
    said = f"ValueError: the code is longer than {MAX_CODE_BYTES >> 20} MiB; it was not run"
    return CallResult(kind=Kind.ERROR, error_type="ValueError", traceback=said, refused=True)


@dataclass(frozen=True, slots=True)
class Put:
    """A file that a caller puts into a session's work folder, in the place of a call."""

    name: str
    """Path of the file, relative to the work folder."""
    data: bytes
    """Its content."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One call of a session's past."""

    code: str
    """The cell."""
    digest: str
    """`CallResult.digest` of its result, which a replay must reproduce."""
    lost: bool
    """The call killed its process and so left no effect: a replay passes over it."""
    node: str = ""
    """`CallResult.node`: where a snapshot of the state after the call is looked up."""
    put: Put | None = None
    """The file that was put in the place of a call; then there is no code."""

    @property
    def work(self) -> str | Put:
        """What is done again in a replay."""
        return self.code if self.put is None else self.put


@dataclass(frozen=True, slots=True)
class SessionState:
    """Everything a session ran so far: enough to find its snapshot on the host that has it, to
    rebuild it anywhere else, and to see whether that failed."""

    setup: str = ""
    """Code that ran before the first call."""
    entries: tuple[Entry, ...] = ()
    """The calls, in order."""
    tree: str = ""
    """The tree whose snapshots hold this state, as long as it lives."""
    host: str = ""
    """`Sandbox.id` of where that is."""

    def after(self, work: str | Put, result: CallResult) -> SessionState:
        """The state once `work` came to `result`; unchanged if it did not run."""
        if result.kind is Kind.SANDBOX_FAILURE or result.refused:
            return self
        code, put = (work, None) if isinstance(work, str) else ("", work)
        entry = Entry(code, result.digest(), not result.state_kept, result.node, put)
        return replace(self, entries=(*self.entries, entry))

    @property
    def effective(self) -> tuple[Entry, ...]:
        """The entries that left an effect."""
        return tuple(entry for entry in self.entries if not entry.lost)
