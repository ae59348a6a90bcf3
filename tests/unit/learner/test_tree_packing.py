"""Shared prefixes change nothing: trees against flat sequences, in float64 through a real model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from train_trees import train_tree
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from elpo_ray.config.algorithm import Aggregation, ClipConfig, LossConfig
from elpo_ray.config.learner import AttentionBackend
from elpo_ray.forest.items import CostModel, Item
from elpo_ray.forest.layout import lay_out
from elpo_ray.forest.planning import PlanRules, plan
from elpo_ray.forest.trees import TrainTree, leaf_weights
from elpo_ray.learner.attention import IMPLEMENTATION
from elpo_ray.learner.batching import BatchLayout, Pack, collate
from elpo_ray.learner.loss import TokenBatch, surrogate_loss
from elpo_ray.learner.policy import PolicyModule

VOCAB = 50
CPU = torch.device("cpu")
COST = CostModel(token=100.0, pair=1.0, scored=10.0)
TREE = BatchLayout(CPU, AttentionBackend.blocks, torch.float64)
ROWS = BatchLayout(CPU, None, torch.float64)
RULES = PlanRules(max_tokens=10_000, world_size=1, cost=COST, share_gain=0.0)

PARENTS = [[-1, 0, 0, 1, 1, 1, 2, 3, 3, 7], [-1, 0, 0, 1, 1, 2, 2], [-1, 0]]
SIZES = [[20, 13, 9, 7, 3, 11, 6, 4, 15, 8], [9, 13, 19, 7, 3, 31, 6], [5, 12]]


def build(which: int, *, by_leaf: bool = False) -> TrainTree:
    rng = np.random.default_rng(which)
    return train_tree(rng, PARENTS[which], SIZES[which], vocab=VOCAB, by_leaf=by_leaf)


def weighted(trees: list[TrainTree], aggregation: Aggregation) -> list[TrainTree]:
    counts = [int(t.agent[s].sum()) for t in trees for s in t.sequences()]
    weights = leaf_weights(counts, LossConfig(aggregation=aggregation, norm_tokens=37))
    parts = np.split(weights, np.cumsum([len(tree.leaves) for tree in trees])[:-1])
    return [replace(t, leaf_weight=w) for t, w in zip(trees, parts, strict=True)]


@pytest.fixture(scope="module")
def model() -> Iterator[Qwen2ForCausalLM]:
    def forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        """As is, but without the detour over fp32."""
        variance = hidden.pow(2).mean(-1, keepdim=True)
        return self.weight * hidden * torch.rsqrt(variance + self.variance_epsilon)

    patch = pytest.MonkeyPatch()
    patch.setattr(Qwen2RMSNorm, "forward", forward)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    yield Qwen2ForCausalLM(config).double().train()
    patch.undo()


Logps = dict[tuple[int, int], list[float]]
"""Log-probabilities by number of the tree and place of the token in it."""


def old_logp(tree: TrainTree) -> np.ndarray:
    """Near enough to the policy's for every clip to be active somewhere, fixed per token."""
    rng = np.random.default_rng(len(tree.ids))
    return rng.normal(-np.log(VOCAB), 0.8, len(tree.ids))


def run_packs(
    model: Qwen2ForCausalLM, trees: list[TrainTree], packs: list[list[Item]], layout: BatchLayout
) -> tuple[float, Logps, torch.Tensor]:
    """Loss, log-probabilities and the flattened gradient, summed over packs."""
    model.set_attn_implementation("sdpa" if layout.backend is None else IMPLEMENTATION)
    policy = PolicyModule(model)
    policy.zero_grad()
    number = {id(tree): i for i, tree in enumerate(trees)}
    total, logps = 0.0, Logps()
    for items in packs:
        batch = collate(Pack(items), layout)
        logp, entropy = policy(batch.inputs, 0.7)
        places = [(number[id(i.tree)], int(t)) for i in items for t in lay_out([i]).scored]
        old = [old_logp(trees[tree])[token] for tree, token in places] or [0.0]
        tokens = TokenBatch(
            columns=batch.columns,
            old_logp=torch.tensor(old, dtype=torch.float64),
            entropy=entropy,
        )
        loss, stats = surrogate_loss(logp, tokens, ClipConfig(), LossConfig(dual_clip=3.0))
        loss.backward()
        total += loss.item()
        for place, value in zip(places, logp.tolist(), strict=False):
            logps.setdefault(place, []).append(value)
        clips = (stats.clip_low, stats.clip_high, stats.clip_dual)
        assert not items or len(trees) < 2 or sum(map(float, clips)) > 0
    return (
        total,
        logps,
        torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]),
    )


def flat(model: Qwen2ForCausalLM, trees: list[TrainTree]) -> tuple[float, Logps, torch.Tensor]:
    """Every leaf alone, through the model's stock causal attention."""
    rules = replace(RULES, share_gain=None, padded=True, max_tokens=100)
    (packs,) = plan(trees, rules).ranks
    return run_packs(model, trees, [[item] for pack in packs for item in pack], ROWS)


@pytest.mark.parametrize("by_leaf", [False, True])
@pytest.mark.parametrize("aggregation", Aggregation)
@pytest.mark.parametrize(
    ("which", "max_tokens", "packs"),
    [([0], 10_000, 1), ([0], 62, 3), ([0, 1, 2], 10_000, 1), ([0, 1, 2], 75, 4)],
    ids=["one pack", "divided", "forest", "divided forest"],
)
def test_trees_equal_flat_sequences(
    model: Qwen2ForCausalLM,
    aggregation: Aggregation,
    which: list[int],
    max_tokens: int,
    packs: int,
    by_leaf: bool,
) -> None:
    trees = weighted([build(i, by_leaf=by_leaf) for i in which], aggregation)
    planned = plan(trees, replace(RULES, max_tokens=max_tokens))
    assert len(planned.ranks[0]) == packs
    loss, logps, grad = run_packs(model, trees, planned.ranks[0], TREE)
    want_loss, want_logps, want_grad = flat(model, trees)
    assert loss == pytest.approx(want_loss, abs=1e-12)
    assert (grad - want_grad).norm() / want_grad.norm() < 1e-10
    for (number, token), values in logps.items():
        bounds = 1
        if by_leaf:
            tree = trees[number]
            node = tree.token_node[token]
            bounds = len({*tree.clip_low[tree.on_path[:, node], node]})
        assert len(values) == bounds, "a token is scored once for each of its clip bounds"
        assert max(values) - min(values) < 1e-12
    agents = {(i, int(t)) for i, tree in enumerate(trees) for t in np.flatnonzero(tree.agent)}
    assert logps.keys() == agents
    for place, values in want_logps.items():
        np.testing.assert_allclose(values, logps[place][0], rtol=0, atol=1e-12)


def test_a_siblings_tokens_touch_no_other_bit(model: Qwen2ForCausalLM) -> None:
    (tree,) = weighted([build(0)], Aggregation.token_mean)
    ids = tree.ids.copy()
    changed = 3  # with 7, 8, 9 below it
    run = slice(tree.node_start[changed], tree.node_start[changed + 1])
    ids[run] = (ids[run] + 1) % VOCAB
    other = replace(tree, ids=ids)
    found = [run_packs(model, [t], plan([t], RULES).ranks[0], TREE)[1] for t in (tree, other)]
    below = {changed, 7, 8, 9}
    for place, values in found[0].items():
        same = values == found[1][place]
        assert same != (int(tree.token_node[place[1]]) in below), place


@settings(max_examples=25, deadline=None)
@given(
    max_tokens=st.integers(59, 200),
    world=st.integers(1, 4),
    gain=st.sampled_from([None, 0.0, 1.2, 1.6]),
)
def test_no_packing_changes_the_update(
    model: Qwen2ForCausalLM, max_tokens: int, world: int, gain: float | None
) -> None:
    trees = weighted([build(0), build(1), build(2)], Aggregation.seq_mean_token_mean)
    planned = plan(trees, replace(RULES, max_tokens=max_tokens, world_size=world, share_gain=gain))
    assert len({len(packs) for packs in planned.ranks}) == 1
    for pack in (pack for packs in planned.ranks for pack in packs):
        assert sum(item.size.tokens for item in pack) <= max_tokens
    packs = [pack for packs in planned.ranks for pack in packs]
    loss, _, grad = run_packs(model, trees, packs, TREE)
    want_loss, _, want_grad = run_packs(model, trees, plan(trees, RULES).ranks[0], TREE)
    assert loss == pytest.approx(want_loss, abs=1e-12)
    assert (grad - want_grad).norm() / want_grad.norm() < 1e-10


@st.composite
def random_trees(draw: st.DrawFn) -> TrainTree:
    count = draw(st.integers(2, 14))
    parents = [-1] + [draw(st.integers(0, node - 1)) for node in range(1, count)]
    sizes = [draw(st.integers(1, 4))] + [draw(st.integers(0, 6)) for _ in range(1, count)]
    start = np.cumsum([0, *sizes]).astype(np.int32)
    total = int(start[-1])
    agent = np.array(draw(st.lists(st.booleans(), min_size=total, max_size=total)))
    agent[: sizes[0]] = False
    leaves = [node for node in range(count) if node not in parents]
    return TrainTree(
        ids=np.arange(start[-1], dtype=np.int32),
        agent=agent,
        rollout_logp=np.zeros(start[-1], dtype=np.float32),
        node_start=start,
        node_parent=np.array(parents, dtype=np.int32),
        advantage=np.ones(count),
        negative_advantage=np.zeros(count),
        share=np.ones(count),
        clip_low=np.full(count, 0.8),
        leaves=np.array(leaves, dtype=np.int32),
        leaf_weight=np.ones(len(leaves)),
    )


@settings(max_examples=150, deadline=None)
@given(st.lists(random_trees(), min_size=1, max_size=3), st.integers(0, 30))
def test_layout_of_any_tree(trees: list[TrainTree], slack: int) -> None:
    """Every scored token is predicted from the token before it on its path, and sees that path."""
    longest = max(len(s) for tree in trees for s in tree.sequences())
    planned = plan(trees, replace(RULES, max_tokens=longest + slack))
    seen: list[tuple[int, int]] = []
    for items in planned.ranks[0]:
        if not items:
            continue
        batch = lay_out(items)
        owner = np.repeat(np.arange(len(items)), [len(lay_out([i]).scored) for i in items])
        place = np.arange(len(batch.ids))
        for at, token, number in zip(batch.predicted_from, batch.scored, owner, strict=True):
            tree = items[number].tree
            path = next(s for s in tree.sequences() if token in s)
            before = path[: list(path).index(token)]
            visible = place[(place <= at) & (at < batch.subtree_end)]
            assert batch.ids[visible].tolist() == tree.ids[before].tolist()
            assert batch.positions[visible].tolist() == list(range(len(before)))
            seen.append((id(tree), int(token)))
        starts, parents = batch.segments
        for segment, parent in enumerate(parents):
            before = batch.previous[starts[segment]]
            assert (parent < 0) == (before < 0)
            assert parent < 0 or starts[parent] <= before == starts[parent + 1] - 1
            inside = np.arange(starts[segment] + 1, starts[segment + 1])
            assert (batch.previous[inside] == inside - 1).all()
    kept = {
        (id(tree), int(t)) for tree in trees for s in tree.sequences() for t in s if tree.agent[t]
    }
    assert len(seen) == len(set(seen))
    assert set(seen) == kept
    assert sum(map(len, (planned.ranks[0]))) == 0 or planned.actual.scored == len(kept)


def test_a_division_repeats_as_little_as_possible() -> None:
    """Cutting at the root repeats the prompt only, elsewhere the long node 1 too."""
    tree = replace(build(1), leaf_weight=np.ones(4))
    items = plan([tree], replace(RULES, max_tokens=66)).ranks[0]
    by_leaf = sorted(sorted(item.leaves.tolist()) for pack in items for item in pack)
    assert by_leaf == [[0, 1], [2, 3]]
    repeated = (
        sum(i.size.tokens for pack in items for i in pack) - plan([tree], RULES).actual.tokens
    )
    assert repeated == 9


def test_a_tree_that_gains_little_is_left_flat() -> None:
    (tree,) = weighted([build(1)], Aggregation.token_mean)
    shared = plan([tree], RULES)
    gain = COST(shared.flat) / COST(shared.actual)
    assert len(plan([tree], replace(RULES, share_gain=gain - 0.01)).ranks[0][0]) == 1
    assert len(plan([tree], replace(RULES, share_gain=gain + 0.01)).ranks[0][0]) == 4


def test_an_endless_path_is_named() -> None:
    (tree,) = weighted([build(1)], Aggregation.token_mean)
    with pytest.raises(ValueError, match=r"learner\.max_tokens_per_pack=20: a sequence has \d\d"):
        plan([tree], replace(RULES, max_tokens=20))
