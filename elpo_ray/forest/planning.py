"""Which items go into which pack on which rank.

Invariants: every rank computes the same plan of all ranks from the forest alone, so that all agree
on the number of packs without talking; weights come with the forest and are never renormalised,
hence neither budget nor ranks nor sharing change the objective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

from elpo_ray.forest.items import CostModel, Item, PassSize, Shape
from elpo_ray.forest.trees import TrainTree


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a plan depends on besides the trees."""

    max_tokens: int
    """Tokens of one pack, padding included."""
    world_size: int
    cost: CostModel
    share_gain: float | None
    """Prefixes of a tree are shared where that is expected to be this many times faster; None =
    never."""
    padded: bool = False
    """Packs become right-padded rows: only for items of one leaf each."""
    needs_advantage: bool = True
    """Leave out leaves without any advantage."""


@dataclass(frozen=True)
class Plan:
    """The packs of one optimizer step, and how much sharing saves."""

    ranks: list[list[list[Item]]]
    """The items of every pack of every rank, equally many packs each; a pack without items keeps
    the ranks in step. Shape: [world_size][packs][...]."""
    flat: PassSize
    """Of every leaf as a sequence of its own."""
    unique: PassSize
    """Of every tree shared and undivided."""
    actual: PassSize
    """Of what is forwarded."""

    @property
    def empty(self) -> bool:
        """Nothing can move the weights."""
        return not self.actual.scored


def plan(trees: Sequence[TrainTree], rules: Rules) -> Plan:
    """Divide the trees of a mini-batch into items, balance the ranks, fill their packs.

    Items go to the least loaded rank, costliest first, and there into the first pack with room,
    longest first. Raises ValueError on a single path over the budget.
    """
    flat = unique = PassSize()
    items: list[Item] = []
    for tree in trees:
        shape = Shape.of(tree, needs_advantage=rules.needs_advantage)
        if not len(shape.kept):
            continue
        apart = shape.flat_load()
        whole = reduce(add, (item.load for item in shape.shared(tree_tokens(tree))))
        flat, unique = flat + apart, unique + whole
        items += _items(shape, apart, rules)
    longest = max((item.load.tokens for item in items), default=0)
    if longest > rules.max_tokens:
        raise ValueError(
            f"learner.max_tokens_per_pack={rules.max_tokens}: a sequence has {longest} tokens; "
            "use at least model.max_context"
        )
    ranks = [_fill(of_rank, rules) for of_rank in _balance(items, rules)]
    count = max(len(packs) for packs in ranks)
    ranks = [packs + [[] for _ in range(count - len(packs))] for packs in ranks]
    return Plan(ranks, flat, unique, reduce(add, (item.load for item in items), PassSize()))


def tree_tokens(tree: TrainTree) -> int:
    """A budget under which the tree is never divided."""
    return max(1, len(tree.ids))


def _items(shape: Shape, apart: PassSize, rules: Rules) -> list[Item]:
    if rules.share_gain is None:
        return shape.flat()
    shared = shape.shared(rules.max_tokens)
    cost = sum(rules.cost(item.load) for item in shared)
    return shared if rules.cost(apart) >= rules.share_gain * cost else shape.flat()


def _balance(items: list[Item], rules: Rules) -> list[list[Item]]:
    """Longest processing time first."""
    ranks: list[list[Item]] = [[] for _ in range(rules.world_size)]
    load = [0.0] * rules.world_size
    for item in sorted(items, key=lambda item: rules.cost(item.load), reverse=True):
        rank = load.index(min(load))
        ranks[rank].append(item)
        load[rank] += rules.cost(item.load)
    return ranks


def _fill(items: list[Item], rules: Rules) -> list[list[Item]]:
    """First fit decreasing."""
    packs: list[list[Item]] = []
    sizes: list[int] = []
    for item in sorted(items, key=lambda item: item.load.tokens, reverse=True):
        for i, size in enumerate(sizes):
            if rules.padded:
                grown = (len(packs[i]) + 1) * packs[i][0].load.tokens
            else:
                grown = size + item.load.tokens
            if grown <= rules.max_tokens:
                packs[i].append(item)
                sizes[i] = grown
                break
        else:
            packs.append([item])
            sizes.append(item.load.tokens)
    return packs
