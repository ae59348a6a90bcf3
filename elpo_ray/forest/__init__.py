"""What reaches the learner: trees of unique tokens, and how they are laid out for its passes.

`trees` holds the data and its weights, `items` says what of a tree is forwarded and scored,
`layout` gives that as arrays in depth-first order, `planning` fills packs and balances ranks.
numpy only.
"""

from elpo_ray.forest.items import CostModel, Item, PassSize
from elpo_ray.forest.layout import PackedForest, TokenColumns, lay_out
from elpo_ray.forest.planning import Plan, Rules, plan
from elpo_ray.forest.trees import (
    FloatArray,
    IntArray,
    NodeCredit,
    TrainForest,
    TrainTree,
    demonstrations,
    leaf_weights,
    pack,
)

__all__ = [
    "CostModel",
    "FloatArray",
    "IntArray",
    "Item",
    "NodeCredit",
    "PackedForest",
    "PassSize",
    "Plan",
    "Rules",
    "TokenColumns",
    "TrainForest",
    "TrainTree",
    "demonstrations",
    "lay_out",
    "leaf_weights",
    "pack",
    "plan",
]
