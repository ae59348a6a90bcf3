"""The rollout tree: the wire format between growth, credit, learner and viewer.

Invariants: node 0 is the prompt; a node is one step (action and observation) of its parent's
continuation; a parent's id is smaller than its children's; every leaf is one completed trajectory
and carries its reward and success; inner nodes carry neither. A tree is dumped as one line of JSON
(`docs/tree.schema.json`); loading accepts the nodes in any order and any distinct ids >= 0, checks
all of the above, and keeps the ids as labels.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from elpo_ray.types import EndReason, Message, Score, Step, Turn

FORMAT = 1
"""Version of the dump; a reader refuses any other."""
MAX_REWARD = 1e100
"""Largest reward in a dump, so that no variance overflows."""
CORE_FIELDS = frozenset({"id", "parent", "leaf", "reward", "success", "graded", "end", "group"})
"""Fields of a dumped node that have a place in `Node`; all others stay in `Node.extra`."""


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


class MalformedTreeError(ValueError):
    """A dumped tree that breaks the format; the message names the field and the value."""


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

    def to_json(self, tokens: bool = True) -> dict[str, Any]:
        """The tree as JSON data (`docs/tree.schema.json`); dumps hold one tree a line. `tokens`:
        ids, entropies and log-probabilities of every sampled token too."""
        label = [node.label for node in self.nodes]
        localizations = [
            {
                "leaf": label[found.leaf],
                "critical": None if found.critical is None else label[found.critical],
                "confirmed": found.confirmed,
                "interval": list(found.interval),
                "probes": [
                    {"anchor": p.anchor, "attempts": p.attempts, "successes": p.successes}
                    for p in found.probes
                ],
            }
            for found in self.localizations
        ]
        entries = [
            entry if entry.get("leaf") is None else {**entry, "leaf": label[entry["leaf"]]}
            for entry in self.ledger
        ]
        record = {
            "format": FORMAT,
            "task_id": self.task_id,
            "budget": self.budget,
            "nodes": [self._node_record(node, tokens) for node in self.nodes],
            "localizations": localizations,
            "ledger": entries,
        }
        return record | {"messages": self.messages} if self.messages else record

    def _node_record(self, node: Node, tokens: bool) -> dict[str, Any]:
        parent = None if node.parent is None else self.nodes[node.parent].label
        record: dict[str, Any] = {"id": node.label, "parent": parent}
        if node.score is not None:
            record |= {"leaf": True, "reward": node.score.reward, "success": node.score.success}
            if not node.score.graded:
                record["graded"] = False
        if node.end is not None:
            record["end"] = node.end.value
        if node.group is not None:
            record["group"] = node.group
        if node.step is not None:
            record |= _step_record(node.step)
            if tokens:
                record |= _token_record(node.step.turn)
        return record | node.extra

    @classmethod
    def from_line(cls, line: str) -> RolloutTree:
        """The tree of one line of a dump. Raises MalformedTreeError."""
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise MalformedTreeError(f"not JSON: {error}") from error
        return cls.from_json(record)

    @classmethod
    def from_json(cls, record: Any) -> RolloutTree:
        """The tree of `to_json`'s data, without steps. Raises MalformedTreeError."""
        _expect(isinstance(record, dict), "tree", record, "must be an object")
        version = record.get("format", FORMAT)
        _expect(version == FORMAT, "format", version, f"this reader knows format {FORMAT}")
        task_id, budget = record.get("task_id"), record.get("budget")
        _expect(isinstance(task_id, str), "task_id", task_id, "must be a string")
        _expect(_is_int(budget) and budget > 0, "budget", budget, "must be an integer above 0")
        messages = _list(record, "messages")
        for i, message in enumerate(messages):
            _expect(isinstance(message, dict), f"messages[{i}]", message, "must be an object")
        tree = cls(task_id, budget, messages=messages)
        index = _load_nodes(tree, _list(record, "nodes", required=True))
        for i, found in enumerate(_list(record, "localizations")):
            tree.localizations.append(_load_localization(tree, index, found, f"localizations[{i}]"))
        for i, entry in enumerate(_list(record, "ledger")):
            where = f"ledger[{i}]"
            _expect(isinstance(entry, dict), where, entry, "must be an object")
            leaf = entry.get("leaf")
            _expect(leaf is None or _known(leaf, index), f"{where}.leaf", leaf, "no such node")
            tree.ledger.append(entry if leaf is None else {**entry, "leaf": index[leaf]})
        return tree


def _step_record(step: Step) -> dict[str, Any]:
    """The optional fields of a grown node; `entropy` is the mean over the whole turn, in nats."""
    turn, result = step.turn, step.result
    record: dict[str, Any] = {
        "text": step.action_text,
        "num_action_tokens": len(turn.token_ids),
        "weight_version": turn.weight_version,
    }
    if turn.entropies:
        record["entropy"] = math.fsum(turn.entropies) / len(turn.entropies)
    if step.call is not None:
        record["tool"] = step.call.name
    if result is not None:
        record |= {
            "observation": step.observation_text,
            "num_observation_tokens": len(step.observation_ids),
            "tool_kind": result.kind.value,
            "tool_seconds": result.duration_s,
        }
        if result.restored_by:
            record["restored_by"] = result.restored_by
    return record


def _token_record(turn: Turn) -> dict[str, Any]:
    """The lists run parallel; values in nats, to 4 decimals."""
    return {
        "token_ids": list(turn.token_ids),
        "token_entropies": [round(value, 4) for value in turn.entropies],
        "token_logprobs": [round(value, 4) for value in turn.logprobs],
    }


def _load_nodes(tree: RolloutTree, records: list[Any]) -> dict[int, int]:
    """Fill an empty `tree`; returns the place in `tree.nodes` of every label."""
    by_label: dict[int, dict[str, Any]] = {}
    for i, record in enumerate(records):
        _expect(isinstance(record, dict), f"nodes[{i}]", record, "must be an object")
        label = record.get("id")
        _expect(_is_int(label) and label >= 0, f"nodes[{i}].id", label, "must be an integer >= 0")
        _expect(label not in by_label, f"nodes[{i}].id", label, "appears twice")
        by_label[label] = record
    _expect(0 in by_label, "nodes", sorted(by_label), "node 0, the prompt, is missing")
    _expect(len(by_label) > 1, "nodes", records, "no completed trajectory")
    for label, record in by_label.items():
        where, parent = f"node {label}: parent", record.get("parent")
        if label == 0:
            _expect(parent is None, where, parent, "node 0 is the root; its parent must be null")
        else:
            _expect(_known(parent, by_label), where, parent, "no such node")
    parents = {record.get("parent") for record in by_label.values()}
    index = {0: 0}
    for label in _parents_first(by_label):
        if label != 0:
            node = tree.add(index[by_label[label]["parent"]])
            node.label, index[label] = label, node.id
        record, node = by_label[label], tree.nodes[index[label]]
        node.extra = {key: value for key, value in record.items() if key not in CORE_FIELDS}
    for label, record in by_label.items():
        node = tree.nodes[index[label]]
        if label in parents:
            for key in ("leaf", "reward", "success", "graded", "end", "group"):
                value = record.get(key)
                allowed = value is None or (key == "leaf" and value is False)
                _expect(allowed, f"node {label}: {key}", value, "an inner node has none")
        else:
            node.score, node.end = _load_leaf(record, f"node {label}")
            node.group = record.get("group")
            known = node.group is None or _is_int(node.group)
            _expect(known, f"node {label}: group", node.group, "must be an integer")
    return index


def _load_leaf(record: dict[str, Any], where: str) -> tuple[Score, EndReason | None]:
    leaf = record.get("leaf")
    reward: Any = record.get("reward")
    success: Any = record.get("success")
    _expect(leaf is True, f"{where}: leaf", leaf, "a node without children must be a leaf: true")
    number = isinstance(reward, int | float) and not isinstance(reward, bool)
    finite = number and abs(reward) <= MAX_REWARD
    _expect(finite, f"{where}: reward", reward, f"a leaf needs a number within ±{MAX_REWARD:g}")
    _expect(isinstance(success, bool), f"{where}: success", success, "a leaf needs true or false")
    end = record.get("end")
    known = end is None or end in list(EndReason)
    _expect(known, f"{where}: end", end, f"use one of {', '.join(EndReason)}")
    graded = record.get("graded", True)
    sound = isinstance(graded, bool) and (graded or not success)
    _expect(sound, f"{where}: graded", graded, "must be true, or false on a leaf without success")
    return Score(float(reward), success, graded), None if end is None else EndReason(end)


def _parents_first(by_label: dict[int, dict[str, Any]]) -> dict[int, None]:
    """Labels in file order, every ancestor moved ahead of its descendants; the root comes first."""
    placed: dict[int, None] = {0: None}
    for start in by_label:
        chain: dict[int, None] = {}
        label = start
        while label not in placed:
            _expect(label not in chain, f"node {label}: parent", by_label[label]["parent"], "cycle")
            chain[label] = None
            label = by_label[label]["parent"]
        placed |= dict.fromkeys(reversed(chain))
    return placed


def _load_localization(
    tree: RolloutTree, index: dict[int, int], record: Any, where: str
) -> Localization:
    _expect(isinstance(record, dict), where, record, "must be an object")
    leaf, critical = record.get("leaf"), record.get("critical")
    score = tree.nodes[index[leaf]].score if _known(leaf, index) else None
    failed = score is not None and not score.success
    _expect(failed, f"{where}.leaf", leaf, "must be the id of a failed leaf")
    on_path = _known(critical, index) and index[critical] in tree.path(index[leaf])
    _expect(
        critical is None or on_path, f"{where}.critical", critical, f"must be on the path to {leaf}"
    )
    confirmed, interval = record.get("confirmed"), record.get("interval")
    _expect(isinstance(confirmed, bool), f"{where}.confirmed", confirmed, "must be true or false")
    _expect(
        critical is not None or not confirmed, f"{where}.confirmed", confirmed, "names no critical"
    )
    pair = isinstance(interval, list) and len(interval) == 2 and all(map(_is_int, interval))
    _expect(pair, f"{where}.interval", interval, "must be two integers")
    probes = []
    for i, probe in enumerate(_list(record, "probes", where=f"{where}.")):
        _expect(isinstance(probe, dict), f"{where}.probes[{i}]", probe, "must be an object")
        numbers = [probe.get(key) for key in ("anchor", "attempts", "successes")]
        sound = all(map(_is_int, numbers)) and numbers[0] >= 1 and 0 <= numbers[2] <= numbers[1]
        _expect(sound, f"{where}.probes[{i}]", probe, "needs anchor >= 1, attempts >= successes")
        probes.append(Probe(*numbers))
    return Localization(
        leaf=index[leaf],
        critical=None if critical is None else index[critical],
        confirmed=confirmed,
        interval=(interval[0], interval[1]),
        probes=probes,
    )


def _list(
    record: dict[str, Any], key: str, *, required: bool = False, where: str = ""
) -> list[Any]:
    value: Any = record.get(key)
    if value is None and not required:
        return []
    _expect(isinstance(value, list), f"{where}{key}", value, "must be a list")
    return list(value)


def _known(label: Any, labels: dict[int, Any]) -> bool:
    return _is_int(label) and label in labels


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _expect(ok: bool, where: str, value: Any, problem: str) -> None:
    if not ok:
        raise MalformedTreeError(f"{where}={reprlib.repr(value)}: {problem}")
