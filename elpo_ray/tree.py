"""The rollout tree: the wire format between growth, credit, learner and viewer.

Invariants: node 0 is the prompt; a node is one step (action and observation) of its parent's
continuation; a parent's id is smaller than its children's; every leaf is one completed trajectory
and carries its reward and success; inner nodes carry neither. `dump` writes and reads trees.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from elpo_ray.types import EndReason, Message, Score, Step


@dataclass(slots=True)
class Node:
    """One step of the tree. `step` is None for the root and for trees loaded from a bare dump."""

    id: int
    parent: int | None
    step: Step | None = None
    children: list[int] = field(default_factory=list)
    score: Score | None = None
    """Set exactly on leaves."""
    end: EndReason | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    """Optional fields of a loaded dump, kept as they came."""
    group: int | None = None
    """On leaves of a growth rule with several trees per input: which of them it belongs to."""
    label: int = -1
    """The id in dumps: that of the dump it was loaded from, otherwise `id`."""

    def __post_init__(self) -> None:
        if self.label < 0:
            self.label = self.id


@dataclass(frozen=True, slots=True)
class Probe:
    """Completions with a verdict, sampled from the prefix that ends with step `anchor` of the path
    that is searched."""

    anchor: int
    attempts: int
    successes: int


@dataclass(slots=True)
class Localization:
    """What one search of a failed trajectory found (spec of BEL, Algorithm 1)."""

    leaf: int
    """The searched trajectory."""
    critical: int | None
    """Node id of the first irrecoverable step; None unless the search finished."""
    confirmed: bool
    interval: tuple[int, int]
    """Steps, 1-based along the searched path, among which the critical one lies, inclusive."""
    probes: list[Probe] = field(default_factory=list)


class RolloutTree:
    """All completed trajectories of one input."""

    def __init__(
        self,
        task_id: str,
        budget: int,
        prompt_ids: tuple[int, ...] = (),
        messages: Sequence[Message] = (),
    ) -> None:
        self.task_id = task_id
        self.budget = budget
        """N_total, in completed trajectories."""
        self.prompt_ids = prompt_ids
        self.messages = list(messages)
        """The prompt as chat messages, for people."""
        self.nodes: list[Node] = [Node(id=0, parent=None)]
        self.localizations: list[Localization] = []
        self.ledger: list[dict[str, Any]] = []
        """The budget ledger's entries, one a spend (`growth.budget`)."""

    def add(self, parent: int, step: Step | None = None) -> Node:
        """Append a step below `parent` and return its node."""
        assert self.nodes[parent].score is None, "a completed trajectory cannot be continued"
        node = Node(id=len(self.nodes), parent=parent, step=step)
        self.nodes.append(node)
        self.nodes[parent].children.append(node.id)
        return node

    def add_trajectory(
        self, at: int, steps: list[Step], score: Score, end: EndReason | None = None
    ) -> int:
        """Append completed `steps` below node `at`; returns the leaf's id."""
        assert steps, "a trajectory has at least its answer turn"
        assert math.isfinite(score.reward), f"reward {score.reward} is not a finite number"
        for step in steps:
            at = self.add(at, step).id
        self.nodes[at].score, self.nodes[at].end = score, end
        return at

    def leaves(self) -> list[Node]:
        """Completed trajectories, in the order they finished."""
        return [node for node in self.nodes if node.score is not None]

    def edges(self) -> list[tuple[int, int]]:
        """(parent, child) of every step, parents first."""
        return [(node.parent, node.id) for node in self.nodes if node.parent is not None]

    def path(self, node_id: int) -> list[int]:
        """Node ids from the first step down to `node_id`; the root is left out, so that
        `path[m - 1]` is step m."""
        path: list[int] = []
        node = self.nodes[node_id]
        while node.parent is not None:
            path.append(node.id)
            node = self.nodes[node.parent]
        return path[::-1]

    def steps(self, node_id: int) -> list[Step]:
        """The steps of `path(node_id)`."""
        return [step for i in self.path(node_id) if (step := self.nodes[i].step) is not None]

    def subtree(self, node_id: int) -> Iterator[Node]:
        """`node_id` and everything below it, parents first."""
        stack = [node_id]
        while stack:
            node = self.nodes[stack.pop()]
            yield node
            stack.extend(reversed(node.children))

    def leaves_below(self) -> list[list[int]]:
        """For every node, the leaf ids at or below it. Shape: [num_nodes][...]."""
        below: list[list[int]] = [[] for _ in self.nodes]
        for leaf in self.leaves():
            for i in (0, *self.path(leaf.id)):
                below[i].append(leaf.id)
        return below

    def prefix_ids(self, node_id: int) -> list[int]:
        """All token ids up to and including `node_id`'s observation."""
        ids = list(self.prompt_ids)
        for step in self.steps(node_id):
            ids.extend(step.turn.token_ids)
            ids.extend(step.observation_ids)
        return ids
