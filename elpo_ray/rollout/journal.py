"""What an input's growth leaves behind as it goes, so that it can be taken up again anywhere.

A growth rule is a deterministic function of the outcomes of its completions: it numbers them in the
order in which it asks. So the completions alone are enough: the tree is made again from them,
node ids included (`replay`), and the rule runs from its start, with those completions answered at
once; only what was unfinished is sampled. The same goes for a larger budget, where
budgets may grow (not `Rollout.fixed`): a rule that ran out of rollouts asked for the first few of
what it would have asked for with more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from elpo_ray.growth.budget import Cost, Ledger
from elpo_ray.tree import Branch, Localization, RolloutTree
from elpo_ray.types import EndReason, Message, Problem, Score, Step, pickled_by_position


@pickled_by_position
@dataclass(frozen=True, slots=True)
class Reply:
    """What the policy said when the rule asked it something (`Rollout.ask`)."""

    text: str
    cost: Cost
    lost: Sequence[Cost] = ()
    """Costs of the attempts at it that the infrastructure destroyed."""


@pickled_by_position
@dataclass(frozen=True, slots=True)
class Completion:
    """One completed trajectory of an input."""

    number: int
    """Its place in the order in which the rule asked for completions, from 0."""
    at: int
    """The node that it continues; 0 = the prompt."""
    anchor: int | None
    """Steps of the prefix that it continues; None from the prompt."""
    steps: Sequence[Step]
    score: Score
    end: EndReason | None
    cost: Cost
    lost: Sequence[Cost] = ()
    """Costs of the attempts at it that the infrastructure destroyed."""
    replies: Sequence[Reply] = ()
    """What the rule was told after the completion before this one had finished. A reply on which no
    completion depends yet may be asked for again."""


@dataclass(frozen=True, slots=True)
class TreeEnd:
    """What growth has found beside the completions."""

    prompt_ids: tuple[int, ...]
    messages: Sequence[Message]
    """The prompt, with what an environment adds to the problem's own."""
    localizations: list[Localization]
    branches: list[Branch]
    groups: dict[int, int]
    """By leaf: which of the input's several trees it belongs to."""

    @classmethod
    def of(cls, tree: RolloutTree) -> TreeEnd:
        groups = {leaf.id: leaf.group for leaf in tree.leaves() if leaf.group is not None}
        return cls(tree.prompt_ids, tree.messages, tree.localizations, tree.branches, groups)


def replay(tree: RolloutTree, ledger: Ledger, completions: Iterable[Completion]) -> dict[int, int]:
    """Add completions, in the order in which they finished, to an empty tree and its ledger;
    returns the leaf of every number."""
    leaves = {}
    for done in completions:
        leaf = tree.add_trajectory(done.at, list(done.steps), done.score, done.end)
        for cost in done.lost:
            ledger.lost(done.anchor, cost)
        enter_replies(ledger, done.replies)
        with ledger.reserve(done.anchor) as reservation:
            reservation.leaf, reservation.cost = leaf, done.cost
        leaves[done.number] = leaf
    return leaves


def enter_replies(ledger: Ledger, replies: Iterable[Reply]) -> None:
    """Record what the policy was asked."""
    for reply in replies:
        for cost in reply.lost:
            ledger.lost(None, cost)
        ledger.asked(reply.cost)


def assemble(
    problem: Problem, n_total: int, completions: Sequence[Completion], end: TreeEnd
) -> RolloutTree:
    """The whole tree, as the worker had it. Its budget is what was spent of `n_total`."""
    tree = RolloutTree(problem.id, len(completions), end.prompt_ids, end.messages)
    ledger = Ledger(n_total)
    replay(tree, ledger, completions)
    assert ledger.spent == len(tree.leaves()) == len(completions), "spends and leaves differ"
    tree.ledger, tree.localizations = ledger.entries, end.localizations
    tree.branches = end.branches
    for leaf, group in end.groups.items():
        tree.nodes[leaf].group = group
    return tree
