"""The credit rules of the baselines against their formulas, computed here with numpy."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elpo_ray.config.algorithm import (
    AfterIrrecoverable,
    Aggregation,
    AlgorithmConfig,
    Attribution,
    ClipConfig,
    CreditConfig,
    CreditRule,
    ElcScope,
    LossConfig,
    StepGroupConfig,
    Train,
    Weighting,
)
from elpo_ray.config.learner import LearnerConfig
from elpo_ray.credit import Credit, assign
from elpo_ray.credit.__main__ import compose, main
from elpo_ray.dump import dump_tree
from elpo_ray.forest.items import CostModel
from elpo_ray.forest.planning import PlanRules, plan
from elpo_ray.forest.trees import TrainTree, pack
from elpo_ray.tree import RolloutTree
from elpo_ray.types import UNGRADED, FinishReason, Score, Step, ToolKind, ToolResult, Turn

TOKEN_MEAN = LossConfig(aggregation=Aggregation.token_mean)


def step(tokens: int = 1, seen: str | None = None) -> Step:
    turn = Turn((1,) * tokens, (0.0,) * tokens, (0.0,) * tokens, FinishReason.STOP, 0)
    if seen is None:
        return Step(turn)
    return Step(turn, observation_text=seen, result=ToolResult(ToolKind.OK, seen))


def star(leaves: list[tuple[float, int]], task_id: str = "t") -> RolloutTree:
    """Independent one-step trajectories of (reward, agent tokens)."""
    tree = RolloutTree(task_id, len(leaves))
    for reward, tokens in leaves:
        tree.add_trajectory(0, [step(tokens)], Score(reward, reward > 0))
    return tree


def credit_of(tree: RolloutTree, **settings: object) -> Credit:
    config = AlgorithmConfig(credit=CreditConfig(**settings), loss=TOKEN_MEAN)  # type: ignore[arg-type]
    return assign([tree], config)[0]


def z(values: object, ddof: int = 1, eps: float = 1e-6) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    return (array - array.mean()) / (array.std(ddof=ddof) + eps)


# --- Reinforce++ ---

BATCH = [[(1.0, 3), (-1.0, 5), (-1.0, 1)], [(0.5, 4), (1.0, 2)], [(-1.0, 7), (-1.0, 2)]]


@pytest.mark.parametrize("baseline", [False, True])
def test_whitening_is_over_every_token_of_the_whole_batch(baseline: bool) -> None:
    """Token by token, as verl does: repeat each return over its tokens and whiten the lot."""
    config = CreditConfig(rule=CreditRule.whitened, baseline=baseline, eps=1e-8, ddof=1)
    found = assign([star(leaves) for leaves in BATCH], AlgorithmConfig(credit=config))
    tokens = []
    for leaves in BATCH:
        group_mean = np.mean([reward for reward, _ in leaves]) if baseline else 0.0
        tokens += [np.full(count, reward - group_mean) for reward, count in leaves]
    flat = np.concatenate(tokens)
    whitened = (flat - flat.mean()) / np.sqrt(flat.var(ddof=1) + 1e-8)
    starts = np.cumsum([0, *(len(part) for part in tokens)])[:-1]
    got = np.concatenate([credit.advantage[1:] for credit in found])
    np.testing.assert_allclose(got, whitened[starts], rtol=1e-12)


def test_turns_before_the_last_tool_response_keep_the_return() -> None:
    tree = RolloutTree("t", 2)
    tree.add_trajectory(0, [step(2, "a"), step(3, "b"), step(1)], Score(1.0, True))
    tree.add_trajectory(0, [step(6)], Score(-1.0, False))
    advantage = credit_of(tree, rule=CreditRule.whitened, ddof=1, eps=0.0).advantage
    # 6 tokens of +1 and 6 of -1: mean 0, sample variance 12/11
    assert advantage[1:].tolist() == pytest.approx([(11 / 12) ** 0.5] * 3 + [-((11 / 12) ** 0.5)])


# --- GRPO, attribution ---


def test_group_is_the_sample_z_score() -> None:
    rewards = [1.0, -1.0, -1.0, 0.25]
    credit = credit_of(star([(r, 1) for r in rewards]), rule=CreditRule.group, ddof=1)
    np.testing.assert_allclose(credit.advantage[1:], z(rewards), rtol=1e-12)
    plain = credit_of(star([(r, 1) for r in rewards]), rule=CreditRule.group, divide_by_std=False)
    np.testing.assert_allclose(plain.advantage[1:], np.array(rewards) - np.mean(rewards))


def shared() -> RolloutTree:
    """0 -> 1 -> {2, 3, 4} with rewards 1, -1, -1; 0 -> 5 with reward -1."""
    tree = RolloutTree("t", 4)
    tree.add_trajectory(0, [step(2, "a"), step(1)], Score(1.0, True))
    for _ in range(2):
        tree.add_trajectory(1, [step(1)], Score(-1.0, False))
    tree.add_trajectory(0, [step(1)], Score(-1.0, False))
    return tree


def test_each_leaf_keeps_its_own_sign_on_shared_tokens() -> None:
    a = z([1, -1, -1, -1])
    hard = credit_of(shared(), rule=CreditRule.group, ddof=1)
    soft = credit_of(shared(), rule=CreditRule.group, ddof=1, attribution=Attribution.each)
    np.testing.assert_allclose(hard.advantage, [0, a[:3].mean(), a[0], a[1], a[1], a[1]])
    np.testing.assert_allclose(soft.advantage, hard.advantage, atol=1e-15)
    np.testing.assert_allclose(hard.negative_advantage, np.maximum(-hard.advantage, 0))
    assert soft.negative_advantage[1] == pytest.approx(-2 * a[1] / 3)
    np.testing.assert_allclose(soft.negative_advantage[2:], hard.negative_advantage[2:])


def test_attribution_each_needs_leaves_of_equal_weight() -> None:
    with pytest.raises(ValueError, match=r"algorithm\.credit\.attribution='each'.*token_mean"):
        AlgorithmConfig(credit=CreditConfig(attribution=Attribution.each))


# --- Tree-GRPO ---


def test_tree_group_adds_the_z_scores_of_input_and_tree() -> None:
    rewards, groups = [1.0, -1.0, 1.0, -1.0, -1.0, -1.0, 0.5], [0, 0, 0, 1, 1, 2, None]
    tree = star([(r, 1) for r in rewards])
    for leaf, group in zip(tree.leaves(), groups, strict=True):
        leaf.group = group
    expected = z(rewards)
    expected[:3] += z(rewards[:3])  # tree 1 has no spread, trees 2 and None one leaf each: 0
    credit = credit_of(tree, rule=CreditRule.tree_group, ddof=1)
    np.testing.assert_allclose(credit.advantage[1:], expected, rtol=1e-12)


# --- GiGPO ---


def test_step_groups_compare_steps_from_equal_tool_responses() -> None:
    tree = RolloutTree("t", 3)
    tree.add_trajectory(0, [step(1, "3  4\n"), step(1, "x"), step()], Score(1.0, True))
    tree.add_trajectory(0, [step(1, "3 4"), step()], Score(-1.0, False))
    tree.add_trajectory(0, [step()], Score(-1.0, False))
    gamma, omega = 0.5, 2.0
    credit = credit_of(
        tree,
        rule=CreditRule.step_group,
        ddof=1,
        step=StepGroupConfig(omega=omega, gamma=gamma),
    )
    episode = z([1, -1, -1])
    first = z([gamma**2, -gamma, -1.0])
    second = z([gamma, -1.0])  # both after "3 4", blanks aside
    expected = [
        episode[0] + omega * first[0],
        episode[0] + omega * second[0],
        episode[0],  # alone after "x"
        episode[1] + omega * first[1],
        episode[1] + omega * second[1],
        episode[2] + omega * first[2],
    ]
    np.testing.assert_allclose(credit.advantage[1:], expected, rtol=1e-12)
    np.testing.assert_allclose(credit.a_branch[1:3], [first[0], second[0]])


# --- a leaf without a verdict ---


OWN = (CreditRule.group_each, CreditRule.contrast)
"""Rules that say nothing of steps that leaves share."""


def choices(rule: CreditRule) -> list[tuple[Attribution, Weighting]]:
    everything = list(product(Attribution, Weighting))
    return [(Attribution.mean, Weighting.leaf)] if rule in OWN else everything


def train_of(rule: CreditRule) -> Train:
    return Train.own if rule in OWN else Train.path


@pytest.mark.parametrize(
    ("rule", "attribution"),
    list(dict.fromkeys((rule, each) for rule in CreditRule for each, _ in choices(rule))),
)
def test_a_leaf_without_a_verdict_counts_nowhere(
    rule: CreditRule, attribution: Attribution
) -> None:
    graded = [(1.0, 1), (-1.0, 2), (-1.0, 3)]
    tree = star(graded)
    tree.add_trajectory(0, [step(9, "?"), step(9)], UNGRADED)
    settings = {"rule": rule, "ddof": 1, "attribution": attribution, "train": train_of(rule)}
    with_it = credit_of(tree, **settings)
    without = credit_of(star(graded), **settings)
    np.testing.assert_allclose(with_it.advantage[:4], without.advantage)
    assert not with_it.advantage[4:].any() and not with_it.negative_advantage[4:].any()
    assert with_it.r[0] == without.r[0]


@pytest.mark.parametrize(
    ("rule", "attribution", "weighting"),
    [(rule, *choice) for rule in CreditRule for choice in choices(rule)],
)
def test_a_sibling_without_a_verdict_moves_no_shared_node(
    rule: CreditRule, attribution: Attribution, weighting: Weighting
) -> None:
    """0 -> 1 -> {2 fails, 3 succeeds, 4 ungraded}, 0 -> 5: the learner gets the same tree with and
    without node 4."""

    def packed(ungraded: bool) -> TrainTree:
        tree = RolloutTree("t", 3, prompt_ids=(1,))
        tree.add_trajectory(0, [step(2, "a"), step(1)], Score(-1.0, False))
        tree.add_trajectory(1, [step(3)], Score(1.0, True))
        tree.add_trajectory(0, [step(4)], Score(-1.0, False))
        if ungraded:
            tree.add_trajectory(1, [step(9)], UNGRADED)
        credit = CreditConfig(
            rule=rule, attribution=attribution, weighting=weighting, ddof=1, train=train_of(rule)
        )
        clip = ClipConfig(scope=ElcScope.searched_only)
        config = AlgorithmConfig(credit=credit, loss=TOKEN_MEAN, clip=clip)
        [train] = pack([tree], assign([tree], config), TOKEN_MEAN, LearnerConfig()).trees
        return train

    without, with_it = packed(False), packed(True)
    count = len(without.ids)
    np.testing.assert_array_equal(with_it.leaves, without.leaves)
    np.testing.assert_allclose(with_it.leaf_weight, without.leaf_weight, rtol=1e-12)
    np.testing.assert_allclose(with_it.token_weight[:count], without.token_weight, rtol=1e-12)
    assert not with_it.token_weight[count:].any()
    for name in ("advantage", "negative_advantage", "share"):
        mine, other = (getattr(tree, name)[:5] for tree in (with_it, without))
        np.testing.assert_allclose(mine, other, err_msg=name)
    assert with_it.clip_low.shape == (3, 6)


def test_a_tree_without_any_verdict_trains_nothing() -> None:
    tree = RolloutTree("t", 2, prompt_ids=(1,))
    for _ in range(2):
        tree.add_trajectory(0, [step(2)], UNGRADED)
    config = AlgorithmConfig()
    [train] = pack([tree], assign([tree], config), config.loss, LearnerConfig()).trees
    assert not len(train.leaves) and not train.token_weight.any()
    rules = PlanRules(max_tokens=99, world_size=1, cost=CostModel(1, 1, 1), share_gain=0.0)
    assert plan([train], rules).empty


# --- beyond the paper ---


def test_after_irrecoverable_leaves_the_blame_on_the_critical_step() -> None:
    """0 -> 1 -> {2 ok, 3 -> {4, 5}}: step 3 loses the last way out."""
    tree = RolloutTree("t", 3)
    tree.add_trajectory(0, [step(1, "a"), step()], Score(1.0, True))
    tree.add_trajectory(1, [step(1, "b"), step()], Score(-1.0, False))
    tree.add_trajectory(3, [step()], Score(-0.5, False))
    paper = credit_of(tree)
    neutral = credit_of(tree, after_irrecoverable=AfterIrrecoverable.neutral)
    assert paper.advantage[3:].all()
    np.testing.assert_array_equal(neutral.advantage[:4], paper.advantage[:4])
    np.testing.assert_array_equal(neutral.advantage[4:], [0, 0])
    np.testing.assert_array_equal(neutral.negative_advantage[4:], [0, 0])
    np.testing.assert_array_equal(neutral.a_branch, paper.a_branch)


@given(st.lists(st.sampled_from([1.0, -1.0]), min_size=2, max_size=8))
def test_neutral_changes_nothing_on_one_step_trajectories_with_a_success(
    rewards: list[float],
) -> None:
    tree = star([(r, 1) for r in rewards])
    neutral = credit_of(tree, after_irrecoverable=AfterIrrecoverable.neutral).advantage
    np.testing.assert_array_equal(neutral, credit_of(tree).advantage)


def test_node_weighting_divides_by_the_leaves_below() -> None:
    credit = credit_of(shared(), weighting=Weighting.node)
    np.testing.assert_array_equal(credit.share, [1, 1 / 3, 1, 1, 1, 1])
    assert (credit_of(shared()).share == 1).all()


# --- the command ---


def test_a_dump_is_one_batch_for_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trees = [star(leaves, f"t{i}") for i, leaves in enumerate(BATCH)]
    path = tmp_path / "trees.jsonl"
    path.write_text("".join(json.dumps(dump_tree(tree)) + "\n" for tree in trees))
    for name in ("reinforce_pp", "reinforce_pp_baseline", "gigpo", "tree_grpo", "aepo"):
        assert main([str(path), "--json", f"algorithm={name}"]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        expected = assign(trees, compose([f"algorithm={name}"]))
        for line, credit in zip(lines, expected, strict=True):
            assert [node["advantage"] for node in line["nodes"]] == credit.advantage.tolist()


@pytest.mark.parametrize(
    ("rule", "key"), [("whitened", "num_action_tokens"), ("step_group", "obs")]
)
def test_a_bare_dump_that_says_too_little_is_told(
    rule: str, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = [{"id": 0, "parent": None}, {"id": 1, "parent": 0}]
    nodes.append({"id": 2, "parent": 1, "leaf": True, "reward": 1.0, "success": True})
    record = {"task_id": "bare", "budget": 1, "nodes": nodes, "localizations": []}
    path = tmp_path / "trees.jsonl"
    path.write_text(json.dumps(record))
    assert main([str(path), f"credit.rule={rule}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "tree bare, node 1" in err and key in err
