"""The rollout tree: the wire format between growth, credit, learner and viewer.

Invariants: node 0 is the prompt; a node is one step (action and observation) of its parent's
continuation; a parent's id is smaller than its children's; every leaf is one completed trajectory
and carries its reward and success; inner nodes carry neither. `dump` writes and reads trees.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from msgspec import Meta

from elpo_ray.types import EndReason, Message, Score, Step


@dataclass(slots=True)
class Node:
    """One step of the tree. `step` is None for the root and for trees loaded from a bare dump."""

    id: int
    """Its place in `RolloutTree.nodes`."""
    parent: int | None
    """The parent's id; None for the root."""
    step: Step | None = None
    """The turn, and the tool's response to it."""
    children: list[int] = field(default_factory=list)
    """The children's ids, in the order in which they came."""
    score: Score | None = None
    """A leaf has one, an inner node has None."""
    end: EndReason | None = None
    """Why the trajectory ended, on a leaf."""
    extra: dict[str, Any] = field(default_factory=dict)
    """The optional fields of a loaded dump are kept here as they came."""
    group: int | None = None
    """A leaf's tree, where the growth rule grows several trees for one input."""
    label: int = -1
    """The id in dumps is the one of the dump that the node was loaded from, otherwise `id`."""

    def __post_init__(self) -> None:
        if self.label < 0:
            self.label = self.id


@dataclass(frozen=True, slots=True)
class Probe:
    """Completions with a verdict, all sampled from one prefix of the searched path."""

    anchor: Annotated[int, Meta(ge=1, description="The prefix ends with this step, from 1.")]
    """The prefix ends with this step, counted from 1."""
    attempts: Annotated[int, Meta(ge=0)]
    """Completions that were sampled and have a verdict."""
    successes: Annotated[int, Meta(ge=0)]
    """Those of them that succeeded."""


Probability = Annotated[float, Meta(ge=0, le=1)]
"""A number from 0 to 1."""


@dataclass(frozen=True, slots=True)
class Posterior:
    """What a search believed of its trajectory: how likely each step 1..K+1 is the first
    irrecoverable one."""

    prior: Annotated[list[Probability], Meta(description="Before any completion was seen.")]
    beta: Annotated[
        tuple[float, float],
        Meta(description="(a, b): a recoverable prefix succeeds with a chance from Beta(a, b)."),
    ]
    free: Annotated[
        list[Probe],
        Meta(description="Trajectories of the tree that went through an anchor before the search."),
    ]
    trail: Annotated[
        list[list[Probability]],
        Meta(min_length=1, description="Before the first probe, and after each."),
    ]

    @property
    def last(self) -> list[float]:
        """What the search believed at its end."""
        return self.trail[-1]


@dataclass(slots=True)
class Localization:
    """What one search of a failed trajectory found."""

    leaf: Annotated[int, Meta(description="Id of the searched, failed leaf.")]
    critical: Annotated[
        int | None,
        Meta(description="Id of the first irrecoverable step's node; null: search not finished."),
    ]
    confirmed: bool
    """Whether the search was finished, so that its critical step counts in credit."""
    interval: Annotated[
        tuple[int, int],
        Meta(description="First and last step, from 1, among which the critical one lies."),
    ]
    probes: Annotated[list[Probe], Meta(description="In the order they were made.")]
    posterior: Annotated[
        Posterior | None, Meta(description="Of a search by evidence; null of a binary search.")
    ] = None


@dataclass(frozen=True, slots=True)
class Branch:
    """Completions that a growth rule sampled from a prefix of one trajectory, to be compared with
    each other or with it. A leaf that is in no branch is a root leaf."""

    parent: Annotated[int, Meta(description="Id of the leaf whose prefix is continued.")]
    anchor: Annotated[
        int, Meta(ge=0, description="Steps of the prefix; 0: they began at the prompt.")
    ]
    leaves: Annotated[list[int], Meta(description="In the order asked.")]
    kept: Annotated[
        list[int],
        Meta(description="Those that are trained on; the others are paid for and left out."),
    ]

    def renamed(self, names: Mapping[int, int] | Sequence[int]) -> Branch:
        """Return the branch with other names for its leaves."""
        leaves, kept = ([names[leaf] for leaf in part] for part in (self.leaves, self.kept))
        return Branch(names[self.parent], self.anchor, leaves, kept)


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
        """The id of the problem (`Problem.id`)."""
        self.budget = budget
        """This is N_total, counted in completed trajectories."""
        self.prompt_ids = prompt_ids
        """Token ids of the prompt."""
        self.messages = list(messages)
        """These are the prompt as chat messages, for people."""
        self.nodes: list[Node] = [Node(id=0, parent=None)]
        """The nodes by id. Node 0 is the prompt."""
        self.localizations: list[Localization] = []
        """What the searches found, in the order in which they ended."""
        self.branches: list[Branch] = []
        """What its branchings gave, for credit that compares completions with their base."""
        self.ledger: list[dict[str, Any]] = []
        """It holds the budget ledger's entries, one for each spend (`growth.budget`)."""

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
        """Append completed `steps` below node `at` and return the leaf's id."""
        assert steps, "a trajectory has at least its answer turn"
        assert math.isfinite(score.reward), f"reward {score.reward} is not a finite number"
        for step in steps:
            at = self.add(at, step).id
        self.nodes[at].score, self.nodes[at].end = score, end
        return at

    def leaves(self) -> list[Node]:
        """Return the completed trajectories, in the order they finished."""
        return [node for node in self.nodes if node.score is not None]

    def owners(self) -> list[int]:
        """Return, for every node, the leaf whose completion added it; a node's first child belongs
        to the same completion. The root has 0. Shape: [num_nodes]."""
        owners = [node.id for node in self.nodes]
        for node in reversed(self.nodes[1:]):
            if node.children:
                owners[node.id] = owners[node.children[0]]
        return owners

    def edges(self) -> list[tuple[int, int]]:
        """Return (parent, child) of every step, parents first."""
        return [(node.parent, node.id) for node in self.nodes if node.parent is not None]

    def path(self, node_id: int) -> list[int]:
        """Return the node ids from the first step down to `node_id`. The root is left out, so
        that `path[m - 1]` is step m."""
        path: list[int] = []
        node = self.nodes[node_id]
        while node.parent is not None:
            path.append(node.id)
            node = self.nodes[node.parent]
        return path[::-1]

    def steps(self, node_id: int) -> list[Step]:
        """Return the steps of `path(node_id)`."""
        return [step for i in self.path(node_id) if (step := self.nodes[i].step) is not None]

    def leaves_below(self) -> list[list[int]]:
        """Return the leaf ids at or below every node: one list for each node."""
        below: list[list[int]] = [[] for _ in self.nodes]
        for leaf in self.leaves():
            for i in (0, *self.path(leaf.id)):
                below[i].append(leaf.id)
        return below

    def prefix_ids(self, node_id: int) -> list[int]:
        """Return all token ids up to and including `node_id`'s observation."""
        ids = list(self.prompt_ids)
        for step in self.steps(node_id):
            ids.extend(step.turn.token_ids)
            ids.extend(step.observation_ids)
        return ids
