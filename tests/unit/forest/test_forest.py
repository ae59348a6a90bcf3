"""The forest's weights: Eq. 1 over flat sequences and over unique tokens are one objective."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from train_trees import token_columns

from elpo_ray.config.algorithm import (
    Aggregation,
    AlgorithmConfig,
    Attribution,
    ClipConfig,
    CreditConfig,
    CreditRule,
    LossConfig,
    Weighting,
)
from elpo_ray.config.learner import LearnerConfig
from elpo_ray.credit import assign
from elpo_ray.forest.trees import TrainForest, demonstrations, leaf_weights, pack
from elpo_ray.learner.loss import TokenBatch, surrogate_loss
from elpo_ray.tree import RolloutTree
from elpo_ray.types import FinishReason, Score, Step, Turn


@dataclass
class Credit:
    advantage: list[float]
    clip_low: list[float]

    @property
    def negative_advantage(self) -> list[float]:
        return [max(-a, 0.0) for a in self.advantage]

    @property
    def share(self) -> list[float]:
        return [1.0] * len(self.advantage)

    trained: None = None


def step(actions: int, observations: int = 0) -> Step:
    turn = Turn(
        tuple(range(1, actions + 1)), (-0.5,) * actions, (1.0,) * actions, FinishReason.STOP, 0
    )
    return Step(turn=turn, observation_ids=(9,) * observations)


def credit_of(tree: RolloutTree, rng: np.random.Generator) -> Credit:
    count = len(tree.nodes)
    return Credit(list(rng.normal(size=count)), list(rng.choice([0.8, 0.685], size=count)))


@st.composite
def trees(draw: st.DrawFn) -> RolloutTree:
    tree = RolloutTree("t", 16, prompt_ids=(7,) * draw(st.integers(1, 4)))
    for leaf in range(draw(st.integers(1, 5))):
        inner = [n.id for n in tree.nodes if n.score is None]
        at = draw(st.sampled_from(inner))
        sizes = draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))
        steps = [step(n, draw(st.integers(0, 3))) for n in sizes]
        tree.add_trajectory(at, steps, Score(float(leaf), leaf % 2 == 0))
    return tree


def forest_of(grown: list[RolloutTree], aggregation: Aggregation, size: int = 2) -> TrainForest:
    rng = np.random.default_rng(0)
    loss = LossConfig(aggregation=aggregation, norm_tokens=13)
    credits = [credit_of(tree, rng) for tree in grown]
    return pack(grown, credits, loss, LearnerConfig(minibatch_inputs=size))


@settings(max_examples=60, deadline=None)
@given(st.lists(trees(), min_size=1, max_size=4), st.sampled_from(Aggregation))
def test_weights_sum_to_one_over_each_minibatch(
    grown: list[RolloutTree], aggregation: Aggregation
) -> None:
    for minibatch in forest_of(grown, aggregation).minibatches:
        trained = [int(t.agent[s].sum()) for t in minibatch for s in t.sequences()]
        total = sum(tree.token_weight.sum() for tree in minibatch)
        if aggregation is Aggregation.seq_mean_token_sum_norm:
            expected = sum(trained) / (13 * max(1, sum(n > 0 for n in trained)))
        else:
            expected = float(sum(trained) > 0)
        assert total == pytest.approx(expected, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(trees(), st.sampled_from(Aggregation), st.integers(0, 2**31))
def test_unique_tokens_and_flat_sequences_have_one_objective_and_gradient(
    tree: RolloutTree, aggregation: Aggregation, seed: int
) -> None:
    train = forest_of([tree], aggregation).minibatches[0][0]
    rng = np.random.default_rng(seed)
    old = torch.tensor(rng.normal(-1, 0.3, len(train.ids)))
    noise = torch.tensor(rng.normal(0, 0.4, len(train.ids)))

    def objective(index: np.ndarray, weight: np.ndarray) -> tuple[float, torch.Tensor]:
        logp = (old + noise).requires_grad_()
        at = torch.from_numpy(index.astype(np.int64))
        node = train.token_node[index]
        columns = token_columns(
            weight=torch.from_numpy(weight),
            advantage=torch.from_numpy(train.advantage[node]),
            clip_low=torch.from_numpy(train.clip_low[node]),
            rollout_logp=old[at],
        )
        batch = TokenBatch(columns=columns, old_logp=old[at], entropy=old[at])
        loss, _ = surrogate_loss(logp[at], batch, ClipConfig(), LossConfig())
        loss.backward()
        assert logp.grad is not None
        return loss.item(), logp.grad

    unique = objective(np.flatnonzero(train.agent), train.token_weight[train.agent])
    flat = [s[train.agent[s]] for s in train.sequences()]
    weights = [np.full(len(s), w) for s, w in zip(flat, train.leaf_weight, strict=True)]
    loss, grad = objective(np.concatenate(flat), np.concatenate(weights))
    assert unique[0] == pytest.approx(loss, abs=1e-14)
    torch.testing.assert_close(unique[1], grad, rtol=1e-12, atol=1e-14)


def test_leaf_weights_by_hand() -> None:
    counts = [2, 0, 6]
    mean = leaf_weights(counts, LossConfig())
    np.testing.assert_allclose(mean, [1 / 4, 0, 1 / 12])
    token = leaf_weights(counts, LossConfig(aggregation=Aggregation.token_mean))
    np.testing.assert_allclose(token, [1 / 8, 0, 1 / 8])
    norm = leaf_weights(
        counts, LossConfig(aggregation=Aggregation.seq_mean_token_sum_norm, norm_tokens=100)
    )
    np.testing.assert_allclose(norm, [1 / 200, 0, 1 / 200])


def branching() -> RolloutTree:
    """Prompt of 2; node 1 (3 agent + 2 seen) with leaves 2 (1 agent) and 3 (2 agent)."""
    tree = RolloutTree("t", 2, prompt_ids=(5, 6))
    tree.add_trajectory(0, [step(3, 2), step(1)], Score(1.0, True))
    tree.add_trajectory(1, [step(2)], Score(-1.0, False))
    return tree


def test_arrays_of_a_branching_tree() -> None:
    train = forest_of([branching()], Aggregation.seq_mean_token_mean).minibatches[0][0]
    assert train.ids.tolist() == [5, 6, 1, 2, 3, 9, 9, 1, 1, 2]
    assert train.agent.tolist() == [False] * 2 + [True] * 3 + [False] * 2 + [True] * 3
    assert train.node_start.tolist() == [0, 2, 7, 8, 10]
    assert train.node_parent.tolist() == [-1, 0, 1, 1]
    assert train.leaves.tolist() == [2, 3]
    assert [s.tolist() for s in train.sequences()] == [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 1, 2, 3, 4, 5, 6, 8, 9],
    ]
    first, second = 1 / (2 * 4), 1 / (2 * 5)
    shared = first + second
    np.testing.assert_allclose(
        train.token_weight, [0, 0, shared, shared, shared, 0, 0, first, second, second]
    )
    assert train.rollout_logp[2] == -0.5
    assert train.rollout_logp[5] == 0


def test_minibatches_keep_order_and_the_last_may_be_short() -> None:
    forest = forest_of([branching() for _ in range(5)], Aggregation.token_mean, size=2)
    assert [len(m) for m in forest.minibatches] == [2, 2, 1]
    assert sum(len(tree.leaves) for tree in forest.trees) == 10
    assert sum(len(tree.ids) for tree in forest.trees) == 50
    assert forest.minibatches[2][0].leaf_weight[0] == pytest.approx(1 / 9)
    assert forest.minibatches[0][0].leaf_weight[0] == pytest.approx(1 / 18)


def test_demonstrations_are_token_mean_over_the_batch() -> None:
    a = ([1, 2, 3], [False, True, True])
    b = ([1, 2], [False, True])
    forest = demonstrations([a, b, b], batch_size=2)
    assert [len(m) for m in forest.minibatches] == [2, 1]
    np.testing.assert_allclose(forest.minibatches[0][0].token_weight, [0, 1 / 3, 1 / 3])
    np.testing.assert_allclose(forest.minibatches[0][1].token_weight, [0, 1 / 3])
    np.testing.assert_allclose(forest.minibatches[1][0].token_weight, [0, 1])


@pytest.mark.parametrize(
    ("conversation", "message"),
    [(([1, 2], [True, True]), "first token"), (([1, 2], [False]), "2 ids but 1")],
)
def test_bad_demonstrations(conversation: tuple[list[int], list[bool]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        demonstrations([conversation], batch_size=1)


def test_no_trees() -> None:
    with pytest.raises(ValueError, match="nothing to train on"):
        pack([], [], LossConfig(), LearnerConfig())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["advantages", "clip bounds", "rewards"])
def test_values_that_are_not_finite_are_named(where: str, bad: float) -> None:
    tree = branching()
    credit = Credit([0.0] * 4, [0.8] * 4)
    if where == "rewards":
        tree.nodes[2].score = Score(bad, True)
    else:
        getattr(credit, "advantage" if where == "advantages" else "clip_low")[3] = bad
    with pytest.raises(ValueError, match=f"tree t: its {where}"):
        pack([tree], [credit], LossConfig(), LearnerConfig())


def test_a_bare_dump_has_no_tokens() -> None:
    tree = RolloutTree("bare", 2)
    tree.add(0)
    with pytest.raises(ValueError, match="bare: node 1 has no tokens"):
        pack([tree], [Credit([0, 0], [1, 1])], LossConfig(), LearnerConfig())


@pytest.mark.parametrize(
    ("aggregation", "by_hand"),
    [
        # 6 unique agent tokens alike
        (Aggregation.token_mean, [1 / 6] * 6),
        # node 1's mean of 1/8 and 1/10, then the leaves' own; rescaled to a sum of 1
        (
            Aggregation.seq_mean_token_mean,
            np.array([0.1125] * 3 + [0.125, 0.1, 0.1]) / (3 * 0.1125 + 0.125 + 0.2),
        ),
    ],
)
def test_node_weighting_counts_each_unique_token_once(
    aggregation: Aggregation, by_hand: list[float]
) -> None:
    loss = LossConfig(aggregation=aggregation)
    config = AlgorithmConfig(credit=CreditConfig(weighting=Weighting.node), loss=loss)
    grown = [branching()]
    (tree,) = pack(grown, assign(grown, config), loss, LearnerConfig()).trees
    np.testing.assert_allclose(tree.token_weight[tree.agent], by_hand, rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.lists(trees(), min_size=1, max_size=3), st.sampled_from(Aggregation))
def test_node_weighting_keeps_the_sum_and_changes_nothing_without_sharing(
    grown: list[RolloutTree], aggregation: Aggregation
) -> None:
    loss = LossConfig(aggregation=aggregation, norm_tokens=13)
    learner = LearnerConfig(minibatch_inputs=8)
    by = [AlgorithmConfig(credit=CreditConfig(weighting=w), loss=loss) for w in Weighting]
    leaf, node = (pack(grown, assign(grown, c), loss, learner).trees for c in by)
    total = [sum(tree.token_weight.sum() for tree in packed) for packed in (leaf, node)]
    assert total[0] == pytest.approx(total[1], rel=1e-12)
    if all(len(n.children) <= 1 for tree in grown for n in tree.nodes[1:]):
        for a, b in zip(leaf, node, strict=True):
            np.testing.assert_array_equal(a.token_weight, b.token_weight)


@settings(max_examples=40, deadline=None)
@given(trees(), st.integers(0, 2**31))
def test_attribution_each_is_the_objective_of_the_leaves_as_flat_sequences(
    tree: RolloutTree, seed: int
) -> None:
    """Loss and gradient over unique tokens, against each leaf's z-score on all of its tokens."""
    loss_config = LossConfig(aggregation=Aggregation.token_mean)
    credit = CreditConfig(rule=CreditRule.group, ddof=1, attribution=Attribution.each)
    credits = assign([tree], AlgorithmConfig(credit=credit, loss=loss_config))
    train = pack([tree], credits, loss_config, LearnerConfig()).trees[0]
    rewards = np.array([leaf.score.reward for leaf in tree.leaves() if leaf.score])
    z = np.zeros(1)
    if len(rewards) > 1:
        z = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
    rng = np.random.default_rng(seed)
    old = torch.tensor(rng.normal(-1, 0.3, len(train.ids)))
    noise = torch.tensor(rng.normal(0, 0.4, len(train.ids)))

    def objective(index: np.ndarray, **values: np.ndarray) -> tuple[float, torch.Tensor]:
        logp = (old + noise).requires_grad_()
        at = torch.from_numpy(index.astype(np.int64))
        tensors = {name: torch.from_numpy(value) for name, value in values.items()}
        low = torch.full((len(index),), 0.8, dtype=torch.float64)
        columns = token_columns(clip_low=low, rollout_logp=old[at], **tensors)
        batch = TokenBatch(columns=columns, old_logp=old[at], entropy=old[at])
        loss, _ = surrogate_loss(logp[at], batch, ClipConfig(), loss_config)
        loss.backward()
        assert logp.grad is not None
        return loss.item(), logp.grad

    index = np.flatnonzero(train.agent)
    node = train.token_node[index]
    unique = objective(
        index,
        weight=train.token_weight[index],
        advantage=train.advantage[node],
        negative_advantage=train.negative_advantage[node],
    )
    flat = [s[train.agent[s]] for s in train.sequences()]
    flat_loss = objective(
        np.concatenate(flat),
        weight=np.concatenate([np.full(len(s), 1 / max(sum(map(len, flat)), 1)) for s in flat]),
        advantage=np.concatenate([np.full(len(s), a) for s, a in zip(flat, z, strict=True)]),
    )
    assert unique[0] == pytest.approx(flat_loss[0], abs=1e-12)
    torch.testing.assert_close(unique[1], flat_loss[1], rtol=1e-10, atol=1e-12)
