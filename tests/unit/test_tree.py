"""The tree and its dump: what is written is read back, and what breaks the format is refused."""

import asyncio
import base64
import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from fakes import FakeTask, bel, make_config, make_worker, planted, subtree
from hypothesis import given, settings
from hypothesis import strategies as st

from elpo_ray.config.algorithm import AlgorithmConfig
from elpo_ray.credit import assign
from elpo_ray.credit.hierarchical import step_rewards
from elpo_ray.dump import MalformedTreeError, dump_tree, read_line, read_tree, schema
from elpo_ray.tree import RolloutTree
from elpo_ray.types import (
    UNGRADED,
    EndReason,
    FinishReason,
    Score,
    Step,
    ToolKind,
    ToolResult,
    Turn,
)

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "docs/tree.schema.json").read_text())
FIGURE_4 = json.loads((ROOT / "tests/fixtures/figure4.jsonl").read_text())
BARE: dict[str, Any] = {
    "task_id": "t",
    "budget": 3,
    "nodes": [
        {"id": 0, "parent": None},
        {"id": 1, "parent": 0, "text": "call", "num_action_tokens": 3},
        {"id": 2, "parent": 1, "leaf": True, "reward": -1.1, "success": False, "end": "answer"},
        {"id": 5, "parent": 1, "leaf": True, "reward": 1, "success": True},
        {"id": 7, "parent": 0, "leaf": True, "reward": -1.1, "success": False},
    ],
    "localizations": [
        {
            "leaf": 2,
            "critical": 2,
            "confirmed": True,
            "interval": [2, 2],
            "probes": [{"anchor": 1, "attempts": 1, "successes": 1}],
        }
    ],
}


IMAGE = b"\x89PNG" + bytes(300_000)


def test_images_are_dumped_in_bounds_and_read_back() -> None:
    tree = RolloutTree("t", 2)
    turn = Turn((1,), (0.0,), (0.0,), FinishReason.STOP, 0)
    shown = ToolResult(ToolKind.OK, "[figure 1]", figures=(IMAGE, IMAGE))
    steps = [Step(turn, result=shown), Step(turn, result=ToolResult(ToolKind.OK, ""))]
    for _ in range(2):
        tree.add_trajectory(0, [*steps, Step(turn)], Score(1.0, True))
    record = dump_tree(tree)
    check_schema(record)
    texts = [text for node in record["nodes"] for text in node.get("figures", [])]
    assert [base64.b64decode(text) for text in texts] == [IMAGE] * 3, "at most a MiB of a tree"
    assert sum("figures" in node for node in record["nodes"]) == 2
    assert dump_tree(read_tree(record)) == record


def check_schema(record: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(record)


@st.composite
def trees(draw: st.DrawFn) -> RolloutTree:
    """Trajectories of 1-4 steps, each below the root or below an inner node of an earlier one."""
    count = draw(st.integers(1, 12))
    tree = RolloutTree("t", count)
    for _ in range(count):
        inner = [node.id for node in tree.nodes if node.children or node.parent is None]
        step = Step(Turn((1,), (0.0,), (0.0,), FinishReason.STOP, 0))
        reward = draw(st.floats(-2, 2))
        tree.add_trajectory(
            draw(st.sampled_from(inner)),
            [step] * draw(st.integers(1, 4)),
            UNGRADED if draw(st.integers(0, 9)) == 0 else Score(reward, reward > 0),
        )
        tree.nodes[-1].group = draw(st.none() | st.integers(0, 3))
    return tree


@given(trees())
def test_leaves_partition_below_every_branching(tree: RolloutTree) -> None:
    below = tree.leaves_below()
    assert below[0] == [leaf.id for leaf in tree.leaves()]
    for node in tree.nodes:
        if node.children:
            parts = sorted(leaf for child in node.children for leaf in below[child])
            assert parts == below[node.id] and node.score is None
        else:
            assert below[node.id] == [node.id] and node.score is not None
        assert {n.id for n in subtree(tree, node.id) if n.score is not None} == set(below[node.id])


@given(trees())
def test_step_reward_is_the_mean_of_the_direct_children(tree: RolloutTree) -> None:
    r = step_rewards(tree)
    for node in tree.nodes:
        if node.score is not None:
            assert r[node.id] == node.score.reward
        elif any(below.score and below.score.graded for below in subtree(tree, node.id)):
            known = [
                r[c]
                for c in node.children
                if any(below.score and below.score.graded for below in subtree(tree, c))
            ]
            mean = sum(known) / len(known)
            assert r[node.id] == pytest.approx(mean, abs=1e-12)


@settings(deadline=None)
@given(trees())
def test_dump_and_load_are_inverse(tree: RolloutTree) -> None:
    record = dump_tree(tree)
    check_schema(record)
    loaded = read_line(json.dumps(record))
    assert dump_tree(loaded) == record
    assert [n.parent for n in loaded.nodes] == [n.parent for n in tree.nodes]
    assert [n.score for n in loaded.nodes] == [n.score for n in tree.nodes]


def test_grown_tree_is_dumped_with_all_optional_fields() -> None:
    worker = make_worker(planted(3, 2), make_config(bel(8, b_max=1)))
    tree = asyncio.run(worker.grow(FakeTask().train_problem(0), 0))
    record = dump_tree(tree)
    check_schema(record)
    assert dump_tree(read_line(json.dumps(record))) == record
    assert record["localizations"] and len(record["ledger"]) == 8
    first, leaf = record["nodes"][1], record["nodes"][4]
    assert first == {
        "id": 1,
        "parent": 0,
        "text": "g~0;",
        "num_action_tokens": 4,
        "weight_version": 3,
        "entropy": 0.0,
        "tool": "move",
        "arguments": json.dumps({"move": "g"}),
        "observation": "1",
        "num_observation_tokens": 3,
        "tool_kind": "ok",
        "tool_seconds": 0.25,
        "token_ids": [103, 126, 48, 59],
        "token_entropies": [0.0] * 4,
        "token_logprobs": [-0.5] * 4,
    }
    assert record["messages"] == list(FakeTask().train_problem(0).messages)
    short = dump_tree(tree, tokens=False)["nodes"][1]
    assert short == {key: value for key, value in first.items() if not key.startswith("token_")}
    assert leaf["end"] == "answer" and leaf["leaf"] and "observation" not in leaf


def test_ids_with_gaps_in_any_order_are_kept_as_labels() -> None:
    shuffled = copy.deepcopy(BARE)
    shuffled["nodes"].reverse()
    tree = read_tree(shuffled)
    assert [node.label for node in tree.nodes] == [0, 7, 1, 5, 2]
    assert all(node.parent is None or node.parent < node.id for node in tree.nodes)
    found = tree.localizations[0]
    assert tree.nodes[found.leaf].label == 2 and found.critical == found.leaf
    assert tree.nodes[found.leaf].end is EndReason.ANSWER
    assert tree.nodes[2].extra == {"text": "call", "num_action_tokens": 3}
    dumped = dump_tree(tree)
    assert {node["id"]: node for node in dumped["nodes"]} == {
        node["id"]: node for node in BARE["nodes"]
    }
    assert dumped["localizations"] == BARE["localizations"]


def test_fixture_follows_the_schema() -> None:
    check_schema(FIGURE_4)
    assert dump_tree(read_tree(FIGURE_4)) == FIGURE_4 | {"ledger": []}


def test_the_schema_in_the_documentation_is_that_of_the_model() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    remedy = "run python -m elpo_ray.dump > docs/tree.schema.json"
    assert (ROOT / "docs/tree.schema.json").read_text() == schema(), remedy


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: t.pop("task_id"),
        lambda t: t.pop("localizations"),
        lambda t: t.update(budget=0),
        lambda t: t.update(format=2),
        lambda t: t.update(nodes=t["nodes"][:1]),
        lambda t: t["nodes"].pop(0),
        lambda t: t["nodes"][1].pop("parent"),
        lambda t: t["nodes"][1].update(id=-1),
        lambda t: t["nodes"][1].update(reward=1.0),
        lambda t: t["nodes"][3].pop("reward"),
        lambda t: t["nodes"][3].pop("success"),
        lambda t: t["nodes"][3].update(reward=1e101),
        lambda t: t["nodes"][3].update(end="tired"),
        lambda t: t["nodes"][3].update(group=None),
        lambda t: t["localizations"][0].pop("probes"),
        lambda t: t["localizations"][0].update(interval=[1]),
        lambda t: t["localizations"][0]["probes"][0].update(anchor=0),
    ],
)
def test_schema_and_reader_refuse_the_same(edit: Any) -> None:
    record = copy.deepcopy(BARE)
    check_schema(record)
    edit(record)
    with pytest.raises(jsonschema.ValidationError):
        check_schema(record)
    with pytest.raises(MalformedTreeError):
        read_tree(record)


@pytest.mark.parametrize(
    "extra", [{"text": 3}, {"tool_kind": "tired"}, {"token_ids": [0.5]}, {"tool_seconds": -1}]
)
def test_fields_that_are_only_shown_are_read_as_they_come(extra: dict[str, Any]) -> None:
    record = copy.deepcopy(BARE)
    record["nodes"][3] |= extra
    with pytest.raises(jsonschema.ValidationError):
        check_schema(record)
    assert read_tree(record).nodes[3].extra == extra


def test_deep_trees_need_no_recursion() -> None:
    nodes: list[dict[str, Any]] = [{"id": 0, "parent": None}]
    nodes += [{"id": i, "parent": i - 1} for i in range(1, 50_000)]
    nodes[-1] |= {"leaf": True, "reward": 1.0, "success": True}
    record = {"task_id": "t", "budget": 1, "nodes": nodes[::-1], "localizations": []}
    tree = read_tree(record)
    assert len(tree.path(len(nodes) - 1)) == len(nodes) - 1
    assert assign([tree], AlgorithmConfig())[0].r[0] == 1.0


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda t: t["nodes"].append(t["nodes"][1]), r"nodes\[5\]\.id=1: appears twice"),
        (lambda t: t["nodes"][1].update(parent=9), "node 1: parent=9: no such node"),
        (lambda t: t["nodes"][1].update(parent=None), "node 1: parent=None"),
        (lambda t: t["nodes"][1].update(parent="0"), "node 1: parent='0'"),
        (lambda t: t["nodes"][1].update(parent=1), "node 1: parent=1: cycle"),
        (lambda t: t["nodes"][1].update(parent=2), "parent=2: cycle|parent=1: cycle"),
        (lambda t: t["nodes"][0].update(parent=1), "node 0: parent=1"),
        (lambda t: t["nodes"].pop(0), "node 0, the prompt, is missing"),
        (lambda t: t["nodes"][1].update(id=-1), r"nodes\[1\]\.id=-1"),
        (lambda t: t["nodes"][1].update(id=True), r"nodes\[1\]\.id=True"),
        (lambda t: t["nodes"].append(3), r"nodes\[5\]=3: must be an object"),
        (lambda t: t.update(nodes=t["nodes"][:1]), "no completed trajectory"),
        (lambda t: t["nodes"][3].pop("leaf"), "node 5: leaf=None"),
        (lambda t: t["nodes"][3].pop("reward"), "node 5: reward=None"),
        (lambda t: t["nodes"][3].update(reward=float("nan")), "node 5: reward=nan"),
        (lambda t: t["nodes"][3].update(reward=float("inf")), "node 5: reward=inf"),
        (lambda t: t["nodes"][3].update(reward=10**400), "node 5: reward=1000"),
        (lambda t: t["nodes"][3].update(reward=True), "node 5: reward=True"),
        (lambda t: t["nodes"][3].pop("success"), "node 5: success=None"),
        (lambda t: t["nodes"][3].update(success=1), "node 5: success=1"),
        (lambda t: t["nodes"][3].update(end="tired"), "node 5: end='tired': use one of answer"),
        (lambda t: t["nodes"][1].update(reward=1.0), "node 1: reward=1.0: an inner node"),
        (lambda t: t["nodes"][1].update(leaf=True), "node 1: leaf=True: an inner node"),
        (lambda t: t.update(nodes={}), "nodes={}: must be a list"),
        (lambda t: t.pop("nodes"), "nodes=None"),
        (lambda t: t.pop("task_id"), "task_id=None"),
        (lambda t: t.update(budget=0), "budget=0"),
        (lambda t: t.update(format=2), "format=2"),
        (lambda t: t["localizations"][0].update(leaf=1), r"localizations\[0\]\.leaf=1"),
        (lambda t: t["localizations"][0].update(leaf=5), r"localizations\[0\]\.leaf=5"),
        (lambda t: t["localizations"][0].update(critical=7), r"critical=7: must be on the path"),
        (lambda t: t["localizations"][0].update(critical=None), "confirmed=True"),
        (lambda t: t["localizations"][0].update(confirmed=None), "confirmed=None"),
        (lambda t: t["localizations"][0].update(interval=[1]), r"interval=\[1\]"),
        (
            lambda t: t["localizations"][0].update(probes=[{"anchor": 1}]),
            r"probes\[0\]\.attempts=None",
        ),
        (lambda t: t["localizations"][0]["probes"][0].update(successes=2), r"probes\[0\]="),
        (lambda t: t.update(ledger=[{"leaf": 99}]), r"ledger\[0\]\.leaf=99"),
    ],
)
def test_malformed_tree_is_refused_by_field_and_value(edit: Any, told: str) -> None:
    record = copy.deepcopy(BARE)
    read_tree(record)
    edit(record)
    with pytest.raises(MalformedTreeError, match=told):
        read_tree(record)


@pytest.mark.parametrize("line", ["", "[", "nonsense", "[1]", "3", "[" * 100_000, "9" * 5000])
def test_line_that_is_no_tree_is_refused(line: str) -> None:
    with pytest.raises(MalformedTreeError):
        read_line(line)


def test_completed_trajectory_cannot_be_continued() -> None:
    tree = RolloutTree("t", 2)
    step = Step(Turn((1,), (0.0,), (0.0,), FinishReason.STOP, 0))
    leaf = tree.add_trajectory(0, [step], Score(1.0, True), EndReason.ANSWER)
    with pytest.raises(AssertionError, match="cannot be continued"):
        tree.add_trajectory(leaf, [step], Score(1.0, True))
    with pytest.raises(AssertionError, match="finite"):
        tree.add_trajectory(0, [step], Score(float("nan"), False))
