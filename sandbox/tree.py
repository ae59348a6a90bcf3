"""The states of one tree: which are kept as snapshots, how the others are rebuilt.

Invariants: a node names one state, in whatever process; a process stands for at most one node; a
state is rebuilt only by calls whose outcome is known, and believed only if all come out the same.
A process that is not to be forked (it has threads, more descriptors than it was given, a session
that keeps its newest state only, or a state that is sooner rebuilt) belongs to the first session
that goes on from it; another session that wants its state has it rebuilt.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from sandbox import files
from sandbox.branching import branch_of
from sandbox.endings import beyond_quota
from sandbox.inspection import DESCRIPTORS, THREADS
from sandbox.launch import SpawnerClient
from sandbox.limits import Limits
from sandbox.lineage import UNSEEN, Lineage
from sandbox.metrics import Metrics
from sandbox.process import SessionProcess
from sandbox.results import (
    BROKEN,
    CallResult,
    FileRefused,
    Keep,
    Kind,
    Put,
    ReplayDiverged,
    ReplayReason,
    SandboxFailure,
    SessionState,
)
from sandbox.snapshots import Shelf, Snapshot
from sandbox.states import START, States, node_of

_REPLAY_PATIENCE = 2.0
"""A replayed call may take this many times the wall-clock limit: it did end once."""
_MAX_GENERATIONS = 30
"""A fork takes the longer the more ancestors a process has: then it is rebuilt near the root."""
_REBASE_S = 1.0
"""Only if all its calls took no longer than this together."""
_PRIVATE = 16
"""Kept states of a tree without a name, which is most often the path of one session."""
_SPARE_FOLDERS = 8
"""Folders for branches that run, and for processes that are slow to end."""


@dataclass(frozen=True, slots=True)
class Means:
    """What the trees of one sandbox share."""

    limits: Limits
    running: asyncio.Semaphore
    shelf: Shelf
    metrics: Metrics
    spawner: Callable[[], Awaitable[SpawnerClient]]
    replay_below_s: float
    """Cells that took less, since the last kept state, are not worth a snapshot."""


class Tree:
    """All states that were reached under one name. Belongs to one event loop."""

    def __init__(self, means: Means, key: str, *, lasting: bool, alone: bool = False) -> None:
        """`lasting`: kept until it is released, not only while a session is open. `alone`: of one
        session that keeps its newest state only, so that nothing is ever forked."""
        self.key, self.lasting = key, lasting
        self.sessions = 0
        """Open ones."""
        self._means = means
        room = means.limits.snapshots if lasting else min(means.limits.snapshots, _PRIVATE)
        self._states = States(means.shelf, room)
        self._alone = alone
        self._lineages: set[Lineage] = set()
        self._building: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    @property
    def snapshots(self) -> int:
        """Kept states, the one before any code included."""
        return len(self._states)

    async def ensure(self, state: SessionState) -> str:
        """Have a process in `state`; why it had to be rebuilt by a replay, empty if it had not.

        Raises SandboxFailure, ReplayDiverged.
        """
        if self._states.is_broken(node_of(state)):
            return ""  # the next call says what comes of that
        held, reason = await self._reach(state)
        self._states.release(held)
        return reason

    async def call(
        self,
        state: SessionState,
        work: str | Put,
        *,
        keep: Keep,
        began: Callable[[SessionProcess], None],
    ) -> tuple[CallResult, str]:
        """Run one cell in `state`, or put a file there; why a replay came before, empty if none
        did. `began` is told where it runs.

        Raises SandboxFailure, ReplayDiverged.
        """
        for anew in (False, True):
            try:
                held, reason = await self._reach(state, anew=anew)
            except ReplayDiverged:
                if not self._states.is_broken(node_of(state)):
                    raise
                return BROKEN, self._states.why(node_of(state))
            try:
                if held.generation >= _MAX_GENERATIONS and held.cost_s < _REBASE_S:
                    held = await self._rebased(state, held)
                asked = time.monotonic()
                async with self._means.running:
                    queue_s = time.monotonic() - asked
                    try:
                        process = await self._process(held)
                    except SandboxFailure as failure:
                        await self._states.accuse(held, failure)
                        held.give_up()
                        if not anew:
                            continue
                        by_code = self._states.is_broken(held.node)
                        if not by_code or await held.lineage.lost(held.process):
                            raise
                        return BROKEN, reason
                    index = len(state.entries) + 1
                    began(process)
                    try:
                        result = await self._run(process, work, index, self._means.limits)
                        self._states.note_loss(held, result)
                        if result.state_kept and keep is Keep.NOTHING:
                            process.kill()
                            result = replace(result, snapshot=keep.value)
                        elif result.state_kept:
                            result = await self._kept(held, process, result, keep)
                    except OSError:  # the supervisor is short of something
                        process.kill()
                        raise
                    return replace(result, queue_s=queue_s), reason
            finally:
                self._states.release(held)
        raise AssertionError("unreachable")

    async def get(self, state: SessionState, name: str) -> tuple[bytes, str]:
        """A file of `state`; why a replay came before, empty if none did.

        Raises FileRefused, SandboxFailure, ReplayDiverged.
        """
        for again in (False, True):
            try:
                held, reason = await self._reach(state)
            except ReplayDiverged:
                if not self._states.is_broken(node_of(state)):
                    raise
                raise FileRefused(f"file {name!r}: {BROKEN.traceback}") from None
            try:
                async with held.forking:
                    return await files.get(held.process, name, self._means.limits), reason
            except SandboxFailure:
                held.give_up()
                if again:
                    raise
            finally:
                self._states.release(held)
        raise AssertionError("unreachable")

    async def close(self) -> None:
        """Give everything up; ends when no process and no folder is left."""
        self._states.clear()
        await asyncio.gather(*(lineage.close() for lineage in list(self._lineages)))

    # --- getting hold of a state ------------------------------------------------------------------

    async def _reach(self, state: SessionState, *, anew: bool = False) -> tuple[Snapshot, str]:
        """The snapshot of `state`, held, and why cells were replayed for it, empty if none were.

        `anew`: in a process that runs all cells itself, from the beginning, and is not forked.
        """
        node = node_of(state)
        if node == START:
            return await self._start(), ""
        async with self._building[node]:
            held = None if anew else self._states.take(node)
            if held is not None:
                return held, ""
            reason = self._states.why(node)
            held = await self._build(state, node, reason, anew=anew)
        if anew:
            held.status = reason
        else:
            self._states.put(held)
        return held, reason if state.effective else ""

    async def _start(self) -> Snapshot:
        """The state before any code, held."""
        async with self._building[START]:
            held = self._states.take(START)
            if held is not None:
                return held
            client = await self._means.spawner()
            folders = 1 if self._alone else self._states.room + _SPARE_FOLDERS
            lineage = await Lineage.begin(client, folders)
            self._lineages.add(lineage)
            lineage.first.end.add_done_callback(lambda _: self._lineages.discard(lineage))
            if self._alone:
                await lineage.look(lineage.first)  # to know whether the kernel shows it
            held = await self._look(
                lineage.first,
                lineage,
                node=START,
                generation=0,
                cost_s=0.0,
                status=Keep.NEWEST if self._alone else "",
                inherited=0,
            )
            if held.forkable:
                self._states.put(held)
            return held

    async def _look(
        self, process: SessionProcess, lineage: Lineage, *, inherited: int, **facts: object
    ) -> Snapshot:
        """A stopped process as a snapshot, held, not in the table yet."""
        try:
            snapshot = await Snapshot.of(process, lineage, inherited, **facts)
        except BaseException:  # nobody would know of it
            lineage.give_up(process)
            raise
        snapshot.users = 1
        process.end.add_done_callback(lambda _: self._states.forget(snapshot))
        return snapshot

    # --- going on ---------------------------------------------------------------------------------

    async def _process(self, held: Snapshot) -> SessionProcess:
        """A process in the state of `held`, to run a cell in. Raises SandboxFailure."""
        if not held.forkable:
            if not held.process.alive:
                raise SandboxFailure("the session's process was lost")
            held.spent = True
            if held.status in (THREADS, DESCRIPTORS):
                self._states.mark_broken(held.node)
            return held.process
        process = await branch_of(held, self._means.running)
        self._means.metrics.forks += 1
        return process

    async def _run(
        self, process: SessionProcess, work: str | Put, index: int, limits: Limits
    ) -> CallResult:
        if isinstance(work, Put):
            return await files.put(process, work, limits)
        return await process.run(work.encode("utf-8", "surrogatepass"), index, limits)

    async def _kept(
        self, held: Snapshot, process: SessionProcess, result: CallResult, keep: Keep
    ) -> CallResult:
        """Keep the state that a cell left behind in `process`, which came from `held`."""
        status = result.snapshot
        if not status and keep is Keep.NEWEST:
            status = keep.value
        elif not status and held.unkept_s + result.duration_s < self._means.replay_below_s:
            status = ReplayReason.CHEAP
        result = replace(result, snapshot=status)
        after = await self._after(held, process, secrets.token_hex(16), result.duration_s, result)
        if process.holdings.exceed_as_seen(process.sight, self._means.limits):
            after.give_up()
            self._states.release(after)
            return replace(
                result,
                kind=Kind.OUTPUT,
                value=None,
                error_type=None,
                traceback=beyond_quota(self._means.limits),
                state_kept=False,
                snapshot="",
            )
        if after.threads <= self._means.limits.threads:
            self._states.put(after)
        else:  # kept, they would keep others from forking
            after.give_up()
        self._states.release(after)
        return replace(result, node=after.node, snapshot=after.status)

    async def _after(
        self, held: Snapshot, process: SessionProcess, node: str, took_s: float, result: CallResult
    ) -> Snapshot:
        forked = process is not held.process
        after = await self._look(
            process,
            held.lineage,
            node=node,
            generation=held.generation + forked,
            cost_s=held.cost_s + took_s,
            status=result.snapshot,
            inherited=held.anonymous if forked else held.inherited,
        )
        if after.status == UNSEEN and not await held.lineage.lost(process):
            self._states.mark_broken(node)
        if not after.forkable:
            after.unkept_s = held.unkept_s + took_s
        return after

    async def _rebased(self, state: SessionState, held: Snapshot) -> Snapshot:
        """A snapshot of the same state with fewer ancestors; the same one if that fails."""
        node = held.node
        try:
            rebuilt = await self._build(state, node, ReplayReason.DEEP, anew=True)
        except SandboxFailure:  # it cannot be repeated: live with the ancestors
            held.generation -= _MAX_GENERATIONS
            return held
        self._means.metrics.rebased += 1
        self._states.put(rebuilt)
        self._states.release(held)
        return rebuilt

    async def _build(self, state: SessionState, node: str, reason: str, *, anew: bool) -> Snapshot:
        """A new process in `state`, held: forked from the nearest kept state before it (`anew`:
        from the beginning), in which the missing cells run again, for a `reason`."""
        base, missing = await self._nearest(state, anew=anew)
        started, result = time.monotonic(), CallResult(kind=Kind.OK)
        try:
            async with self._means.running:
                process = await self._process(base)
                try:
                    for index in missing:
                        result = await self._repeat(process, state, index)
                except BaseException:
                    process.kill()
                    raise
        finally:
            self._states.release(base)
        if self._alone:
            result = replace(result, snapshot=Keep.NEWEST)
        replayed = len(missing) - (missing[0] == 0)
        if replayed:
            self._means.metrics.count_replay(reason, replayed)
        return await self._after(base, process, node, time.monotonic() - started, result)

    async def _nearest(self, state: SessionState, *, anew: bool) -> tuple[Snapshot, list[int]]:
        """The nearest kept state before `state`, held, and the cells that are missing from there:
        0 is the setup, k the k-th entry."""
        missing = list[int]()
        for index in range(len(state.entries), 0, -1):
            entry = state.entries[index - 1]
            if entry.lost:
                continue
            if not anew and missing and self._states.can_fork(entry.node):
                held = self._states.take(entry.node)
                if held is not None:
                    return held, missing
            missing.insert(0, index)
        if state.setup:
            held = None if anew or not missing else self._states.take(START + state.setup)
            if held is not None:
                return held, missing
            missing.insert(0, 0)
        return await self._start(), missing

    async def _repeat(self, process: SessionProcess, state: SessionState, index: int) -> CallResult:
        """Run the setup or an entry again. Raises SandboxFailure, ReplayDiverged."""
        limits = self._means.limits
        if index == 0:
            result = await self._run(process, state.setup, 0, limits)
            if result.kind is not Kind.OK:
                said = result.traceback or result.kind.value
                raise SandboxFailure(f"the setup code failed: {said}")
            return result
        entry = state.entries[index - 1]
        patient = replace(limits, wall_s=limits.wall_s * _REPLAY_PATIENCE)
        result = await self._run(process, entry.work, index, patient)
        if result.kind is Kind.SANDBOX_FAILURE:
            raise SandboxFailure(result.traceback)
        if result.digest() != entry.digest:
            self._means.metrics.diverged += 1
            raise ReplayDiverged(
                f"replay diverged: call {index} of {len(state.entries)} came to "
                f"{result.kind.value}, with another result than when it was recorded"
            )
        return result
