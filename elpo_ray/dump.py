"""Trees as lines of JSON (`docs/tree.schema.json`), the contract with every reader.

Writing keeps a loaded tree's ids and unknown fields. Loading accepts the nodes in any order and any
distinct ids >= 0, keeps the ids as labels, and refuses whatever breaks an invariant of `tree`.
"""

from __future__ import annotations

import json
import math
import reprlib
from typing import Any

from elpo_ray.tree import Localization, Node, Probe, RolloutTree
from elpo_ray.types import EndReason, Score, Step, Turn

FORMAT = 1
"""Version of the dump; a reader refuses any other."""
MAX_REWARD = 1e100
"""Largest reward in a dump, so that no variance overflows."""
CORE_FIELDS = frozenset({"id", "parent", "leaf", "reward", "success", "graded", "end", "group"})
"""Fields of a dumped node that have a place in `Node`; all others stay in `Node.extra`."""


class MalformedTreeError(ValueError):
    """A dumped tree that breaks the format; the message names the field and the value."""


def dump_tree(tree: RolloutTree, tokens: bool = True) -> dict[str, Any]:
    """The tree as JSON data (`docs/tree.schema.json`); dumps hold one tree a line. `tokens`:
    ids, entropies and log-probabilities of every sampled token too."""
    label = [node.label for node in tree.nodes]
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
        for found in tree.localizations
    ]
    entries = [
        entry if entry.get("leaf") is None else {**entry, "leaf": label[entry["leaf"]]}
        for entry in tree.ledger
    ]
    record = {
        "format": FORMAT,
        "task_id": tree.task_id,
        "budget": tree.budget,
        "nodes": [_node_record(tree, node, tokens) for node in tree.nodes],
        "localizations": localizations,
        "ledger": entries,
    }
    return record | {"messages": tree.messages} if tree.messages else record


def _node_record(tree: RolloutTree, node: Node, tokens: bool) -> dict[str, Any]:
    parent = None if node.parent is None else tree.nodes[node.parent].label
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


def read_line(line: str) -> RolloutTree:
    """The tree of one line of a dump. Raises MalformedTreeError."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MalformedTreeError(f"not JSON: {error}") from error
    return read_tree(record)


def read_tree(record: Any) -> RolloutTree:
    """The tree of `dump_tree`'s data, without steps. Raises MalformedTreeError."""
    _expect(isinstance(record, dict), "tree", record, "must be an object")
    version = record.get("format", FORMAT)
    _expect(version == FORMAT, "format", version, f"this reader knows format {FORMAT}")
    task_id, budget = record.get("task_id"), record.get("budget")
    _expect(isinstance(task_id, str), "task_id", task_id, "must be a string")
    _expect(_is_int(budget) and budget > 0, "budget", budget, "must be an integer above 0")
    messages = _list(record, "messages")
    for i, message in enumerate(messages):
        _expect(isinstance(message, dict), f"messages[{i}]", message, "must be an object")
    tree = RolloutTree(task_id, budget, messages=messages)
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
