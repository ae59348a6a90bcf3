"""Reinforce++ (arXiv 2501.03262): advantages whitened over all agent tokens of the batch.

With a terminal reward, no discount and no penalty in the reward, the return of every agent token of
a leaf is the leaf's reward; it is carried across tool responses, which have no tokens of the
agent's. Hence a leaf counts as often as it has agent tokens, a shared prefix once a leaf.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from elpo_ray.config.algorithm import CreditConfig
from elpo_ray.credit.group import SIGMA_MIN
from elpo_ray.credit.nodes import action_tokens
from elpo_ray.credit.parts import Parts, rewards
from elpo_ray.tree import RolloutTree


def parts(trees: Sequence[RolloutTree], config: CreditConfig) -> list[Parts]:
    """(G - μ) / sqrt(σ² + ε) over the tokens of all trees; with `config.baseline` the mean reward
    of the input is subtracted first. Equal returns everywhere give 0."""
    returns = [_returns(tree, config) for tree in trees]
    counts = [_leaf_tokens(tree) for tree in trees]
    weighted = [
        (counts[i][leaf], value) for i, of in enumerate(returns) for leaf, value in of.items()
    ]
    total = sum(count for count, _ in weighted)
    mean = math.fsum(count * value for count, value in weighted) / max(total, 1)
    squares = math.fsum(count * (value - mean) ** 2 for count, value in weighted)
    variance = squares / max(total - config.ddof, 1)
    equal = math.sqrt(variance) < SIGMA_MIN * max(1.0, abs(mean))
    scale = 0.0 if equal else 1 / math.sqrt(variance + config.eps)
    return [
        Parts({leaf: (value - mean) * scale for leaf, value in of.items()}, [0.0] * len(tree.nodes))
        for tree, of in zip(trees, returns, strict=True)
    ]


def _returns(tree: RolloutTree, config: CreditConfig) -> dict[int, float]:
    values = rewards(tree)
    if not config.baseline or not values:
        return values
    mean = math.fsum(values.values()) / len(values)
    return {leaf: value - mean for leaf, value in values.items()}


def _leaf_tokens(tree: RolloutTree) -> list[int]:
    """Agent tokens from the prompt to the end of each node. Shape: [num_nodes]."""
    tokens = [0] * len(tree.nodes)
    for parent, child in tree.edges():
        tokens[child] = tokens[parent] + action_tokens(tree, child)
    return tokens
