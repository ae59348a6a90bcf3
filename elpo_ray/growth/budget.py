"""The budget ledger: what each completion took, in rollouts, generated tokens and tool seconds.

Invariants: spent + reserved <= n_total at every moment; every charged entry names the one leaf it
paid for. A completion reserves its rollout before it samples its first token, so completions that
run at once can never overspend. What an infrastructure failure destroyed is recorded, uncharged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from elpo_ray.tree import Localization
from elpo_ray.types import Score, pickled_by_position


class SpendKind(StrEnum):
    """Where a completion started; or that nothing was completed, only asked."""

    ROOT = "root"
    """At the prompt."""
    PROBE = "probe"
    """At a node of the tree."""
    ASK = "ask"
    """Nothing was completed: the policy answered a question."""


@pickled_by_position
@dataclass(slots=True)
class Cost:
    """What one attempt at a completion has used so far."""

    tokens: int = 0
    """Generated tokens; a turn counts when it is complete."""
    tool_seconds: float = 0.0
    """Seconds that tools ran."""


@dataclass(slots=True)
class Reservation:
    """One rollout set aside. Its completion fills in `leaf` and `cost`, or raises."""

    anchor: int | None
    """The node at which the completion starts; None = at the prompt."""
    leaf: int | None = None
    """The leaf that the completion became."""
    cost: Cost = field(default_factory=Cost)
    """What it has used."""


class Ledger:
    """The ledger of one input."""

    def __init__(self, n_total: int) -> None:
        self.n_total = n_total
        """Rollouts that the input may use."""
        self.reserved = 0
        """Rollouts being sampled right now."""
        self.spent = 0
        """Rollouts that were charged."""
        self.entries: list[dict[str, Any]] = []
        """One a spend, one a lost attempt and one a question to the policy: `kind`, `anchor` (null
        from the root), `leaf` (null without one), `charged`, `tokens`, `tool_seconds`."""

    @property
    def remaining(self) -> int:
        """Rollouts neither spent nor being sampled."""
        return self.n_total - self.spent - self.reserved

    @contextmanager
    def reserve(self, anchor: int | None = None) -> Iterator[Reservation]:
        """Set one rollout aside for the body, which charges it by ending normally; whatever the
        body raises gives it back. `anchor=None` is a completion from the prompt."""
        assert self.remaining > 0, f"the budget of {self.n_total} rollouts is spent"
        self.reserved += 1
        reservation = Reservation(anchor)
        try:
            yield reservation
        finally:
            self.reserved -= 1
        assert reservation.leaf is not None, "a spend pays for exactly one leaf"
        self.spent += 1
        self._enter(_start(anchor), anchor, reservation.leaf, reservation.cost)

    def lost(self, anchor: int | None, cost: Cost) -> None:
        """Record an attempt that the infrastructure destroyed; it is not charged."""
        self._enter(_start(anchor), anchor, None, cost)

    def asked(self, cost: Cost) -> None:
        """Record a question to the policy that completed no trajectory; it is not charged."""
        self._enter(SpendKind.ASK, None, None, cost)

    def _enter(self, kind: SpendKind, anchor: int | None, leaf: int | None, cost: Cost) -> None:
        self.entries.append(
            {
                "kind": kind.value,
                "anchor": anchor,
                "leaf": leaf,
                "charged": leaf is not None,
                "tokens": cost.tokens,
                "tool_seconds": cost.tool_seconds,
            }
        )


def _start(anchor: int | None) -> SpendKind:
    return SpendKind.ROOT if anchor is None else SpendKind.PROBE


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over ledger entries, of one input or, added up, of a whole run."""

    roots: int = 0
    """Completions sampled from the prompt."""
    probes: int = 0
    """Completions sampled from an anchor."""
    tokens: int = 0
    """Generated tokens of completions and of questions to the policy."""
    tool_seconds: float = 0.0
    """Seconds that tools ran for completions."""
    lost: int = 0
    """Attempts that the infrastructure destroyed; their tokens and seconds are apart."""
    lost_tokens: int = 0
    """Generated tokens of lost attempts."""
    lost_tool_seconds: float = 0.0
    """Seconds that tools ran for lost attempts."""

    @property
    def rollouts(self) -> int:
        """Completions paid for, each of them one leaf."""
        return self.roots + self.probes

    @classmethod
    def of(cls, entries: Sequence[Mapping[str, Any]]) -> Totals:
        """Sum up `Ledger.entries` (or `RolloutTree.ledger`)."""
        charged = [entry for entry in entries if entry["charged"]]
        asked = [entry for entry in entries if entry["kind"] == SpendKind.ASK]
        lost = [e for e in entries if not e["charged"] and e["kind"] != SpendKind.ASK]
        roots = sum(entry["kind"] == SpendKind.ROOT for entry in charged)
        return cls(
            roots=roots,
            probes=len(charged) - roots,
            tokens=sum(entry["tokens"] for entry in [*charged, *asked]),
            tool_seconds=sum(entry["tool_seconds"] for entry in charged),
            lost=len(lost),
            lost_tokens=sum(entry["tokens"] for entry in lost),
            lost_tool_seconds=sum(entry["tool_seconds"] for entry in lost),
        )

    def __add__(self, other: Totals) -> Totals:
        names = [f.name for f in fields(self)]
        return Totals(**{name: getattr(self, name) + getattr(other, name) for name in names})


def can_teach(scores: Sequence[Score], localizations: Sequence[Localization]) -> bool:
    """Whether further rollouts of an input may change what is learned of it: not once all that
    were graded succeed, nor once a search has named a critical step between a success and a
    failure. An input without any success can: one success makes a contrast."""
    outcomes = {score.success for score in scores if score.graded}
    if outcomes == {True}:
        return False
    return len(outcomes) < 2 or not any(found.confirmed for found in localizations)
