"""Rules under which a leaf trains only what it sampled itself, against their formulas.

An input is written down here as lists of trajectories: rewards, successes, lengths, and what was
continued where. Advantages and weights are computed from those, trajectory by trajectory; nothing
of `elpo_ray.credit` takes part in them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elpo_ray.config.algorithm import (
    Aggregation,
    AlgorithmConfig,
    BranchParent,
    CreditConfig,
    CreditRule,
    LossConfig,
    Norm,
    StreamsConfig,
    Train,
)
from elpo_ray.config.learner import LearnerConfig
from elpo_ray.credit import assign
from elpo_ray.forest.items import Shape
from elpo_ray.forest.layout import lay_out
from elpo_ray.forest.trees import pack
from elpo_ray.tree import Branch, RolloutTree
from elpo_ray.types import UNGRADED, FinishReason, Score, Step, ToolKind, ToolResult, Turn

TOKENS = 3
"""Agent tokens of a step."""


@dataclass
class Chain:
    """A trajectory: its reward (None: no verdict), success, own steps, and what it continues."""

    reward: float | None
    success: bool = False
    own: int = 1
    parent: int | None = None
    anchor: int = 0
    kept: bool = True


def chain(reward: float | None, own: int = 1, **more: object) -> Chain:
    return Chain(reward, bool(reward and reward > 0), own, **more)  # type: ignore[arg-type]


def built(chains: list[Chain]) -> tuple[RolloutTree, list[int]]:
    """The tree, one branch a continued trajectory and anchor; and the leaf of every chain."""
    tree, leaves = RolloutTree("t", len(chains), prompt_ids=(1,)), list[int]()
    for one in chains:
        at = 0
        if one.parent is not None and one.anchor:
            at = tree.path(leaves[one.parent])[one.anchor - 1]
        steps = [step(last=i == one.own - 1) for i in range(one.own)]
        score = UNGRADED if one.reward is None else Score(one.reward, one.success)
        leaves.append(tree.add_trajectory(at, steps, score))
    for place, one in enumerate(chains):
        if one.parent is not None:
            leaf = leaves[place]
            kept = [leaf] if one.kept else []
            parent = leaves[one.parent]
            same = [b for b in tree.branches if (b.parent, b.anchor) == (parent, one.anchor)]
            if same:
                same[0].leaves.append(leaf)
                same[0].kept.extend(kept)
            else:
                tree.branches.append(Branch(parent, one.anchor, [leaf], kept))
    return tree, leaves


def step(*, last: bool) -> Step:
    turn = Turn((1,) * TOKENS, (0.0,) * TOKENS, (0.0,) * TOKENS, FinishReason.STOP, 0)
    return Step(turn) if last else Step(turn, (2,), result=ToolResult(ToolKind.OK, "x"))


def z(values: list[float], ddof: int = 0, eps: float = 0.0, std: bool = True) -> list[float]:
    array = np.array(values)
    if len(array) < 2 or np.ptp(array) < 1e-12:
        return [0.0] * len(array)
    centred = array - array.mean()
    return list(centred / (array.std(ddof=ddof) + eps) if std else centred)


def advantages(chains: list[Chain], **credit: object) -> list[list[float]]:
    """Advantages of each chain's own steps, as the rule gives them."""
    tree, leaves = built(chains)
    config = CreditConfig(train=Train.own, **credit)  # type: ignore[arg-type]
    loss = LossConfig(aggregation=Aggregation.token_mean)
    (found,) = assign([tree], AlgorithmConfig(credit=config, loss=loss))
    rows = []
    order = [leaf.id for leaf in tree.leaves()]
    for one, leaf in zip(chains, leaves, strict=True):
        own = tree.path(leaf)[-one.own :]
        trains = np.flatnonzero(found.trained[order.index(leaf)]).tolist()
        assert trains in ([], own), "a leaf trains its own steps, or nothing"
        rows.append([float(found.advantage[node]) for node in own] if trains else [])
    return rows


# --- the checks that the definitions give ---


def test_deep_grpo_compares_roots_with_roots_and_branches_with_branches() -> None:
    roots = [chain(r, 3) for r in (1, 0, 0, 0, 0, 1, 0, 0)]
    branches = [chain(r, 1, parent=1, anchor=2) for r in (1, 0, 0, 0, 0, 0, 0, 1)]
    found = advantages(
        [*roots, *branches], rule=CreditRule.group_each, divide_by_std=False, skip_zero=True
    )
    assert found == [[0.75 if one.reward else -0.25] * one.own for one in [*roots, *branches]]


def test_srpo_drops_the_trajectory_that_it_resumes() -> None:
    roots = [chain(r, 2) for r in (0, 1, 0, 0, 1, 0, 0, 0)]
    resets = [chain(r, 1, parent=0, anchor=1) for r in (1, 1, 0, 0, 0, 0, 0, 0)]
    knobs = {"rule": CreditRule.group_each, "eps": 0.0, "ddof": 0}
    found = advantages([*roots, *resets], parent=BranchParent.drop, **knobs)
    assert found[0] == []
    shown = [round(row[0], 3) for row in found[1:]]
    assert shown[:7] == [1.581, -0.632, -0.632, 1.581, -0.632, -0.632, -0.632]
    assert shown[7:] == [1.732, 1.732, *[-0.577] * 6]
    kept = advantages([*roots, *resets], parent=BranchParent.keep, **knobs)
    assert kept[0][0] == pytest.approx(z([0, 1, 0, 0, 1, 0, 0, 0])[0])


def test_branpo_compares_beginnings_and_ends() -> None:
    bases = [chain(1, 2), chain(0, 2), chain(0, 2)]
    found = advantages(
        [*bases, chain(1, 1, parent=1, anchor=1)], rule=CreditRule.contrast, ddof=1, eps=1e-6
    )
    # The first and the third were not continued: they are split two steps before their end.
    assert [np.round(row, 3).tolist() for row in found[1:2]] == [[0.0, -0.866]]
    assert np.round(found[0], 3).tolist() == [0.866, 0.866]
    assert np.round(found[2], 3).tolist() == [-0.866, -0.866]
    assert np.round(found[3], 3).tolist() == [0.866]


def test_branpo_gives_beginnings_the_mean_of_base_and_completion() -> None:
    bases = [chain(1, 3), chain(0, 3), chain(0, 3)]
    found = advantages(
        [*bases, chain(1, 2, parent=1, anchor=1)], rule=CreditRule.contrast, ddof=1, eps=1e-6
    )
    assert [round(row[0], 3) for row in found[:3]] == [1.0, 0.0, -1.0]
    assert np.round([found[0][-1], found[1][-1], found[3][0], found[2][-1]], 3).tolist() == [
        0.866, -0.866, 0.866, -0.866,
    ]  # fmt: skip


def test_branpo_gives_the_longer_of_two_successes_nothing() -> None:
    bases = [chain(1, 4), chain(1, 2), chain(0, 2)]
    found = advantages(
        [*bases, chain(1, 1, parent=0, anchor=2)], rule=CreditRule.contrast, ddof=1, eps=1e-6
    )
    ends = [found[0][-1], found[1][-1], found[3][-1], found[2][-1]]
    assert np.round(ends, 3).tolist() == [0.0, 0.5, 0.5, -1.5]


# --- any input ---


@st.composite
def inputs(draw: st.DrawFn) -> list[Chain]:
    """Trajectories from the prompt, some of which were continued."""

    def outcome() -> dict[str, object]:
        if draw(st.integers(0, 7)) == 0:
            return {"reward": None}
        reward = draw(st.sampled_from([-1.1, 0.0, 0.25, 1.0]))
        return {"reward": reward, "success": reward > 0.5}

    roots = draw(st.integers(1, 5))
    chains = [Chain(own=draw(st.integers(1, 4)), **outcome()) for _ in range(roots)]  # type: ignore[arg-type]
    for place in range(len(chains)):
        if chains[place].reward is None or draw(st.booleans()):
            continue
        anchor = draw(st.integers(0, chains[place].own - 1))
        for _ in range(draw(st.integers(1, 3))):
            more = outcome()
            kept = more["reward"] is None or draw(st.booleans())
            chains.append(
                Chain(own=draw(st.integers(1, 3)), parent=place, anchor=anchor, kept=kept, **more)  # type: ignore[arg-type]
            )
    return chains


knobs = st.fixed_dictionaries(
    {
        "eps": st.sampled_from([0.0, 1e-6, 0.1]),
        "ddof": st.sampled_from([0, 1]),
        "divide_by_std": st.booleans(),
    }
)


@settings(deadline=None)
@given(chains=inputs(), chosen=knobs, parent=st.sampled_from(BranchParent), skip_zero=st.booleans())
def test_group_each_is_its_formula(
    chains: list[Chain], chosen: dict[str, object], parent: BranchParent, skip_zero: bool
) -> None:
    """A = z of R in the leaf's group: those from the prompt, or the kept ones of one branching."""
    found = advantages(
        chains, rule=CreditRule.group_each, parent=parent, skip_zero=skip_zero, **chosen
    )
    resumed = {one.parent for one in chains}
    members: dict[object, list[int]] = {}
    for place, one in enumerate(chains):
        dropped = parent is BranchParent.drop and place in resumed
        if one.reward is not None and one.kept and not dropped:
            members.setdefault(one.parent, []).append(place)
    expected: list[list[float]] = [[] for _ in chains]
    for places in members.values():
        scores = z([chains[i].reward or 0.0 for i in places], std=chosen["divide_by_std"],  # type: ignore[arg-type]
                   eps=chosen["eps"], ddof=chosen["ddof"])  # type: ignore[arg-type]  # fmt: skip
        for i, score in zip(places, scores, strict=True):
            if not (skip_zero and abs(score) < 1e-8):
                expected[i] = [score] * chains[i].own
    for mine, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-9, atol=1e-9)


@settings(deadline=None)
@given(chains=inputs(), norm=st.sampled_from(Norm))
def test_contrast_is_its_formula(chains: list[Chain], norm: Norm) -> None:
    """BranPO, written out over bases; at most one completion of a base is kept."""
    seen: set[int | None] = set()
    for one in chains:
        one.kept = one.kept and one.reward is not None and one.parent not in seen
        seen |= {one.parent} if one.kept and one.parent is not None else set()
    found = advantages(chains, rule=CreditRule.contrast, norm=norm, ddof=1, eps=1e-6)
    bases = [i for i, one in enumerate(chains) if one.parent is None and one.reward is not None]
    tried = {i: [one for one in chains if one.parent == i] for i in bases}
    split = {i: tried[i][-1].anchor if tried[i] else max(0, chains[i].own - 2) for i in bases}
    kept = {
        i: next((j for j, one in enumerate(chains) if one.parent == i and one.kept), None)
        for i in bases
    }
    both = {i: [i] if kept[i] is None else [i, kept[i]] for i in bases}
    begun = [i for i in bases if split[i] > 0]
    means = [np.mean([chains[j].reward for j in both[i]]) for i in begun]  # type: ignore[index]
    beginnings = dict(zip(begun, z(list(map(float, means)), 1, 1e-6), strict=True))
    ends: dict[int, float] = {}
    groups = list(both.values()) if norm is Norm.pair else [[j for i in bases for j in both[i]]]  # type: ignore[misc]
    for group in groups:
        values = z([chains[j].reward or 0.0 for j in group], 1, 1e-6)  # type: ignore[index]
        ends |= dict(zip(group, values, strict=True))  # type: ignore[arg-type]
    for i in bases:
        j = kept[i]
        if j is None:
            continue
        length = chains[j].anchor + chains[j].own
        worse = j if length > chains[i].own else i
        if chains[i].success != chains[j].success:
            worse = j if chains[i].success else i
        ends[worse] = min(ends[worse], 0.0)
    for place, one in enumerate(chains):
        if place in split:
            expected = [
                beginnings[place] if at < split[place] else ends[place] for at in range(one.own)
            ]
        else:
            expected = [ends[place]] * one.own if place in ends else []
        np.testing.assert_allclose(found[place], expected, rtol=1e-9, atol=1e-9)


# --- weights ---


@settings(deadline=None)
@given(
    batch=st.lists(inputs(), min_size=1, max_size=3),
    aggregation=st.sampled_from([Aggregation.token_mean, Aggregation.seq_mean_token_mean]),
    branch=st.sampled_from([None, 0.0, 0.5, 1.0]),
)
def test_weights_are_those_of_flat_sequences_with_masked_prefixes(
    batch: list[list[Chain]], aggregation: Aggregation, branch: float | None
) -> None:
    """token_mean: 1 / sum n; seq_mean_token_mean: 1 / (N n); n = own tokens of a trained leaf, sums
    over the mini-batch, and over each stream by itself if they are apart."""
    loss = LossConfig(aggregation=aggregation, streams=StreamsConfig(branch=branch))
    credit = CreditConfig(rule=CreditRule.group_each, train=Train.own, ddof=1)
    trees = [built(chains) for chains in batch]
    config = AlgorithmConfig(credit=credit, loss=loss)
    only_trees = [tree for tree, _ in trees]
    forest = pack(only_trees, assign(only_trees, config), loss, LearnerConfig(minibatch_inputs=8))
    trained = [(b, i) for b, chains in enumerate(batch) for i, one in enumerate(chains)
               if one.reward is not None and one.kept]  # fmt: skip
    for b, chains in enumerate(batch):
        (packed, leaves), weight = (forest.trees[b], trees[b][1]), forest.trees[b].token_weight
        expected = np.zeros(len(packed.ids))
        for i in (i for where, i in trained if where == b):
            one = chains[i]
            alike = [
                batch[c][j].own * TOKENS
                for c, j in trained
                if branch is None or (batch[c][j].parent is None) == (one.parent is None)
            ]
            each = 1 / sum(alike)
            if aggregation is Aggregation.seq_mean_token_mean:
                each = 1 / (len(alike) * one.own * TOKENS)
            if branch is not None and one.parent is not None:
                each *= branch
            for node in only_trees[b].path(leaves[i])[-one.own :]:
                where = (packed.token_node == node) & packed.agent
                expected[where] = each
        np.testing.assert_allclose(weight, expected, rtol=1e-9, atol=1e-15)


def test_a_step_belongs_to_the_completion_that_added_it() -> None:
    tree, leaves = built([chain(1, 3), chain(0, 2, parent=0, anchor=1), chain(0, 1)])
    names = count()
    owned = [[next(names) for _ in range(own)] for own in (1, 3, 2, 1)]
    assert [tree.owners()[node] for nodes in owned[1:] for node in nodes] == [
        *[leaves[0]] * 3, *[leaves[1]] * 2, leaves[2],
    ]  # fmt: skip


@settings(deadline=None)
@given(
    chains=inputs(),
    room=st.sampled_from([0, 12, 200]),
    parent=st.sampled_from(BranchParent),
    skip_zero=st.booleans(),
)
def test_each_trained_token_is_scored_once_however_the_tree_is_packed(
    chains: list[Chain], room: int, parent: BranchParent, skip_zero: bool
) -> None:
    """Shared prefixes once, or each leaf as a sequence: the terms add up to the same weights and
    advantages, token by token. A prefix that its leaf does not train is context only."""
    loss = LossConfig(aggregation=Aggregation.seq_mean_token_mean)
    credit = CreditConfig(
        rule=CreditRule.group_each, train=Train.own, parent=parent, skip_zero=skip_zero
    )
    (tree, _) = built(chains)
    found = assign([tree], AlgorithmConfig(credit=credit, loss=loss))
    (train,) = pack([tree], found, loss, LearnerConfig()).trees
    shape = Shape.of(train, needs_advantage=True)
    signed = train.token_weight * found[0].advantage[train.token_node]
    longest = max((item.size.tokens for item in shape.flat()), default=0)
    for items in (shape.flat(), shape.shared(max(room, longest))):
        pulled, times = np.zeros(len(train.ids)), np.zeros(len(train.ids))
        for item in items:
            packed = lay_out([item])
            np.add.at(pulled, packed.scored, packed.columns.weight * packed.columns.advantage)
            np.add.at(times, packed.scored, 1)
        np.testing.assert_allclose(pulled, signed, rtol=1e-9, atol=1e-15)
        assert times.max(initial=0) <= 1
