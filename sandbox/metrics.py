"""Counts and latencies of a sandbox."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from sandbox.results import CallResult, Kind, ReplayReason

_WINDOW = 4096
"""Latest calls that the percentiles look at."""


def _percentile(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(share * len(values)))] if values else 0.0


@dataclass
class Metrics:
    """Running totals since the sandbox was made; replayed calls are counted apart."""

    calls: Counter[Kind] = field(default_factory=Counter)
    opened: int = 0
    """Sessions opened."""
    forks: int = 0
    """Branches forked from a snapshot, one a call."""
    replays: int = 0
    """States rebuilt by replay, because no snapshot of them was there."""
    replay_reasons: Counter[str] = field(default_factory=Counter)
    """Replays by their `ReplayReason`."""
    replayed_calls: int = 0
    diverged: int = 0
    """Replays that came to another result than when the call was recorded."""
    rebased: int = 0
    """States rebuilt because their process had too many ancestors."""
    failures: int = 0
    """Opens and calls that the sandbox lost."""
    _durations: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    _queues: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))

    def count(self, result: CallResult) -> None:
        """Take note of one call of a caller."""
        self.calls[result.kind] += 1
        self.failures += result.kind is Kind.SANDBOX_FAILURE
        self._durations.append(result.duration_s)
        self._queues.append(result.queue_s)

    def count_replay(self, reason: str, calls: int) -> None:
        """Take note of a state that was rebuilt by so many calls."""
        self.replays += 1
        self.replay_reasons[reason] += 1
        self.replayed_calls += calls

    def values(self) -> dict[str, float]:
        """Flat numbers for a dashboard; seconds where a name ends in `_s`."""
        durations, queues = sorted(self._durations), sorted(self._queues)
        return {
            "calls": self.calls.total(),
            **{f"calls_{kind.value}": self.calls[kind] for kind in Kind},
            "opened": self.opened,
            "forks": self.forks,
            "replays": self.replays,
            **{f"replays_{reason.value}": self.replay_reasons[reason] for reason in ReplayReason},
            "replayed_calls": self.replayed_calls,
            "diverged": self.diverged,
            "rebased": self.rebased,
            "failures": self.failures,
            "call_p50_s": _percentile(durations, 0.5),
            "call_p99_s": _percentile(durations, 0.99),
            "queue_p50_s": _percentile(queues, 0.5),
            "queue_p99_s": _percentile(queues, 0.99),
        }
