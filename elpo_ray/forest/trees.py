"""What reaches the learner: the unique tokens of every tree, each with its weight in the objective.

Invariants: a token stands once, in the node that sampled or observed it; only agent tokens (sampled
by the policy) are trained; the objective of a mini-batch is

    sum over its leaves, over the leaf's agent tokens, of  leaf_weight[leaf] * share * L_t   (Eq. 1)

with denominators over the whole mini-batch, so that it depends on no packing and no rank. A token
shared by several leaves counts once per leaf (share = 1; credit.weighting=node divides by how many
they are); `terms` adds those terms up node by node, so that the sum over unique tokens is the same
objective, exactly, also where advantages or clip bounds differ between the leaves of a token. A
leaf without a verdict takes part in nothing: it is none of the leaves here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from elpo_ray.config.algorithm import Aggregation, LossConfig
from elpo_ray.config.learner import LearnerConfig
from elpo_ray.tree import RolloutTree

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


class NodeCredit(Protocol):
    """What the forest reads of a credit rule's result, indexed by node id, root included.

    `advantage`, `negative_advantage` and `clip_low` may also be given one a leaf and node, [L][N],
    leaves in the order of `RolloutTree.leaves()`: trajectories that share a node then pull on it
    separately.
    """

    @property
    def advantage(self) -> Sequence[float] | FloatArray: ...

    @property
    def negative_advantage(self) -> Sequence[float] | FloatArray: ...

    @property
    def share(self) -> Sequence[float] | FloatArray: ...

    @property
    def clip_low(self) -> Sequence[float] | FloatArray: ...

    @property
    def trained(self) -> BoolArray | None:
        """Whether a leaf trains a node, [L][N]; None: each trains all of its path."""
        ...


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainTree:
    """The unique tokens of one tree: T tokens, N nodes (node 0 = the prompt), L leaves."""

    ids: IntArray
    """Token ids, the prompt's first, then each node's in id order. Shape: [T]."""
    agent: NDArray[np.bool_]
    """Whether the policy sampled the token; only these are trained. Shape: [T]."""
    rollout_logp: NDArray[np.float32]
    """The engine's log-probabilities in nats; 0 on tokens that are not trained. Shape: [T]."""
    node_start: IntArray
    """Node n holds tokens node_start[n]:node_start[n + 1]. Shape: [N + 1]."""
    node_parent: IntArray
    """Parent node, -1 for node 0. A parent's id is smaller than its children's. Shape: [N]."""
    advantage: FloatArray
    """0 for the prompt. Shape: [N], or [L, N] where it depends on the leaf."""
    negative_advantage: FloatArray
    """The negative part of the advantage, >= 0; the positive part is their sum. Both are
    above 0 where leaves that share the node pull in opposite directions. Shape: as
    `advantage`."""
    share: FloatArray
    """Multiplies the weight that each leaf gives to the node's tokens; 1, or less where shared
    tokens count less. Shape: [N]."""
    clip_low: FloatArray
    """Lower bound of the probability ratio, 1 - ε_low^t (Eq. 11). Shape: [N], or [L, N] where it
    depends on the leaf."""
    leaves: IntArray
    """Node ids of the completed trajectories that have a verdict. Shape: [L]."""
    leaf_weight: FloatArray
    """Weight of each agent token that the leaf trains in the objective, before `share`.
    Shape: [L]."""
    trained: BoolArray | None = None
    """Whether the leaf trains the node; null: it trains all of its path. Shape: [L, N]."""
    branch: BoolArray | None = None
    """Whether the leaf continues a prefix that its growth rule branched at; null: none does.
    Shape: [L]."""

    @property
    def num_nodes(self) -> int:
        return len(self.node_parent)

    @cached_property
    def token_node(self) -> IntArray:
        """The node of each token. Shape: [T]."""
        return np.repeat(np.arange(self.num_nodes, dtype=np.int32), np.diff(self.node_start))

    @cached_property
    def on_path(self) -> NDArray[np.bool_]:
        """Whether the node lies on the leaf's path. Shape: [L, N]."""
        on_path = np.zeros((len(self.leaves), self.num_nodes), dtype=np.bool_)
        for row, leaf in enumerate(self.leaves):
            node = int(leaf)
            while node >= 0:
                on_path[row, node] = True
                node = int(self.node_parent[node])
        return on_path

    @property
    def trains(self) -> BoolArray:
        """Whether the leaf trains the node. Shape: [L, N]."""
        return self.on_path if self.trained is None else self.trained & self.on_path

    @cached_property
    def trained_tokens(self) -> IntArray:
        """Agent tokens that each leaf trains. Shape: [L]."""
        agents = np.bincount(self.token_node[self.agent], minlength=self.num_nodes)
        return (self.trains @ agents).astype(np.int32)

    @cached_property
    def token_weight(self) -> FloatArray:
        """Sum of `leaf_weight` over the leaves that train an agent token, times its node's `share`;
        0 on other tokens. Shape: [T]."""
        per_node = self.leaf_weight @ self.trains * self.share
        return np.where(self.agent, per_node[self.token_node], 0.0)

    def sequences(self) -> Iterator[IntArray]:
        """The flat view: for each leaf, the indices of its tokens from the prompt to its end."""
        spans = [
            np.arange(start, end, dtype=np.int32)
            for start, end in zip(self.node_start, self.node_start[1:], strict=False)
        ]
        for leaf in self.leaves:
            path: list[IntArray] = []
            node = int(leaf)
            while node >= 0:
                path.append(spans[node])
                node = int(self.node_parent[node])
            yield np.concatenate(path[::-1])


@dataclass(frozen=True, kw_only=True)
class TrainForest:
    """Trees by optimizer step: `minibatches[i]` are the trees of the i-th one, in order."""

    minibatches: list[list[TrainTree]]

    @property
    def trees(self) -> list[TrainTree]:
        return [tree for minibatch in self.minibatches for tree in minibatch]


@dataclass(frozen=True, eq=False)
class Terms:
    """What some leaves together add to the objective for each token of a node (Eq. 12).

    With their weights w_i and advantages A_i, and A⁺ = max(A, 0), A⁻ = max(-A, 0), it is
    P min(ρ, 1 + ε_high) - N max(ρ, clip_low) with P = Σ w_i A_i⁺ and N = Σ w_i A_i⁻: the sum over
    the leaves of w_i min(ρ A_i, clip(ρ) A_i). Shapes: [N].
    """

    weight: FloatArray
    """Σ w_i, times the node's share."""
    advantage: FloatArray
    """The mean advantage, (P - N) / weight."""
    negative_advantage: FloatArray
    """The mean negative part, N / weight."""
    copies: FloatArray
    """Number of leaves with a weight."""
    clip_low: FloatArray
    """The lower clip bound that all of these leaves have."""


def terms(tree: TrainTree, leaves: NDArray[np.int64]) -> list[Terms]:
    """The terms of the leaves at these places of `tree.leaves`. Leaves that have different clip
    bounds on a node are kept apart there: the first terms have every node's highest bound, the
    following ones its next lower bounds, with weight 0 on nodes that have no more of them."""
    trains = tree.trains[leaves]
    weight = tree.leaf_weight[leaves, None] * trains
    if tree.clip_low.ndim == 1:
        return [_terms(tree, leaves, weight, tree.clip_low)]
    bounds, left, found = tree.clip_low[leaves], trains, list[Terms]()
    while left.any():
        highest = np.where(left, bounds, 0.0).max(axis=0)
        here = left & (bounds == highest)
        found.append(_terms(tree, leaves, weight * here, highest))
        left = left & ~here & (weight > 0)
    return found


def _terms(
    tree: TrainTree, leaves: NDArray[np.int64], weight: FloatArray, clip_low: FloatArray
) -> Terms:
    """The terms of leaves that have one bound on each node and these weights, [leaves, N]."""
    total = weight.sum(axis=0)

    def mean(values: FloatArray) -> FloatArray:
        if values.ndim == 1:
            return values
        # Off the path a value means nothing and may be anything.
        added = (weight * np.where(weight > 0, values[leaves], 0)).sum(axis=0)
        quotient: FloatArray = np.divide(added, total, out=np.zeros_like(total), where=total > 0)
        return quotient

    return Terms(
        weight=total * tree.share,
        advantage=mean(tree.advantage),
        negative_advantage=mean(tree.negative_advantage),
        copies=(weight > 0).sum(axis=0).astype(np.float64),
        clip_low=clip_low,
    )


def stream_weights(
    trained: Sequence[int] | IntArray, branch: BoolArray, loss: LossConfig
) -> FloatArray:
    """`leaf_weights`; with `loss.streams.branch` those of the leaves in a branch and of the others
    apart, each as if it were alone, and the former times that factor. Shapes: [L]."""
    factor = loss.streams.branch
    if factor is None:
        return leaf_weights(trained, loss)
    counts = np.asarray(trained)
    others = leaf_weights(np.where(branch, 0, counts), loss)
    return others + factor * leaf_weights(np.where(branch, counts, 0), loss)


def leaf_weights(trained: Sequence[int] | IntArray, loss: LossConfig) -> FloatArray:
    """Weight of each agent token that each leaf of one mini-batch trains (§3.2, Eq. 1).

    `trained[j]` = such tokens n_j of leaf j; a leaf without any gets 0 and is not counted in N.
    seq_mean_token_mean: 1 / (N n_j); token_mean: 1 / sum n_j; seq_mean_token_sum_norm: 1 / (N C).
    """
    counts = np.asarray(trained, dtype=np.float64)
    used = counts > 0
    weights = np.zeros(len(counts))
    if loss.aggregation is Aggregation.seq_mean_token_mean:
        weights[used] = 1 / (used.sum() * counts[used])
    elif loss.aggregation is Aggregation.token_mean:
        weights[used] = 1 / max(counts.sum(), 1.0)
    else:
        weights[used] = 1 / (max(used.sum(), 1) * loss.norm_tokens)
    return weights


def pack(
    trees: Sequence[RolloutTree],
    credits: Sequence[NodeCredit],
    loss: LossConfig,
    learner: LearnerConfig,
) -> TrainForest:
    """Trees and their credit -> the forest, `learner.minibatch_inputs` trees an optimizer step.

    Raises ValueError on no trees, on a tree without tokens (a bare dump), and on rewards,
    advantages, clip bounds or engine log-probabilities that are not finite.
    """
    if not trees:
        raise ValueError("trees=[]: nothing to train on; grow at least one tree per step")
    assert len(trees) == len(credits), "one credit per tree"
    unweighted = [_tree(tree, credit) for tree, credit in zip(trees, credits, strict=True)]
    size = learner.minibatch_inputs
    return TrainForest(
        minibatches=[
            _weighted(unweighted[first : first + size], loss)
            for first in range(0, len(unweighted), size)
        ]
    )


def demonstrations(
    conversations: Sequence[tuple[Sequence[int], Sequence[bool]]], batch_size: int
) -> TrainForest:
    """Supervised conversations as one-path trees, for the token-mean NLL of each batch.

    A conversation is its token ids and, in parallel, whether the assistant wrote the token. Raises
    ValueError where the two differ in length or the first token, which has no context, is trained.
    """
    loss = LossConfig(aggregation=Aggregation.token_mean)
    trees: list[TrainTree] = []
    for index, (ids, agent) in enumerate(conversations):
        if len(ids) != len(agent):
            raise ValueError(f"demonstration {index}: {len(ids)} ids but {len(agent)} agent marks")
        if not len(ids) or agent[0]:
            raise ValueError(
                f"demonstration {index}: its first token cannot be trained; begin with a prompt"
            )
        trees.append(
            TrainTree(
                ids=np.asarray(ids, dtype=np.int32),
                agent=np.asarray(agent, dtype=np.bool_),
                rollout_logp=np.zeros(len(ids), dtype=np.float32),
                node_start=np.array([0, 0, len(ids)], dtype=np.int32),
                node_parent=np.array([-1, 0], dtype=np.int32),
                advantage=np.zeros(2),
                negative_advantage=np.zeros(2),
                share=np.ones(2),
                clip_low=np.ones(2),
                leaves=np.array([1], dtype=np.int32),
                leaf_weight=np.zeros(1),
            )
        )
    return TrainForest(
        minibatches=[
            _weighted(trees[first : first + batch_size], loss)
            for first in range(0, len(trees), batch_size)
        ]
    )


def _weighted(trees: list[TrainTree], loss: LossConfig) -> list[TrainTree]:
    """The trees of one mini-batch with their leaf weights, denominators over all of them.

    Where shares are below 1, all weights grow alike until their sum is what it would be without.
    """
    trained = np.concatenate([tree.trained_tokens for tree in trees])
    branch = np.concatenate([in_branch(tree) for tree in trees])
    weights = stream_weights(trained, branch, loss)
    ends = np.cumsum([len(tree.leaves) for tree in trees])[:-1]
    weighted = [
        replace(tree, leaf_weight=weight)
        for tree, weight in zip(trees, np.split(weights, ends), strict=True)
    ]
    left = sum(tree.token_weight.sum() for tree in weighted)
    if all((tree.share == 1).all() for tree in trees) or left == 0:
        return weighted
    growth = float(weights @ np.asarray(trained, dtype=np.float64)) / left
    return [replace(tree, leaf_weight=tree.leaf_weight * growth) for tree in weighted]


def in_branch(tree: TrainTree) -> BoolArray:
    """Whether each leaf is in a branch. Shape: [L]."""
    return np.zeros(len(tree.leaves), dtype=np.bool_) if tree.branch is None else tree.branch


def _tree(tree: RolloutTree, credit: NodeCredit) -> TrainTree:
    """One tree's arrays, leaf weights still 0."""
    ids = list(tree.prompt_ids)
    agent = [False] * len(ids)
    logp = [0.0] * len(ids)
    node_start = [0, len(ids)]
    for node in tree.nodes[1:]:
        if node.step is None:
            raise ValueError(f"tree {tree.task_id}: node {node.id} has no tokens (a bare dump?)")
        turn, seen = node.step.turn, node.step.observation_ids
        ids += [*turn.token_ids, *seen]
        agent += [True] * len(turn.token_ids) + [False] * len(seen)
        logp += [*turn.logprobs, *([0.0] * len(seen))]
        node_start.append(len(ids))
    advantage = np.array(credit.advantage, dtype=np.float64)
    negative_advantage = np.array(credit.negative_advantage, dtype=np.float64)
    advantage[..., 0] = negative_advantage[..., 0] = 0.0
    leaves = tree.leaves()
    graded = np.array([leaf.score is not None and leaf.score.graded for leaf in leaves], dtype=bool)
    rewards = [node.score.reward for node in leaves if node.score is not None]
    branched = {leaf for branch in tree.branches for leaf in branch.leaves}

    def kept(values: FloatArray) -> FloatArray:
        """The values of the graded leaves."""
        return values[graded] if values.ndim == 2 else values

    packed = TrainTree(
        ids=np.array(ids, dtype=np.int32),
        agent=np.array(agent, dtype=np.bool_),
        rollout_logp=np.array(logp, dtype=np.float32),
        node_start=np.array(node_start, dtype=np.int32),
        node_parent=np.array([-1 if n.parent is None else n.parent for n in tree.nodes], np.int32),
        advantage=kept(advantage),
        negative_advantage=kept(negative_advantage),
        share=np.array(credit.share, dtype=np.float64),
        clip_low=kept(np.array(credit.clip_low, dtype=np.float64)),
        leaves=np.array([node.id for node in leaves], dtype=np.int32)[graded],
        leaf_weight=np.zeros(int(graded.sum())),
        trained=None if credit.trained is None else credit.trained[graded],
        branch=np.array([node.id in branched for node in leaves], dtype=np.bool_)[graded],
    )
    _check(packed, tree.task_id, rewards)
    return packed


def _check(tree: TrainTree, task_id: str, rewards: list[float]) -> None:
    """Raise ValueError on what would poison the loss, naming it."""
    for name, values in (
        ("rewards", np.asarray(rewards, dtype=np.float64)),
        ("advantages", tree.advantage),
        ("advantages", tree.negative_advantage),
        ("clip bounds", tree.clip_low),
        ("engine log-probabilities", tree.rollout_logp),
    ):
        if not np.isfinite(values).all():
            raise ValueError(f"tree {task_id}: its {name} contain NaN or infinity")
    for name in ("advantage", "negative_advantage", "share", "clip_low"):
        values = getattr(tree, name)
        shapes: list[tuple[int, ...]] = [(tree.num_nodes,)]
        if name != "share":
            shapes.append((len(tree.leaves), tree.num_nodes))
        assert values.shape in shapes, f"{name} needs one value per node"
    if len(tree.agent) and tree.agent[0]:
        raise ValueError(f"tree {task_id}: empty prompt; the first sampled token has no context")
