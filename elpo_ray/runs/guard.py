"""A tracker that cannot end a run.

Whatever its client raises, the run goes on, with one line that says so. What the tracker refused is
kept and offered again: after 1, 2, 4, … further calls and once more at the end, so that a server
that was away for a while misses nothing.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from elpo_ray.types import Values

MOST_WAITING = 20_000
"""The most calls that are kept for a tracker; the oldest go first."""
LONGEST_PAUSE = 32
"""The most calls between two attempts to reach a tracker that has failed."""
MAX_CHARS = 300
"""The most characters of a client's message that the warning shows."""


class TimedTracker(Protocol):
    """A tracker that is told when a number was measured: it may hear of it later."""

    def write(self, step: int, values: Values, at: float) -> None:
        """`at`: seconds since the epoch."""

    def show(self, step: int, samples: Sequence[Any]) -> None: ...

    def close(self) -> None: ...


class UnusableTracker(ValueError):
    """The user's tracker is not one, which they should know before the run begins."""


class Guarded:
    """A sink that hands everything to a tracker, now or later, and never raises."""

    def __init__(self, where: str, make: Callable[[], TimedTracker]) -> None:
        """`where` is the tracker as the user configured it. Raises UnusableTracker only."""
        self._where, self._make = where, make
        self._tracker: TimedTracker | None = None
        self._waiting: deque[tuple[str, tuple[Any, ...]]] = deque(maxlen=MOST_WAITING)
        self._failures = self._pause = 0
        self._deliver()

    def write(self, step: int, values: Values) -> None:
        self._call("write", step, values, time.time())

    def show(self, step: int, samples: Sequence[Any]) -> None:
        self._call("show", step, samples)

    def close(self) -> None:
        """Offer the tracker what it has missed, and end it."""
        self._pause = 0
        self._deliver()
        if self._tracker is not None:
            self._attempt("close", ())

    def _call(self, name: str, *given: Any) -> None:
        self._waiting.append((name, given))
        self._pause -= 1
        if self._pause <= 0:
            self._deliver()

    def _deliver(self) -> None:
        """Make the tracker if there is none, and hand it all that waits. A call that it refuses
        while it takes the next one of the kind is given up: the fault lies in the call."""
        if self._tracker is None and not self._start():
            return
        while self._waiting:
            name, given = self._waiting[0]
            if not self._attempt(name, given) and not self._take_next(name):
                return
            self._waiting.popleft()
        self._recovered()

    def _take_next(self, name: str) -> bool:
        """Whether the tracker takes the second of the waiting calls of the kind."""
        again = [call for call in self._waiting if call[0] == name][1:2]
        if not again or not self._attempt(*again[0]):
            return False
        self._waiting.remove(again[0])
        return True

    def _start(self) -> bool:
        try:
            self._tracker = self._make()
        except UnusableTracker:
            raise
        except (Exception, SystemExit) as fault:  # the client of a service is a boundary
            self._failed("its start", fault)
            return False
        return True

    def _attempt(self, name: str, given: tuple[Any, ...]) -> bool:
        try:
            getattr(self._tracker, name)(*given)
        except (Exception, SystemExit) as fault:  # the client of a service is a boundary
            self._failed(name, fault)
            return False
        return True

    def _failed(self, name: str, fault: BaseException) -> None:
        self._failures += 1
        self._pause = min(2 ** (self._failures - 1), LONGEST_PAUSE)
        if self._failures == 1:
            text = " ".join(str(fault).split())[:MAX_CHARS]
            self._say(
                f"{name} raised {type(fault).__name__}: {text}; the run goes on without this "
                "tracker, and hands it what it missed if it answers again (metrics.jsonl has it)"
            )

    def _recovered(self) -> None:
        if self._failures:
            self._failures = self._pause = 0
            self._say("it answers again and has what it missed")

    def _say(self, text: str) -> None:
        print(f"elpo_ray: {self._where}: {text}", file=sys.stderr, flush=True)
