"""Which states of one tree have a process, why others have none, and whose doing that was.

Invariants: a node names one state, in whatever process; a process stands for at most one node; a
snapshot that is in use is never given up.
"""

from __future__ import annotations

from sandbox.endings import Tampered
from sandbox.results import CallResult, Kind, ReplayReason, SandboxFailure, SessionState
from sandbox.snapshots import Shelf, Snapshot

START = "="
"""Names the state before any code; with the setup behind it, the state after that."""


def node_of(state: SessionState) -> str:
    """The name of a state."""
    entries = state.effective
    return entries[-1].node if entries else START + state.setup


class States:
    """The table of one tree."""

    def __init__(self, shelf: Shelf, room: int) -> None:
        """`shelf`: that of the sandbox. `room`: most nodes."""
        self._shelf, self.room = shelf, room
        self._nodes: dict[str, Snapshot] = {}
        """The least recently used first."""
        self._gone: dict[str, str] = {}
        """Why a state has no process any more that others could go on from, by its node."""
        self._broken: set[str] = set()
        """States that nobody can fork by the doing of their own code: it left what cannot be
        branched, did not fork in order or ended the process. Should they not come out the same
        again, that is no failure of the sandbox."""

    def __len__(self) -> int:
        return len(self._nodes)

    def clear(self) -> None:
        """Forget all of them."""
        for snapshot in self._nodes.values():
            self._shelf.forget(snapshot)
        self._nodes.clear()

    def can_fork(self, node: str) -> bool:
        """Whether a state has a process that can be forked."""
        found = self._nodes.get(node)
        return found is not None and found.forkable

    def why(self, node: str) -> str:
        """Why nobody can go on from the process that was in a state."""
        found = self._nodes.get(node)
        return self._gone.get(node, ReplayReason.ELSEWHERE) if found is None else found.lacks

    def take(self, node: str) -> Snapshot | None:
        """Hold a kept snapshot; one that cannot be forked leaves table and shelf with it, for its
        process goes on to another state."""
        found = self._nodes.get(node)
        if found is None or not found.there:
            return None
        found.users += 1
        if found.forkable:
            self.put(found)
        else:
            self._gone[node] = found.status
            del self._nodes[node]
            self._shelf.forget(found)
        return found

    def put(self, snapshot: Snapshot) -> None:
        """Into the table, as the most recently used; older ones make room."""
        self._nodes.pop(snapshot.node, None)
        self._nodes[snapshot.node] = snapshot
        if snapshot.forkable:
            snapshot.lineage.retire(snapshot.process)
        if snapshot.node == START:
            return
        self._shelf.keep(snapshot)
        given_up = set(self._shelf.surplus())
        too_many = len(self._nodes) - self.room
        if too_many > 0:
            own = [each for each in self._nodes.values() if not each.users and each.node != START]
            given_up |= set(own[:too_many])
        for old in given_up:
            self._shelf.forget(old)
            old.lacks = ReplayReason.EVICTED
            old.give_up()

    def release(self, held: Snapshot) -> None:
        """The end of `take`, or of holding a snapshot that is new."""
        held.users -= 1
        if not held.there or held.users:
            return
        if held.node not in self._nodes:
            self.put(held)
        elif self._nodes[held.node] is not held:  # another process took its place
            held.give_up()

    def forget(self, snapshot: Snapshot) -> None:
        """Its process ended."""
        self._shelf.forget(snapshot)
        if self._nodes.get(snapshot.node) is snapshot:
            self._gone[snapshot.node] = snapshot.lacks
            del self._nodes[snapshot.node]
        if not snapshot.spent and snapshot.process.ended_itself:
            self.mark_broken(snapshot.node)

    def is_broken(self, node: str) -> bool:
        """Whether code, not the sandbox, is the cause if a state cannot be had any more."""
        return node in self._broken

    def mark_broken(self, node: str) -> None:
        """Note that code is the cause if a state cannot be had any more. The start has no code."""
        if not node.startswith(START):
            self._broken.add(node)

    async def accuse(self, held: Snapshot, failure: SandboxFailure) -> None:
        """Note why a state did not go on, and whether it was code that kept it from that."""
        tampered = isinstance(failure, Tampered)
        held.lacks = ReplayReason.TAMPERED if tampered else ReplayReason.LOST
        self._gone[held.node] = held.lacks
        if tampered or await held.process.ended_itself_after_all():
            self.mark_broken(held.node)

    def note_loss(self, held: Snapshot, result: CallResult) -> None:
        """Note whether code ended the only process that was in its state, or somebody else did."""
        if not held.spent or result.state_kept:
            return
        if result.kind is Kind.SANDBOX_FAILURE:
            self._broken.discard(held.node)
        else:
            self.mark_broken(held.node)
