"""Credit: Figure 4's printed numbers, the levels' algebra, the clip region, the command."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import subtree
from hypothesis import given
from hypothesis import strategies as st

from elpo_ray.config.algorithm import (
    AlgorithmConfig,
    ClipConfig,
    CreditConfig,
    CreditRule,
    ElcScope,
    Train,
)
from elpo_ray.credit import Credit, assign
from elpo_ray.credit.__main__ import main
from elpo_ray.credit.clip import elc_region
from elpo_ray.dump import read_line, read_tree
from elpo_ray.tree import RolloutTree

FIXTURES = Path(__file__).parents[2] / "fixtures"
FIGURE_4 = FIXTURES / "figure4.jsonl"
PRINTED: list[dict[str, Any]] = json.loads((FIXTURES / "figure4_printed.json").read_text())["nodes"]
COLUMNS = ("r", "a_branch", "a_traj", "advantage")


def build(parents: list[int], leaves: dict[int, float], **more: Any) -> RolloutTree:
    """`parents[i]` is the parent of node i+1; `leaves` are rewards, above 0 for a success."""
    nodes: list[dict[str, Any]] = [{"id": 0, "parent": None}]
    nodes += [
        {"id": i, "parent": parent, "num_action_tokens": 1}
        for i, parent in enumerate(parents, start=1)
    ]
    for i, reward in leaves.items():
        nodes[i] |= {"leaf": True, "reward": reward, "success": reward > 0}
    record = {"task_id": "t", "budget": len(leaves), "nodes": nodes, "localizations": []}
    return read_tree(record | more)


def hierarchical(tree: RolloutTree, **credit: Any) -> Credit:
    return assign([tree], AlgorithmConfig(credit=CreditConfig(**credit)))[0]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> list[dict[str, Any]]:
    assert main([*argv, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_command_gives_all_116_printed_numbers_of_figure_4(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tree,) = run(capsys, str(FIGURE_4))
    nodes = {node["id"]: node for node in tree["nodes"]}
    pairs = [(round(nodes[row["id"]][key], 3), row[key]) for row in PRINTED for key in COLUMNS]
    assert len(pairs) == 116 and tree["task_id"] == "figure4"
    assert [got for got, _ in pairs] == [printed for _, printed in pairs]


def test_sample_deviation_would_not_give_figure_4() -> None:
    tree = read_line(FIGURE_4.read_text())
    credit = hierarchical(tree, ddof=1)
    assert any(round(credit.advantage[row["id"]], 3) != row["advantage"] for row in PRINTED)


def test_root_has_no_advantage() -> None:
    credit = hierarchical(read_line(FIGURE_4.read_text()))
    assert credit.a_branch[0] == credit.a_traj[0] == credit.advantage[0] == 0


rewards = st.lists(
    st.one_of(st.sampled_from([-1.1, 0.0, 1.0]), st.floats(-5, 5)), min_size=1, max_size=16
)


@given(rewards, st.lists(st.integers(1, 4), min_size=16, max_size=16), st.floats(0, 1))
def test_on_independent_rollouts_hierarchical_credit_is_group_credit(
    values: list[float], lengths: list[int], lam: float
) -> None:
    parents: list[int] = []
    leaves: dict[int, float] = {}
    for value, length in zip(values, lengths, strict=False):
        parents += [0, *range(len(parents) + 1, len(parents) + length)]
        leaves[len(parents)] = value
    tree = build(parents, leaves)
    ours = hierarchical(tree, lam=lam)
    group = hierarchical(tree, rule=CreditRule.group, ddof=0)
    np.testing.assert_allclose(ours.advantage, group.advantage, rtol=0, atol=1e-12)


def test_inheritance_replacement_and_equal_siblings() -> None:
    """0 -> 1 -> 3 -> {4, 5} with equal leaves, 0 -> 2."""
    tree = build([0, 0, 1, 3, 3], {2: 1.0, 4: -1.0, 5: -1.0})
    a = hierarchical(tree, eps=0.0).a_branch
    assert a.tolist() == [0.0, -1.0, 1.0, -1.0, 0.0, 0.0]


def test_step_reward_counts_children_and_not_leaves() -> None:
    tree = build([0, 0, 1, 1, 1], {2: 1.0, 3: 0.0, 4: 0.0, 5: 0.3})
    assert hierarchical(tree).r.tolist() == pytest.approx([0.55, 0.1, 1.0, 0.0, 0.0, 0.3])


def test_group_advantage_of_a_shared_node_is_its_leaves_mean() -> None:
    tree = build([0, 0, 1, 1], {2: 0.0, 3: 1.0, 4: 2.0})
    credit = hierarchical(tree, rule=CreditRule.group, ddof=1, eps=0.0)
    assert credit.advantage.tolist() == [0.0, 0.5, -1.0, 0.0, 1.0]
    assert not credit.a_branch.any()


TRAIN = {CreditRule.group_each: Train.own, CreditRule.contrast: Train.own}
"""The rules that say nothing of steps that leaves share."""


@pytest.mark.parametrize("value", [-1.1, 0.1, 1e17])
@pytest.mark.parametrize("rule", CreditRule)
def test_no_spread_gives_exactly_zero(value: float, rule: CreditRule) -> None:
    for count in (1, 3):
        tree = build([0] * count, dict.fromkeys(range(1, count + 1), value))
        credit = hierarchical(tree, rule=rule, ddof=1, eps=0.0, train=TRAIN.get(rule, Train.path))
        assert not credit.advantage.any()


def scopes(tree: RolloutTree) -> dict[str, list[int]]:
    regions = {scope.value: elc_region(tree, scope) for scope in ElcScope}
    return {name: [i for i, flag in enumerate(flags) if flag] for name, flags in regions.items()}


def test_clip_regions_of_figure_4() -> None:
    tree = read_line(FIGURE_4.read_text())
    first, second = tree.localizations
    regions = scopes(tree)
    below = [node.id for found in (first, second) for node in subtree(tree, found.critical or 0)]
    assert regions["none"] == []
    assert regions["critical_subtree"] == sorted(below) and len(below) == 7 + 5
    path = tree.path(second.leaf)
    assert regions["searched_only"] == sorted(tree.path(first.leaf) + path[1:])
    # all but the prompt, the recoverable first step of trajectory 5, and probes 8 and 9
    assert len(regions["first_wrong_all"]) == 32 - 1 - 1 - 1 - 2
    assert path[0] not in regions["first_wrong_all"] and path[1] in regions["first_wrong_all"]
    low = assign([tree], AlgorithmConfig())[0].clip_low
    loose = [i for i, bound in enumerate(low) if bound == pytest.approx(1 - 0.2 - 0.115)]
    assert loose == regions["critical_subtree"]
    assert {low[i] for i in range(32) if i not in loose} == {1 - 0.2}


def test_success_below_a_critical_node_is_not_clipped_looser() -> None:
    """Critical node 1 -> {2 -> {4, 5}, 3}: leaf 5 succeeds, so 3 and the shared nodes stay in."""
    found = {"leaf": 4, "critical": 1, "confirmed": True, "interval": [1, 1], "probes": []}
    tree = build([0, 1, 1, 2, 2, 0], {3: -1, 4: -1, 5: 1, 6: -1}, localizations=[found])
    assert scopes(tree) == {
        "none": [],
        "critical_subtree": [1, 2, 3, 4],
        "searched_only": [1, 2, 4],
        "posterior": [1, 2, 4],
        "first_wrong_all": [3, 4, 6],
    }
    found["confirmed"] = False
    tree = build([0, 1, 1, 2, 2, 0], {3: -1, 4: -1, 5: 1, 6: -1}, localizations=[found])
    assert scopes(tree)["critical_subtree"] == scopes(tree)["searched_only"] == []


def test_clip_bound_adds_the_elc_term() -> None:
    found = {"leaf": 1, "critical": 1, "confirmed": True, "interval": [1, 1], "probes": []}
    tree = build([0, 0], {1: -1, 2: 1}, localizations=[found])
    config = AlgorithmConfig(clip=ClipConfig(eps_low=0.25, eps_elc=0.5))
    assert assign([tree], config)[0].clip_low.tolist() == [0.75, 0.25, 0.75]


SHARED = [0, 1, 2, 2, 0]
"""0 -> {1 -> 2 -> {3, 4}, 5}"""


def clip_low_of(tree: RolloutTree, scope: ElcScope) -> np.ndarray:
    config = AlgorithmConfig(clip=ClipConfig(scope=scope))
    return assign([tree], config)[0].clip_low


def test_searched_only_loosens_no_other_leafs_terms() -> None:
    """Leaves 3 and 4 share the critical step 1; only 3 was searched."""
    found = {"leaf": 3, "critical": 1, "confirmed": True, "interval": [1, 1], "probes": []}
    tree = build(SHARED, {3: -1, 4: -1, 5: 1}, localizations=[found])
    low = clip_low_of(tree, ElcScope.searched_only)
    loose = 1 - (0.2 + 0.115)
    assert low.tolist() == [[0.8, loose, loose, loose, 0.8, 0.8], [0.8] * 6, [0.8] * 6]
    credit = assign([tree], AlgorithmConfig(clip=ClipConfig(scope=ElcScope.searched_only)))[0]
    assert credit.loosest_clip_low.tolist() == [0.8, loose, loose, loose, 0.8, 0.8]


def test_the_posterior_scope_widens_as_far_as_the_step_is_believed_lost() -> None:
    belief = {
        "prior": [0.2, 0.3, 0.5],
        "beta": [0.6, 1.0],
        "free": [],
        "trail": [[0.2, 0.3, 0.5], [0.1, 0.6, 0.3]],
    }
    probes = [{"anchor": 1, "attempts": 1, "successes": 0}]
    found = {"leaf": 3, "critical": None, "confirmed": False, "interval": [2, 3]}
    found |= {"probes": probes, "posterior": belief}
    tree = build(SHARED, {3: -1, 4: -1, 5: 1}, localizations=[found])
    low = clip_low_of(tree, ElcScope.posterior)
    np.testing.assert_allclose(low[0, 1:4], [1 - 0.2 - 0.115 * p for p in (0.1, 0.7, 1.0)])
    assert set(low[0, [0, 4, 5]]) == set(low[1:].ravel()) == {0.8}


@pytest.mark.parametrize(
    ("confirmed", "interval", "extents"),
    [(True, [2, 2], [0, 1, 1]), (False, [2, 3], [0, 0.5, 1]), (False, [1, 3], [1 / 3, 2 / 3, 1])],
)
def test_a_binary_search_has_a_posterior_too(
    confirmed: bool, interval: list[int], extents: list[float]
) -> None:
    found = {"leaf": 3, "critical": 2 if confirmed else None, "confirmed": confirmed}
    found |= {"interval": interval, "probes": []}
    tree = build(SHARED, {3: -1, 4: -1, 5: 1}, localizations=[found])
    low = clip_low_of(tree, ElcScope.posterior)
    np.testing.assert_allclose(low[0, 1:4], [1 - 0.2 - 0.115 * p for p in extents])


# --- the command ---


def test_algorithms_and_overrides_reach_the_credit(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(FIGURE_4)
    (group,) = run(capsys, path, "algorithm=grpo")
    assert all(n["a_branch"] == 0 and n["advantage"] == n["a_traj"] for n in group["nodes"])
    assert {n["clip_low"] for n in group["nodes"]} == {0.8}
    (local,) = run(capsys, path, "credit.lam=1", "algorithm.clip.scope=searched_only")
    assert all(n["advantage"] == n["a_branch"] for n in local["nodes"])
    assert sum(n["clip_low"] < 0.79 for n in local["nodes"]) == 3 + 2
    (later,) = run(capsys, path, "credit.lam=1", "credit.lam=0")
    assert all(n["advantage"] == n["a_traj"] for n in later["nodes"])


def test_command_prints_the_ids_of_the_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    record = json.loads(FIGURE_4.read_text())
    renamed = json.loads(json.dumps(record))
    for node in renamed["nodes"]:
        node["id"] *= 10
        node["parent"] = None if node["parent"] is None else node["parent"] * 10
    renamed["localizations"] = []
    renamed["nodes"].reverse()
    path = tmp_path / "trees.jsonl"
    path.write_text(f"{json.dumps(record)}\n\n{json.dumps(renamed)}\n")
    first, second = run(capsys, str(path))
    values = {n["id"] * 10: n["advantage"] for n in first["nodes"]}
    assert {n["id"]: n["advantage"] for n in second["nodes"]} == pytest.approx(values, abs=1e-12)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("credit.foo=1", ("credit.foo=1: unknown key", "keys of credit", "lam")),
        ("credit.lam=abc", ("credit.lam=abc", "could not be converted to Float")),
        ("credit.lam=2", ("credit.lam=2.0", "use a value in [0, 1]")),
        ("credit.lam=nan", ("credit.lam=nan", "use a value in [0, 1]")),
        ("credit.lam=[1", ("credit.lam=[1", "not of the form key=value")),
        ("credit=3", ("credit=3", "credit.rule=")),
        ("credit.lam=${foo}", ("credit.lam", "'foo' not found")),
        ("clip.scope=everywhere", ("clip.scope=everywhere", "searched_only")),
        ("clip.eps_elc=0.9", ("clip.eps_elc=0.9", "below 1")),
        ("algorithm=ppo", ("algorithm=ppo", "elpo, elpo_no_bel", "grpo")),
        ("credit.lam", ("credit.lam", "key=value")),
        ("--lam", ("--lam", "--help")),
    ],
)
def test_wrong_setting_is_told_in_one_line(override: str, told: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "elpo_ray.credit", str(FIGURE_4), override]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert all(words in done.stderr for words in told)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"task_id": "t"', "not JSON"),
        ('{"task_id": "t", "budget": 1}', "nodes=None: is missing"),
        (b"\xff\xfe", "not JSON"),
    ],
)
def test_malformed_line_is_told_by_number_and_nothing_is_printed(
    line: str | bytes, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trees.jsonl"
    raw = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(FIGURE_4.read_bytes() + raw)
    assert main([str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert f"{path}:2: " in err and told in err


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_file_that_cannot_be_read_is_told(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / name)]) == 2
    err = capsys.readouterr().err
    assert str(tmp_path / name) in err and err.count("\n") == 1


def test_command_needs_no_framework() -> None:
    code = (
        "import sys; from elpo_ray.credit.__main__ import main; main(sys.argv[1:]); "
        "heavy = {'ray', 'vllm', 'torch', 'hydra', 'deepspeed', 'transformers'}; "
        "sys.exit(f'imported {heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(FIGURE_4)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_help_names_the_settings() -> None:
    command = [sys.executable, "-m", "elpo_ray.credit", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "clip.scope" in done.stdout and "algorithm=elpo|grpo" in done.stdout


def test_the_table_shows_every_node_below_its_parent(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(FIGURE_4)]) == 0
    title, heads, *rows, _ = capsys.readouterr().out.split("\n")
    (tree,) = run(capsys, str(FIGURE_4))
    assert title == "figure4: 16 leaves, 2 succeeded; critical: node 1, 12"
    assert heads.split() == ["node", "r", "a_branch", "a_traj", "advantage", "clip_low"]
    by_id = {str(node["id"]): node for node in tree["nodes"]}
    shown = {row.strip("│├└ ").split()[0]: row for row in rows if row}
    assert shown.keys() == by_id.keys() - {"0"}
    assert f"{by_id['3']['advantage']:.3f}" in shown["3"] and "✗" in shown["3"]
    assert shown["3"].index("3") > shown["2"].index("2") > shown["1"].index("1")
