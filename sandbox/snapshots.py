"""The kept states of a host: which there are, what they cost, which are given up first.

A snapshot is a stopped process. Invariants: one that is in use is never given up; the bytes are
measured from outside, by what the kernel says of a process to everybody.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field
from typing import Any

from sandbox.inspection import facts, proportional_bytes
from sandbox.lineage import Lineage
from sandbox.process import SessionProcess
from sandbox.results import KEPT, ReplayReason
from sandbox.shortage import raise_if_short

_PAGE = os.sysconf("SC_PAGE_SIZE")
_PAGE_TABLES = 256 << 10
"""Rough bytes of one process's page tables; the kernel counts them with its other memory."""
_THREAD = 64 << 10
"""Rough bytes that the kernel keeps for a thread, with what it touched of its stack."""
_UNSURE_BYTES = 32 << 20
"""Anonymous memory that an estimate may leave to the ancestors, or count, before the kernel is
asked: a fault brings 4 KiB or 2 MiB."""
_TOUCHED_PER_S = 20 << 30
"""More bytes than a processor can bring into use in a second of its time."""
_MINOR_FAULTS, _THREADS = 10 - 3, 20 - 3
"""Fields of /proc/PID/stat, counted from behind the command's name."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """What the kernel says of a process's memory. Raises OSError where it does not."""

    anonymous: int
    """Bytes, those shared with its ancestors included."""
    faulted: int
    """Bytes of the pages that it copied or touched first."""
    threads: int

    @classmethod
    def of(cls, pid: int) -> Footprint:
        fields = facts(pid, "stat").rpartition(b")")[2].split()
        _, resident, shared, *_ = map(int, facts(pid, "statm").split())
        faulted = int(fields[_MINOR_FAULTS]) * _PAGE
        return cls((resident - shared) * _PAGE, faulted, int(fields[_THREADS]))

    def private(self, inherited: int) -> int:
        """Bytes that end with the process, estimated from above; it was forked with `inherited`
        anonymous ones. A fault copies one page, or brings any number that were not there before."""
        return min(max(self.faulted, self.anonymous - inherited), self.anonymous) + _PAGE_TABLES


@dataclass(eq=False, slots=True, kw_only=True)
class Snapshot:
    """One kept state and the process that is in it."""

    node: str
    process: SessionProcess
    lineage: Lineage
    generation: int
    """Forks since the first process of its lineage."""
    cost_s: float
    """What it took to come here, hence what a replay takes at least."""
    status: str
    """The same word as `CallResult.snapshot`."""
    inherited: int
    """Bytes of anonymous memory that its process began with."""
    anonymous: int
    threads: int
    size: int
    """Bytes of memory and files that giving it up frees."""
    exact: bool = False
    """Whether `size` was measured exactly."""
    users: int = 0
    """Who must not lose it now."""
    unkept_s: float = 0.0
    """What its cells took since the last state that can be forked."""
    spent: bool = False
    """Its process went on itself."""
    lacks: str = ReplayReason.LOST
    """Why nobody can go on from it, should that be so."""
    forking: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def forkable(self) -> bool:
        """Otherwise its process can only go on itself, and the state is lost to all others."""
        return self.status == KEPT

    @property
    def there(self) -> bool:
        return self.process.alive and not self.spent and not self.lineage.closed

    def give_up(self) -> None:
        """End its process."""
        self.lineage.give_up(self.process)

    @classmethod
    async def of(
        cls, process: SessionProcess, lineage: Lineage, inherited: int, **facts: Any
    ) -> Snapshot:
        """Look at a stopped process. `facts`: node, generation, cost_s and `status`, what speaks
        against forking it as far as is known. Raises OSError for want of something here."""
        status = facts.pop("status")
        try:
            footprint = Footprint.of(process.pid)
        except OSError as error:  # it is gone
            raise_if_short(error)
            footprint = Footprint(inherited, 0, 1)
        size, exact = footprint.private(inherited), None
        renewed = min(footprint.anonymous - size, int(process.cpu_s() * _TOUCHED_PER_S))
        unsure = max(size, renewed) > _UNSURE_BYTES
        if not lineage.forks:
            status = "unsupported"
        elif not status or lineage.covered:
            seen = await lineage.look(process, weigh=unsure)
            status = status or seen
        others = process.holdings.total_bytes(process.sight) + (footprint.threads - 1) * _THREAD
        if unsure:
            exact = proportional_bytes(process.pid)
            if exact is None and process.sight is not None:
                exact = process.sight.weight
        return cls(
            process=process,
            lineage=lineage,
            inherited=inherited,
            anonymous=footprint.anonymous,
            threads=footprint.threads,
            size=others + (size if exact is None else exact + _PAGE_TABLES),
            exact=exact is not None,
            status=status or KEPT,
            **facts,
        )


class Shelf:
    """All snapshots of a host, the least recently used first."""

    def __init__(self, max_bytes: int, max_count: int) -> None:
        self._max_bytes, self._max_count = max_bytes, max_count
        self._kept: dict[Snapshot, None] = {}
        self.bytes = 0
        self.evicted = 0
        """Given up for want of room since the start."""

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, snapshot: Snapshot) -> None:
        """Take it in, or note that it was used."""
        if snapshot in self._kept:
            del self._kept[snapshot]
        else:
            self.bytes += snapshot.size
        self._kept[snapshot] = None

    def forget(self, snapshot: Snapshot) -> None:
        """Take out a snapshot that is gone; it may have been taken out before."""
        if snapshot in self._kept:
            del self._kept[snapshot]
            self.bytes -= snapshot.size

    def surplus(self) -> list[Snapshot]:
        """What is to be given up now. Estimates are made exact first, if the kernel allows it."""
        chosen = list[Snapshot]()
        left, count = self.bytes, len(self._kept)
        for snapshot in self._kept:
            if left <= self._max_bytes and count <= self._max_count:
                break
            if snapshot.users:
                continue
            if left > self._max_bytes and not snapshot.exact:
                left += self._measure(snapshot)
            if left > self._max_bytes or count > self._max_count:
                chosen.append(snapshot)
                left, count = left - snapshot.size, count - 1
        self.evicted += len(chosen)
        return chosen

    def _measure(self, snapshot: Snapshot) -> int:
        """Bytes by which the exact size differs."""
        snapshot.exact = True
        exact = proportional_bytes(snapshot.process.pid)
        if exact is None:
            return 0
        change = exact + _PAGE_TABLES - snapshot.size
        snapshot.size += change
        self.bytes += change
        return change
