"""Dumped trees: one model of their records, how they are written and how they are read.

A dump holds one tree a line, as JSON. The model below is the only statement of its form: reading
checks against it, and `python -m elpo_ray.dump` prints it as JSON schema, which is committed as
`docs/tree.schema.json`. What a schema cannot say, such as that every parent exists, is checked once
in `read_tree`. Ids may be any distinct integers in any order; a loaded node keeps its id as `label`
and its optional fields as they came in `extra`, and both are written back.
"""

from __future__ import annotations

import base64
import json
import math
import re
import reprlib
import sys
from typing import Annotated, Any, Generic, Literal, TypeAlias, TypeVar, cast

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from elpo_ray.tree import Localization, Node, Posterior, RolloutTree
from elpo_ray.types import EndReason, Score, Step, ToolKind

FORMAT = 1
"""The version of the dump; a reader refuses any other."""
MAX_REWARD = 1e100
"""No reward in a dump has a larger absolute value, so that no variance overflows."""
MAX_FIGURE_BYTES = 1 << 20
"""Images of one tree that its dump holds; those that come later in it are left out."""

T = TypeVar("T")
NodeT = TypeVar("NodeT")
EntryT = TypeVar("EntryT")
Maybe: TypeAlias = T | UnsetType
Count = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(ge=0)]
Reward = Annotated[float, Meta(ge=-MAX_REWARD, le=MAX_REWARD)]


def says(text: str) -> Meta:
    """Return the description of a field in the schema."""
    return Meta(description=text)


class NodeRecord(Struct, gc=False):
    """The fields of a node that the reader needs and checks; all others stay in `Node.extra`."""

    id: Count
    parent: Annotated[int | None, says("null exactly for node 0.")]
    leaf: Annotated[Maybe[bool], says("true exactly for nodes without children.")] = UNSET
    reward: Annotated[Maybe[Reward], says("Terminal reward R of a leaf.")] = UNSET
    success: Annotated[Maybe[bool], says("Success ok of a leaf; what the search reads.")] = UNSET
    graded: Annotated[Maybe[bool], says("false: no verdict on a leaf; true if absent.")] = UNSET
    reward_error: Annotated[
        Maybe[str], says("Why the user's own reward gave no verdict on a leaf.")
    ] = UNSET
    end: Annotated[Maybe[EndReason], says("Why a leaf's trajectory ended.")] = UNSET
    group: Annotated[Maybe[int], says("Tree of a leaf, where an input has several.")] = UNSET


class StepRecord(NodeRecord):
    """Node 0 is the prompt; every other node is one step of its parent's continuation."""

    text: Annotated[Maybe[str], says("The assistant turn.")] = UNSET
    observation: Annotated[Maybe[str], says("The response as the policy saw it.")] = UNSET
    num_action_tokens: Maybe[Count] = UNSET
    num_observation_tokens: Maybe[Count] = UNSET
    token_ids: Annotated[Maybe[list[int]], says("As sampled; texts: RUN/tokenizer.json.")] = UNSET
    token_entropies: Annotated[Maybe[list[float]], says("Beside token_ids, in nats.")] = UNSET
    token_logprobs: Annotated[Maybe[list[float]], says("Beside token_ids, in nats.")] = UNSET
    entropy: Annotated[Maybe[float], says("Mean over the turn's tokens, in nats.")] = UNSET
    tool: Annotated[Maybe[str], says("The called tool; absent on a malformed call.")] = UNSET
    arguments: Annotated[Maybe[str], says("Those of the call, as JSON text.")] = UNSET
    tool_kind: Maybe[ToolKind] = UNSET
    tool_seconds: Annotated[Maybe[Seconds], says("Seconds of execution.")] = UNSET
    restored_by: Annotated[
        Maybe[Literal["fresh", "fork", "replay"]],
        says("How the tool's state came about: own calls, a forked snapshot, a replayed prefix."),
    ] = UNSET
    figures: Annotated[
        Maybe[list[str]],
        says("Images that the call showed: PNG in base64, at most 1 MiB of a tree."),
    ] = UNSET
    weight_version: Annotated[Maybe[int], says("Weights that produced the turn.")] = UNSET


class EntryRecord(Struct):
    """One spend, or one attempt lost to the infrastructure (leaf null, not charged)."""

    kind: Literal["root", "probe"]
    anchor: int | None
    leaf: int | None
    charged: bool
    tokens: Annotated[Count, says("Generated tokens.")]
    tool_seconds: Seconds


# Rules over several fields, in the schema's own words; `_load_nodes` checks them for the reader.
LEAVES_HAVE_SCORES = {
    "if": {"properties": {"leaf": {"const": True}}, "required": ["leaf"]},
    "then": {"required": ["reward", "success"]},
    "else": {"not": {"anyOf": [{"required": ["reward"]}, {"required": ["success"]}]}},
}
HAS_A_ROOT = {"minItems": 2, "contains": {"properties": {"id": {"const": 0}}}}


class TreeRecord(Struct, Generic[NodeT, EntryT]):
    """One tree. The schema states the types of all fields (`StepRecord`, `EntryRecord`). The reader
    takes a node's optional fields and ledger entries as they come; code that uses one checks it."""

    task_id: str
    budget: Annotated[int, Meta(ge=1), says("N_total, in completed trajectories.")]
    nodes: Annotated[
        list[Annotated[NodeT, Meta(extra_json_schema=LEAVES_HAVE_SCORES)]],
        Meta(description="Any order, any distinct ids.", extra_json_schema=HAS_A_ROOT),
    ]
    localizations: list[Localization]
    ledger: Maybe[list[EntryT]] = UNSET
    messages: Annotated[Maybe[list[dict[str, Any]]], says("The prompt as chat messages.")] = UNSET
    format: Annotated[Maybe[Literal[1]], says("Version of this form; 1 if absent.")] = UNSET


class Document(TreeRecord[StepRecord, EntryRecord]):
    """One line of runs/NAME/trees/step_NNNNN.jsonl: all completed trajectories of one input."""


CORE_FIELDS = frozenset(NodeRecord.__struct_fields__)
LEAF_FIELDS = tuple(name for name in NodeRecord.__struct_fields__ if name not in ("id", "parent"))
WORDS = {
    "object": "an object",
    "array": "a list",
    "str": "a string",
    "bool": "true or false",
    "int": "an integer",
    "float": "a number",
    "int | null": "an integer or null",
}
"""What msgspec's names of types are called in messages."""


class MalformedTreeError(ValueError):
    """A dumped tree that breaks the format; the message names the field and the value."""


def schema() -> str:
    """Return the model as JSON schema, which is the text of `docs/tree.schema.json`."""
    _, parts = msgspec.json.schema_components([Document], ref_template="#/$defs/{name}")
    root = parts.pop(Document.__name__)
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    record = dialect | root | {"title": "elpo_ray rollout tree", "$defs": parts}
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


def dump_tree(tree: RolloutTree, tokens: bool = True) -> dict[str, Any]:
    """Return the tree as JSON data of the form `Document`. `tokens` adds the ids, entropies and
    log-probabilities of every sampled token."""
    label = [node.label for node in tree.nodes]
    localizations = [
        {
            "leaf": label[found.leaf],
            "critical": None if found.critical is None else label[found.critical],
            "confirmed": found.confirmed,
            "interval": list(found.interval),
            "probes": msgspec.to_builtins(found.probes),
            **({"posterior": msgspec.to_builtins(found.posterior)} if found.posterior else {}),
        }
        for found in tree.localizations
    ]
    entries = [
        entry if entry.get("leaf") is None else {**entry, "leaf": label[entry["leaf"]]}
        for entry in tree.ledger
    ]
    figures = _figures(tree)
    record = {
        "format": FORMAT,
        "task_id": tree.task_id,
        "budget": tree.budget,
        "nodes": [
            {**_node_record(tree, node, tokens), **figures.get(node.id, {})} for node in tree.nodes
        ],
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
        if node.score.error:
            record["reward_error"] = node.score.error
    if node.end is not None:
        record["end"] = node.end.value
    if node.group is not None:
        record["group"] = node.group
    if node.step is not None:
        record |= _step_record(node.step)
        if tokens:
            turn = node.step.turn
            record["token_ids"] = list(turn.token_ids)
            record["token_entropies"] = [round(value, 4) for value in turn.entropies]
            record["token_logprobs"] = [round(value, 4) for value in turn.logprobs]
    return record | node.extra


def read_line(line: str) -> RolloutTree:
    """Return the tree of one line of a dump. Raises MalformedTreeError."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MalformedTreeError(f"not JSON: {error}") from error
    return read_tree(record)


def read_tree(record: Any) -> RolloutTree:
    """Return the tree of `dump_tree`'s data, without steps. Raises MalformedTreeError."""
    if isinstance(record, dict):
        version = record.get("format", FORMAT)
        _expect(version == FORMAT, "format", version, f"this reader knows format {FORMAT}")
    try:
        found = msgspec.convert(record, TreeRecord[NodeRecord, dict[str, Any]])
    except msgspec.ValidationError as error:
        raise _refusal(str(error), record) from error
    except UnicodeEncodeError as error:
        raise _malformed("tree", error.object, "must be text that UTF-8 can hold") from error
    tree = RolloutTree(found.task_id, found.budget, messages=found.messages or ())
    index = _load_nodes(tree, found.nodes, record["nodes"])
    for i, search in enumerate(found.localizations):
        _check_localization(tree, index, search, f"localizations[{i}]")
        search.leaf = index[search.leaf]
        search.critical = None if search.critical is None else index[search.critical]
    tree.localizations = found.localizations
    for i, entry in enumerate(found.ledger or ()):
        leaf = entry.get("leaf")
        known = leaf is None or (_is_int(leaf) and leaf in index)
        _expect(known, f"ledger[{i}].leaf", leaf, "no such node")
        tree.ledger.append(entry if leaf is None else {**entry, "leaf": index[leaf]})
    return tree


def _figures(tree: RolloutTree) -> dict[int, dict[str, list[str]]]:
    """Return the field with a node's images, for each node that has some, in bounds."""
    found, room = dict[int, dict[str, list[str]]](), MAX_FIGURE_BYTES
    for node in tree.nodes:
        result = node.step.result if node.step is not None else None
        kept = []
        for image in result.figures if result is not None else ():
            room -= len(image)
            if room >= 0:
                kept.append(base64.b64encode(image).decode())
        if kept:
            found[node.id] = {"figures": kept}
    return found


def _step_record(step: Step) -> dict[str, Any]:
    """Return the optional fields of a grown node, but its tokens."""
    turn, result = step.turn, step.result
    record: dict[str, Any] = {
        "text": step.action_text,
        "num_action_tokens": len(turn.token_ids),
        "weight_version": turn.weight_version,
    }
    if turn.entropies:
        record["entropy"] = math.fsum(turn.entropies) / len(turn.entropies)
    if step.call is not None:
        record |= {"tool": step.call.name, "arguments": json.dumps(step.call.arguments)}
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


def _load_nodes(
    tree: RolloutTree, records: list[NodeRecord], raw: list[dict[str, Any]]
) -> dict[int, int]:
    """Fill an empty `tree` and return the place in `tree.nodes` of every label."""
    by_label: dict[int, NodeRecord] = {}
    for i, record in enumerate(records):
        _expect(record.id not in by_label, f"nodes[{i}].id", record.id, "appears twice")
        by_label[record.id] = record
    _expect(0 in by_label, "nodes", sorted(by_label), "node 0, the prompt, is missing")
    _expect(len(by_label) > 1, "nodes", raw, "no completed trajectory")
    parent_of: dict[int, int] = {}
    for label, record in by_label.items():
        where, parent = f"node {label}: parent", record.parent
        if label == 0:
            _expect(parent is None, where, parent, "node 0 is the root; its parent must be null")
        else:
            _expect(parent in by_label, where, parent, "no such node")
            parent_of[label] = cast(int, parent)
    index = {0: 0}
    for label in _parents_first(parent_of):
        node = tree.add(index[parent_of[label]])
        node.label, index[label] = label, node.id
    for record, fields in zip(records, raw, strict=True):
        node = tree.nodes[index[record.id]]
        node.extra = {key: value for key, value in fields.items() if key not in CORE_FIELDS}
        if node.children:
            for key in LEAF_FIELDS:
                value = getattr(record, key)
                allowed = value is UNSET or (key == "leaf" and value is False)
                _expect(allowed, f"node {record.id}: {key}", value, "an inner node has none")
        else:
            node.score = _score(record, f"node {record.id}")
            node.end, node.group = _given(record.end), _given(record.group)
    return index


def _score(record: NodeRecord, where: str) -> Score:
    leaf, reward, success = map(_given, (record.leaf, record.reward, record.success))
    _expect(leaf is True, f"{where}: leaf", leaf, "a node without children must be a leaf: true")
    _expect(reward is not None, f"{where}: reward", reward, "a leaf needs a number")
    _expect(success is not None, f"{where}: success", success, "a leaf needs true or false")
    graded = record.graded is not False
    _expect(graded or not success, f"{where}: graded", graded, "false on a leaf with success")
    return Score(reward, success, graded, _given(record.reward_error) or "")


def _given(value: Any) -> Any:
    return None if value is UNSET else value


def _parents_first(parent_of: dict[int, int]) -> dict[int, None]:
    """Return the labels in file order, every ancestor moved ahead of its descendants, without the
    root."""
    placed: dict[int, None] = {0: None}
    for start in parent_of:
        chain: dict[int, None] = {}
        label = start
        while label not in placed:
            _expect(label not in chain, f"node {label}: parent", parent_of[label], "cycle")
            chain[label] = None
            label = parent_of[label]
        placed |= dict.fromkeys(reversed(chain))
    del placed[0]
    return placed


def _check_localization(
    tree: RolloutTree, index: dict[int, int], found: Localization, where: str
) -> None:
    """Check what the model cannot say of a search, whose ids are still labels."""
    leaf, critical = found.leaf, found.critical
    score = tree.nodes[index[leaf]].score if leaf in index else None
    failed = score is not None and not score.success
    _expect(failed, f"{where}.leaf", leaf, "must be the id of a failed leaf")
    on_path = critical is None or index.get(critical) in tree.path(index[leaf])
    _expect(on_path, f"{where}.critical", critical, f"must be on the path to {leaf}")
    sound = critical is not None or not found.confirmed
    _expect(sound, f"{where}.confirmed", found.confirmed, "names no critical")
    free = found.posterior.free if found.posterior else []
    for name, probes in (("probes", found.probes), ("posterior.free", free)):
        for i, probe in enumerate(probes):
            sound = probe.successes <= probe.attempts
            _expect(sound, f"{where}.{name}[{i}]", probe, "needs attempts >= successes")
    if found.posterior is not None:
        _check_posterior(found.posterior, found, len(tree.path(index[leaf])), f"{where}.posterior")


def _check_posterior(belief: Posterior, found: Localization, steps: int, where: str) -> None:
    """Check that each list of a search's posterior has one probability a step."""
    for name, row in [
        ("prior", belief.prior),
        *((f"trail[{i}]", r) for i, r in enumerate(belief.trail)),
    ]:
        _expect(len(row) == steps, f"{where}.{name}", row, f"needs one number a step, {steps}")
        total = math.fsum(row)
        _expect(abs(total - 1) < 1e-6, f"{where}.{name}", row, "must add up to 1")
    rows = len(found.probes) + 1
    _expect(len(belief.trail) == rows, f"{where}.trail", belief.trail, f"needs {rows} rows")
    _expect(min(belief.beta) > 0, f"{where}.beta", belief.beta, "needs numbers above 0")


def _refusal(message: str, record: Any) -> MalformedTreeError:
    """Return msgspec's `message` about `record` in the form that `_expect` gives."""
    problem, _, path = message.removesuffix("`").partition(" - at `$")
    value = record
    for name, place in re.findall(r"\.(\w+)|\[(\d+)\]", path):
        value = value[name] if name else value[int(place)]
    if missing := re.fullmatch(r"Object missing required field `(\w+)`?", problem):
        path, value, problem = f"{path}.{missing[1]}", None, "is missing"
    elif expected := re.match(r"Expected `([^`]+)`?((?: of length| [<>]).*?)?(?:, got|$)", problem):
        problem = f"must be {WORDS.get(expected[1], expected[1])}{expected[2] or ''}"
    elif problem.startswith("Invalid enum value"):
        problem = f"use one of {', '.join(EndReason)}"
    node = re.fullmatch(r"\.nodes\[(\d+)\]\.(?!id$)(\w+)", path)
    if node and _is_int(label := record["nodes"][int(node[1])].get("id")):
        path = f"node {label}: {node[2]}"
    return _malformed(path.removeprefix(".") or "tree", value, problem)


def _malformed(where: str, value: Any, problem: str) -> MalformedTreeError:
    return MalformedTreeError(f"{where}={reprlib.repr(value)}: {problem}")


def _expect(ok: bool, where: str, value: Any, problem: str) -> None:
    if not ok:
        raise _malformed(where, _given(value), problem)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


if __name__ == "__main__":
    sys.stdout.write(schema())
