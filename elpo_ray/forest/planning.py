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
class PlanRules:
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
    """Size of the passes if every leaf were a sequence of its own."""
    unique: PassSize
    """Size of the passes if every tree were shared and undivided."""
    actual: PassSize
    """Size of the passes as planned."""

    @property
    def empty(self) -> bool:
        """Whether nothing can move the weights."""
        return not self.actual.scored


def plan(trees: Sequence[TrainTree], rules: PlanRules) -> Plan:
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
        separate = shape.flat_size()
        # So many tokens never divide the tree.
        whole = reduce(add, (item.size for item in shape.shared(max(1, len(tree.ids)))))
        flat, unique = flat + separate, unique + whole
        items += _items(shape, separate, rules)
    longest = max((item.size.tokens for item in items), default=0)
    if longest > rules.max_tokens:
        raise ValueError(
            f"learner.max_tokens_per_pack={rules.max_tokens}: a sequence has {longest} tokens; "
            "use at least model.max_context"
        )
    ranks = [_fill(of_rank, rules) for of_rank in _balance(items, rules)]
    count = max(len(packs) for packs in ranks)
    ranks = [packs + [[] for _ in range(count - len(packs))] for packs in ranks]
    return Plan(ranks, flat, unique, reduce(add, (item.size for item in items), PassSize()))


def _items(shape: Shape, flat: PassSize, rules: PlanRules) -> list[Item]:
    """The tree's items: shared prefixes if that is enough faster, else flat sequences."""
    if rules.share_gain is None:
        return shape.flat()
    shared = shape.shared(rules.max_tokens)
    cost = sum(rules.cost(item.size) for item in shared)
    return shared if rules.cost(flat) >= rules.share_gain * cost else shape.flat()


def _balance(items: list[Item], rules: PlanRules) -> list[list[Item]]:
    """Give each item, costliest first, to the rank with the least to do."""
    ranks: list[list[Item]] = [[] for _ in range(rules.world_size)]
    costs = [0.0] * rules.world_size
    for item in sorted(items, key=lambda item: rules.cost(item.size), reverse=True):
        rank = costs.index(min(costs))
        ranks[rank].append(item)
        costs[rank] += rules.cost(item.size)
    return ranks


def _fill(items: list[Item], rules: PlanRules) -> list[list[Item]]:
    """Put each item, longest first, into the first pack with room (first fit decreasing)."""
    packs: list[list[Item]] = []
    sizes: list[int] = []
    for item in sorted(items, key=lambda item: item.size.tokens, reverse=True):
        for i, size in enumerate(sizes):
            if rules.padded:
                grown = (len(packs[i]) + 1) * packs[i][0].size.tokens
            else:
                grown = size + item.size.tokens
            if grown <= rules.max_tokens:
                packs[i].append(item)
                sizes[i] = grown
                break
        else:
            packs.append([item])
            sizes.append(item.size.tokens)
    return packs
