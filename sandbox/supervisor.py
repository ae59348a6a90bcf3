"""Sessions of one host: a bounded number of confined processes and the states they stand for.

Invariants: the log of a session never contains a call whose outcome is unknown; a session is only a
place in its tree, so that opening one at a kept state costs nothing; every process is gone when its
tree is. Nothing here blocks the event loop.
"""

from __future__ import annotations

import asyncio
import os
import resource
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace

from sandbox.confine import TIERS
from sandbox.files import checked, parts_of
from sandbox.launch import SpawnerClient
from sandbox.limits import Limits, check_number
from sandbox.metrics import Metrics
from sandbox.process import SessionProcess
from sandbox.results import (
    CallResult,
    FileRefused,
    Keep,
    Kind,
    Put,
    SandboxFailure,
    SessionState,
    check_opening,
    check_type,
    refusal,
)
from sandbox.shortage import explained, explaining
from sandbox.snapshots import Shelf
from sandbox.tree import Means, Tree

PRELOADS: dict[str, tuple[str, ...]] = {
    "none": (),
    "math": ("numpy", "sympy"),
    "sci": ("numpy", "sympy", "scipy", "pandas"),
}
"""What sessions find imported, by name; what is not installed is left out."""
_MEMORY_SHARE = 4
"""Without `snapshot_mib`, snapshots may take one part in so many of this host's memory."""
_DESCRIPTORS_EACH, _DESCRIPTORS_OTHER = 4, 256
"""What a snapshot (the most costly ones: those that cannot be forked) and everything else need of
this process."""


class Session:
    """A stateful interpreter. Opened by `Sandbox.open`; calls run one after the other."""

    def __init__(
        self, sandbox: Sandbox, tree: Tree, state: SessionState, *, keep: Keep, waited_s: float
    ) -> None:
        self._sandbox = sandbox
        self._tree = tree
        self._state = replace(state, tree=tree.key, host=sandbox.id)
        self._keep = keep
        self._restored_by = "fork" if state.entries else "fresh"
        self._replay_reason = ""
        self._waited_s = waited_s
        """Seconds that the session waited for its place; the first call reports them."""
        self._one_at_a_time = asyncio.Lock()
        self._running: SessionProcess | None = None
        """Where the latest call runs."""
        self._closed = False

    @property
    def state(self) -> SessionState:
        """Where the session stands: after the last call that returned."""
        return self._state

    async def call(self, code: str) -> CallResult:
        """Run one cell. A failure of the sandbox is a result too, and so is the refusal of too
        long a code: both leave `state` as it was.

        Raises ValueError when the session is closed.
        """
        async with self._one_at_a_time:
            self._check_open()
            refused = refusal(code)
            if refused is not None:
                self._sandbox.metrics.count(refused)
                return refused
            try:
                result = await self._step(code)
            except SandboxFailure as failure:
                result = _failed(type(failure), str(failure))
            except OSError as error:  # this process is short of something
                result = _failed(SandboxFailure, explained(error))
            result = replace(
                result,
                queue_s=result.queue_s + self._waited_s,
                restored_by=self._restored_by,
                replay_reason=self._replay_reason,
                isolation=self._sandbox.isolation,
            )
            self._waited_s = 0.0
            if not result.state_kept and self._restored_by == "fresh":
                self._restored_by = "fork"
            self._sandbox.metrics.count(result)
            return result

    async def put(self, name: str, data: bytes) -> None:
        """Put a file into the work folder, under a relative path; what is there under this name is
        replaced, and folders that are missing are made. It is a step of the session as a call is:
        `state` is another one afterwards, and branches of that have the file.

        Raises FileRefused, SandboxFailure, ValueError when the session is closed.
        """
        kept = self._keep is not Keep.NOTHING
        file = checked(name, data, self._sandbox.limits, kept=kept)
        async with self._one_at_a_time:
            self._check_open()
            try:
                with explaining(f"file {name!r}"):
                    result = await self._step(file)
            except SandboxFailure:
                self._sandbox.metrics.failures += 1
                raise
        if result.kind is not Kind.OK:
            raise FileRefused(result.traceback)

    async def get(self, name: str) -> bytes:
        """A file of the work folder, as it is in `state`, by its relative path.

        Raises FileRefused, SandboxFailure, ValueError when the session is closed.
        """
        parts_of(name)
        async with self._one_at_a_time:
            self._check_open()
            with explaining(f"file {name!r}"):
                data, reason = await self._tree.get(self._state, name)
            self._note(reason)
            return data

    def interrupt(self) -> bool:
        """End the cell that runs: it comes to "killed", and the session goes on in the state before
        it. False if none runs."""
        if self._running is None:
            return False
        self._running.accuse("interrupted")
        return True

    async def close(self) -> None:
        """Free the session's place; without a lasting tree its snapshots go too. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._tree.sessions -= 1
        try:
            await self._sandbox.leave(self._tree)
        finally:
            self._sandbox.free(self)

    async def restore(self) -> None:
        """Have a process in `state`, by replay if there is no snapshot. Raises SandboxFailure."""
        self._note(await self._tree.ensure(self._state))

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the session is closed: open a new one, at its state if need be")

    def _note(self, reason: str) -> None:
        """Note that there was a replay, if there was a reason for one."""
        if reason:
            self._restored_by, self._replay_reason = "replay", reason

    async def _step(self, work: str | Put) -> CallResult:
        """Go on from `state` to the one after `work`. Raises SandboxFailure."""

        def began(process: SessionProcess) -> None:
            self._running = process

        try:
            result, reason = await self._tree.call(self._state, work, keep=self._keep, began=began)
        finally:
            self._running = None
        self._note(reason)
        if result.kind is Kind.SANDBOX_FAILURE and not isinstance(work, str):
            raise SandboxFailure(result.traceback)
        if self._keep is not Keep.NOTHING:
            self._state = self._state.after(work, result)
        return result


class Sandbox:
    """A pool of sessions on this host, under one event loop. `async with` closes it."""

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        sessions: int = 64,
        running: int | None = None,
        snapshots: int = 1024,
        snapshot_mib: int | None = None,
        replay_below_s: float = 0.0,
        preload: Sequence[str] = (),
        isolation: str = "standard",
        allow_degraded: bool = False,
        bubblewrap: bool = False,
    ) -> None:
        """`sessions` bounds those open at once: `open` waits for a free place, so a holder of
        one session must not need a second one to go on. `running` bounds the calls that execute at
        the same time (default: processors of this host); others wait, outside their time limit.
        `snapshots` and `snapshot_mib` (default: a quarter of this host's memory) bound the kept
        states; beyond them the least recently used are given up, to be rebuilt by replay. The
        open files that this process may have bound them too. Cells that took less than
        `replay_below_s` since the last kept state are not kept but repeated if a branch starts
        after them: much less work for short calls, and only for code that always does the same,
        since a repetition that comes out otherwise is a failure. `preload` names modules that every
        session finds imported, see `PRELOADS`. `isolation` is the least tier to accept, "strong"
        or "standard"; the best that works here is taken. `allow_degraded` runs with less where
        this machine lacks layers: for code you trust. `bubblewrap` has `bwrap` make the
        namespaces of "strong", and starts with nothing else.
        """
        for name, value in (
            ("sessions", sessions),
            ("running", running),
            ("snapshots", snapshots),
            ("snapshot_mib", snapshot_mib),
        ):
            if value is not None:
                check_number(name, value, whole=True, least=1)
        check_number("replay_below_s", replay_below_s, whole=False, least=0)
        check_type("limits", limits, (Limits, type(None)), "sandbox.limits.Limits(...), or None")
        check_type("allow_degraded", allow_degraded, bool, "True or False")
        check_type("bubblewrap", bubblewrap, bool, "True or False")
        named = isinstance(preload, Sequence) and all(isinstance(name, str) for name in preload)
        if isinstance(preload, str) or not named:
            raise ValueError(f"preload={preload!r:.100}: use a list of names")
        if isolation not in TIERS[:2]:
            raise ValueError(
                f'isolation={isolation!r}: use "strong" or "standard"; for less, allow_degraded'
            )
        self.id = secrets.token_hex(8)
        """Names this sandbox in the states that it hands out."""
        self.limits = limits or Limits()
        """What a session may use."""
        self.metrics = Metrics()
        """Counters since the start."""
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        max_bytes = memory // _MEMORY_SHARE if snapshot_mib is None else snapshot_mib << 20
        self._shelf = Shelf(max_bytes, min(snapshots, _descriptors_for()))
        running_now = asyncio.Semaphore(running or len(os.sched_getaffinity(0)))
        self._means = Means(
            self.limits, running_now, self._shelf, self.metrics, self._client, replay_below_s
        )
        self._places = asyncio.Semaphore(sessions)
        self._preload = tuple(preload)
        self._required = isolation
        self._allow_degraded = allow_degraded
        self._bubblewrap = bubblewrap
        self._spawner: SpawnerClient | None = None
        self._starting = asyncio.Lock()
        self._sessions: set[Session] = set()
        self._trees: dict[str, Tree] = {}
        self._closed = False

    async def __aenter__(self) -> Sandbox:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def isolation(self) -> str:
        """The tier in force; empty before the first session."""
        return self._spawner.isolation if self._spawner else ""

    @property
    def layers(self) -> tuple[str, ...]:
        """Kernel layers in force; empty before the first session."""
        return self._spawner.layers if self._spawner else ()

    async def open(
        self,
        setup: str = "",
        at: SessionState | None = None,
        *,
        tree: str | None = None,
        keep: Keep = Keep.STATES,
    ) -> Session:
        """A session that ran `setup`, or stands where `at` does.

        Sessions of one `tree` share its snapshots, and so branch from each other's states without
        a replay; the tree lasts until `release`. Without a name it is that of `at`, if it still
        exists here, or one of its own that ends with its last session. `keep` less than every
        state where no branch will start from them: a fork costs more than a short call.

        Raises SandboxFailure (also when a replay diverges or the setup fails),
        SandboxUnavailable when this machine cannot isolate, ValueError when closed.
        """
        check_opening(setup, at, tree, keep)
        if at is not None and setup not in ("", at.setup):
            raise ValueError(f"setup={setup!r}: the state has a setup of its own, leave it out")
        self._check_open()
        asked = time.monotonic()
        await self._places.acquire()
        waited_s = time.monotonic() - asked
        state = at or SessionState(setup)
        if tree is None and state.tree not in self._trees and keep is Keep.NEWEST:
            place = Tree(self._means, "", lasting=False, alone=True)
        else:
            place = self._tree(state.tree if tree is None else tree, lasting=tree is not None)
        place.sessions += 1
        session = Session(self, place, state, keep=keep, waited_s=waited_s)
        self._sessions.add(session)
        try:
            with explaining("no session"):
                await session.restore()
        except BaseException as error:
            self.metrics.failures += isinstance(error, SandboxFailure)
            await session.close()
            raise
        self.metrics.opened += 1
        return session

    async def release(self, tree: str) -> None:
        """The tree of this name is done: give up its snapshots, once its sessions are closed.

        Its states can still be opened, by replay. An unknown name has been released already."""
        found = self._trees.get(tree)
        if found is not None:
            found.lasting = False
            await self.leave(found)

    async def close(self) -> None:
        """Close every session and end the spawner; no process is left. May be called again."""
        self._closed = True
        await asyncio.gather(*(session.close() for session in list(self._sessions)))
        await asyncio.gather(*(self.release(key) for key in list(self._trees)))
        async with self._starting:
            if self._spawner is not None:
                await self._spawner.close()
                self._spawner = None

    def gauges(self) -> dict[str, float]:
        """The metrics, with what is alive at the moment."""
        return {
            **self.metrics.values(),
            "live_sessions": len(self._sessions),
            "live_trees": len(self._trees),
            "live_snapshots": len(self._shelf),
            "snapshot_bytes": self._shelf.bytes,
            "evicted": self._shelf.evicted,
        }

    async def leave(self, tree: Tree) -> None:
        """Close a tree that no session needs any longer."""
        if tree.sessions == 0 and not tree.lasting:
            if self._trees.get(tree.key) is tree:
                del self._trees[tree.key]
            await tree.close()

    def free(self, session: Session) -> None:
        """A session is closed: its place is free."""
        self._sessions.discard(session)
        self._places.release()

    def _tree(self, key: str, *, lasting: bool) -> Tree:
        found = self._trees.get(key)
        if found is None:
            key = key if lasting else secrets.token_hex(8)
            found = self._trees[key] = Tree(self._means, key, lasting=lasting)
        found.lasting |= lasting
        return found

    async def _client(self) -> SpawnerClient:
        """The spawner, a new one if the last one died. Raises as `open`."""
        self._check_open()
        async with self._starting:
            if self._spawner is not None and not self._spawner.alive:
                await self._spawner.close()
                self._spawner = None
            if self._spawner is None:
                self._spawner = await SpawnerClient.start(
                    self.limits,
                    self._preload,
                    isolation=self._required,
                    allow_degraded=self._allow_degraded,
                    bubblewrap=self._bubblewrap,
                )
            return self._spawner

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the sandbox is closed: make a new one")


def _failed(how: type[SandboxFailure], why: str) -> CallResult:
    return CallResult(
        kind=Kind.SANDBOX_FAILURE, error_type=how.__name__, traceback=why, state_kept=False
    )


def _descriptors_for() -> int:
    """How many snapshots this process has open files for."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(1, (soft - _DESCRIPTORS_OTHER) // _DESCRIPTORS_EACH)
