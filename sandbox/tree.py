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
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace

from sandbox.inspection import BY_CODE
from sandbox.launch import SpawnerClient
from sandbox.limits import Limits
from sandbox.lineage import UNSEEN, Lineage
from sandbox.metrics import Metrics
from sandbox.process import Refused, SessionProcess, Tampered, beyond_quota
from sandbox.results import (
    CHEAP,
    CallResult,
    Keep,
    Kind,
    ReplayDiverged,
    SandboxFailure,
    SessionState,
)
from sandbox.snapshots import Shelf, Snapshot
from sandbox.workdir import usage

_REPLAY_PATIENCE = 2.0
"""A replayed call may take this many times the wall-clock limit: it did end once."""
_PROMPT_S = 0.1
"""A fork that takes longer waits outside of the processors' queue."""
_REFUSED_S = (0.1, 0.4)
"""Waits before a fork is tried again for which something was short."""
_MAX_GENERATIONS = 30
"""A fork takes the longer the more ancestors a process has: then it is rebuilt near the root."""
_REBASE_S = 1.0
"""Only if all its calls took no longer than this together."""
_PRIVATE = 16
"""Kept states of a tree without a name, which is most often the path of one session."""
_SPARE_FOLDERS = 8
"""Folders for branches that run, and for processes that are slow to end."""
_START = "="
"""Names the state before any code; with the setup behind it, the state after that."""


_BROKEN = CallResult(
    kind=Kind.KILLED,
    traceback="an earlier call broke the session's process, and what it ran before does not come "
    "out the same when it is repeated",
    state_kept=False,
)


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


def _node_of(state: SessionState) -> str:
    entries = state.effective
    return entries[-1].node if entries else _START + state.setup


def _kill_unwanted(forking: asyncio.Future[SessionProcess]) -> None:
    """Nobody waits for this fork any longer."""
    if not forking.cancelled() and forking.exception() is None:
        forking.result().kill()


class Tree:
    """All states that were reached under one name. Belongs to one event loop."""

    def __init__(self, means: Means, key: str, *, lasting: bool, alone: bool = False) -> None:
        """`lasting`: kept until it is released, not only while a session is open. `alone`: of one
        session that keeps its newest state only, so that nothing is ever forked."""
        self.key, self.lasting = key, lasting
        self.sessions = 0
        """Open ones."""
        self._means = means
        self._room = means.limits.snapshots if lasting else min(means.limits.snapshots, _PRIVATE)
        """Most nodes."""
        self._alone = alone
        self._nodes: dict[str, Snapshot] = {}
        """The least recently used first."""
        self._lineages: set[Lineage] = set()
        self._broken: set[str] = set()
        """States that nobody can fork by the doing of their own code: it left what cannot be
        branched, did not fork in order or ended the process. Should they not come out the same
        again, that is no failure of the sandbox."""
        self._building: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    @property
    def snapshots(self) -> int:
        """Kept states, the one before any code included."""
        return len(self._nodes)

    async def ensure(self, state: SessionState) -> bool:
        """Have a process in `state`; whether it had to be rebuilt by a replay.

        Raises SandboxFailure, ReplayDiverged.
        """
        if _node_of(state) in self._broken:
            return False  # the next call says what comes of that
        held, replayed = await self._reach(state)
        self._release(held)
        return replayed

    async def call(
        self,
        state: SessionState,
        code: str,
        *,
        keep: Keep,
        began: Callable[[SessionProcess], None],
    ) -> tuple[CallResult, bool]:
        """Run one cell in `state`; whether a replay came before. `began` is told where it runs.

        Raises SandboxFailure, ReplayDiverged.
        """
        for anew in (False, True):
            try:
                held, replayed = await self._reach(state, anew=anew)
            except ReplayDiverged:
                if _node_of(state) not in self._broken:
                    raise
                return _BROKEN, True
            try:
                if held.generation >= _MAX_GENERATIONS and held.cost_s < _REBASE_S:
                    held = await self._rebased(state, held)
                asked = time.monotonic()
                async with self._means.running:
                    queue_s = time.monotonic() - asked
                    try:
                        process = await self._process(held)
                    except SandboxFailure as failure:
                        await self._accuse(held, failure)
                        held.give_up()
                        if not anew:
                            continue
                        if (
                            held.node in self._broken
                            and not await held.process.killed_from_outside()
                        ):
                            return _BROKEN, True
                        raise
                    index = len(state.entries) + 1
                    began(process)
                    try:
                        result = await self._run(process, code, index, self._means.limits)
                        self._note_loss(held, result)
                        if result.state_kept and keep is Keep.NOTHING:
                            process.kill()
                            result = replace(result, snapshot=keep.value)
                        elif result.state_kept:
                            result = await self._kept(held, process, result, keep)
                    except OSError:  # the supervisor is short of something
                        process.kill()
                        raise
                    return replace(result, queue_s=queue_s), replayed
            finally:
                self._release(held)
        raise AssertionError("unreachable")

    async def close(self) -> None:
        """Give everything up; ends when no process and no folder is left."""
        for snapshot in self._nodes.values():
            self._means.shelf.forget(snapshot)
        self._nodes.clear()
        await asyncio.gather(*(lineage.close() for lineage in list(self._lineages)))

    # --- getting hold of a state ------------------------------------------------------------------

    async def _reach(self, state: SessionState, *, anew: bool = False) -> tuple[Snapshot, bool]:
        """The snapshot of `state`, held, and whether cells were replayed for it.

        `anew`: in a process that runs all cells itself, from the beginning, and is not forked.
        """
        node = _node_of(state)
        if node == _START:
            return await self._start(), False
        async with self._building[node]:
            held = None if anew else self._take(node)
            if held is not None:
                return held, False
            held = await self._build(state, node, anew=anew)
        if anew:
            held.status = "rebuilt"
        else:
            self._put(held)
        return held, bool(state.effective)

    def _take(self, node: str) -> Snapshot | None:
        """Hold a kept snapshot; one that cannot be forked leaves the table with it."""
        found = self._nodes.get(node)
        if found is None or not found.there:
            return None
        found.users += 1
        if found.forkable:
            self._put(found)
        else:
            del self._nodes[node]
        return found

    def _put(self, snapshot: Snapshot) -> None:
        """Into the table, as the most recently used; older ones make room."""
        self._nodes.pop(snapshot.node, None)
        self._nodes[snapshot.node] = snapshot
        if snapshot.forkable:
            snapshot.lineage.retire(snapshot.process)
        if snapshot.node == _START:
            return
        self._means.shelf.keep(snapshot)
        given_up = set(self._means.shelf.surplus())
        too_many = len(self._nodes) - self._room
        if too_many > 0:
            own = [each for each in self._nodes.values() if not each.users and each.node != _START]
            given_up |= set(own[:too_many])
        for old in given_up:
            self._means.shelf.forget(old)
            old.give_up()

    def _release(self, held: Snapshot) -> None:
        """The end of `_take` or `_reach`."""
        held.users -= 1
        if not held.there or held.users:
            return
        if held.node not in self._nodes and held.lineage in self._lineages:
            self._put(held)
        elif self._nodes.get(held.node) is not held:  # another process took its place
            held.give_up()

    async def _start(self) -> Snapshot:
        """The state before any code, held."""
        async with self._building[_START]:
            held = self._take(_START)
            if held is not None:
                return held
            client = await self._means.spawner()
            folders = 1 if self._alone else self._room + _SPARE_FOLDERS
            lineage = await Lineage.begin(client, folders)
            self._lineages.add(lineage)
            lineage.first.end.add_done_callback(lambda _: self._lineages.discard(lineage))
            if self._alone:
                await lineage.look(lineage.first)  # to know whether the kernel shows it
            held = await self._look(
                lineage.first,
                lineage,
                node=_START,
                generation=0,
                cost_s=0.0,
                status=Keep.NEWEST if self._alone else "",
                inherited=0,
            )
            if held.forkable:
                self._put(held)
            return held

    async def _look(
        self, process: SessionProcess, lineage: Lineage, *, inherited: int, **facts: object
    ) -> Snapshot:
        """A stopped process as a snapshot, held, not in the table yet."""
        files = usage(process.folder, self._means.limits) or 0
        snapshot = await Snapshot.of(process, lineage, inherited, files, **facts)
        snapshot.users = 1
        process.end.add_done_callback(lambda _: self._forget(snapshot))
        return snapshot

    async def _accuse(self, held: Snapshot, failure: SandboxFailure) -> None:
        """Note whether it was code that kept a state from going on. Before any there is none."""
        code = not held.node.startswith(_START)
        if code and (isinstance(failure, Tampered) or await held.process.ended_itself_after_all()):
            self._broken.add(held.node)

    def _note_loss(self, held: Snapshot, result: CallResult) -> None:
        """Note if code ended the only process that was in its state."""
        lost = held.spent and not result.state_kept and result.kind is not Kind.SANDBOX_FAILURE
        if lost and not held.node.startswith(_START):
            self._broken.add(held.node)

    def _forget(self, snapshot: Snapshot) -> None:
        """Its process ended."""
        self._means.shelf.forget(snapshot)
        if self._nodes.get(snapshot.node) is snapshot:
            del self._nodes[snapshot.node]
        if not snapshot.spent and snapshot.process.ended_itself:
            self._broken.add(snapshot.node)

    # --- going on ---------------------------------------------------------------------------------

    async def _process(self, held: Snapshot) -> SessionProcess:
        """A process in the state of `held`, to run a cell in. Raises SandboxFailure."""
        if not held.forkable:
            if not held.process.alive:
                raise SandboxFailure("the session's process was lost")
            held.spent = True
            if held.status in BY_CODE:
                self._broken.add(held.node)
            return held.process
        process = await self._unhurried(self._forked(held))
        self._means.metrics.forks += 1
        return process

    async def _forked(self, held: Snapshot) -> SessionProcess:
        """A branch of `held`, in its turn. Raises SandboxFailure."""
        async with held.forking:
            for patience_s in _REFUSED_S:
                try:
                    return await held.lineage.fork(held.process)
                except Refused:
                    if not held.process.alive:
                        raise
                    await asyncio.sleep(patience_s)
            return await held.lineage.fork(held.process)

    async def _unhurried(self, fork: Coroutine[None, None, SessionProcess]) -> SessionProcess:
        """A fork, which takes no processor's place while it does not come to its end. It must not
        wait for one while it holds what other forks wait for."""
        forking = asyncio.ensure_future(fork)
        try:
            done, _ = await asyncio.wait({forking}, timeout=_PROMPT_S)
            if not done:
                self._means.running.release()
                try:
                    await asyncio.wait({forking})
                finally:
                    await self._means.running.acquire()
        except asyncio.CancelledError:
            forking.add_done_callback(_kill_unwanted)
            forking.cancel()
            raise
        return forking.result()

    async def _run(
        self, process: SessionProcess, code: str, index: int, limits: Limits
    ) -> CallResult:
        return await process.run(code.encode("utf-8", "surrogatepass"), index, limits)

    async def _kept(
        self, held: Snapshot, process: SessionProcess, result: CallResult, keep: Keep
    ) -> CallResult:
        """Keep the state that a cell left behind in `process`, which came from `held`."""
        status = result.snapshot
        if not status and keep is Keep.NEWEST:
            status = keep.value
        elif not status and held.unkept_s + result.duration_s < self._means.replay_below_s:
            status = CHEAP
        result = replace(result, snapshot=status)
        after = await self._after(held, process, secrets.token_hex(16), result.duration_s, result)
        if process.hoards(self._means.limits):
            after.give_up()
            self._release(after)
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
            self._put(after)
        else:  # kept, they would keep others from forking
            after.give_up()
        self._release(after)
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
        if after.status == UNSEEN and await process.ended_itself_after_all():
            self._broken.add(node)
        if not after.forkable:
            after.unkept_s = held.unkept_s + took_s
        return after

    async def _rebased(self, state: SessionState, held: Snapshot) -> Snapshot:
        """A snapshot of the same state with fewer ancestors; the same one if that fails."""
        node = held.node
        try:
            rebuilt = await self._build(state, node, anew=True)
        except SandboxFailure:  # it cannot be repeated: live with the ancestors
            held.generation -= _MAX_GENERATIONS
            return held
        self._means.metrics.rebased += 1
        self._put(rebuilt)
        self._release(held)
        return rebuilt

    async def _build(self, state: SessionState, node: str, *, anew: bool) -> Snapshot:
        """A new process in `state`, held: forked from the nearest kept state before it (`anew`:
        from the beginning), in which the missing cells run again."""
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
            self._release(base)
        if self._alone:
            result = replace(result, snapshot=Keep.NEWEST)
        replayed = len(missing) - (missing[0] == 0)
        self._means.metrics.replays += bool(replayed)
        self._means.metrics.replayed_calls += replayed
        return await self._after(base, process, node, time.monotonic() - started, result)

    async def _nearest(self, state: SessionState, *, anew: bool) -> tuple[Snapshot, list[int]]:
        """The nearest kept state before `state`, held, and the cells that are missing from there:
        0 is the setup, k the k-th entry."""
        missing = list[int]()
        for index in range(len(state.entries), 0, -1):
            entry = state.entries[index - 1]
            if entry.lost:
                continue
            found = self._nodes.get(entry.node)
            if not anew and missing and found is not None and found.forkable:
                held = self._take(entry.node)
                if held is not None:
                    return held, missing
            missing.insert(0, index)
        if state.setup:
            held = None if anew or not missing else self._take(_START + state.setup)
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
        result = await self._run(process, entry.code, index, patient)
        if result.kind is Kind.SANDBOX_FAILURE:
            raise SandboxFailure(result.traceback)
        if result.digest() != entry.digest:
            self._means.metrics.diverged += 1
            raise ReplayDiverged(
                f"replay diverged: call {index} of {len(state.entries)} came to "
                f"{result.kind.value}, with another result than when it was recorded"
            )
        return result
