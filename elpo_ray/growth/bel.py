"""Binary-search error localization: BEL (Algorithm 1, Eq. 3-5 of arXiv 2602.09598).

Failed trajectories are collected; the one with the largest entropy gain is searched for its first
irrecoverable step by sampling completions from its own prefixes; repeat until the budget is spent.
A step is named critical only on evidence: a search that the budget cuts short reports an interval.

Steps count from 1. A trajectory with K tool steps has its answer turn as step K+1; an anchor m
fixes steps 1..m, tool response m included. The search reads `success`, never the reward; a leaf
without a verdict is neither success nor failure.

Where the paper is silent, this file decides: X_m is rounded half up, K = 0 is never searched, and a
probe cut short by the budget, or by a missing verdict, proves nothing unless one of its completions
succeeds. `use_tree` and `early_stop` go beyond the paper and are off by default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from elpo_ray.config.growth import BelConfig, GrowthConfig
from elpo_ray.growth.common import common_steps, same_tokens
from elpo_ray.growth.independent import sample, together
from elpo_ray.interfaces import Rollout
from elpo_ray.tree import Localization, Probe, RolloutTree
from elpo_ray.types import Step

Begin = Callable[[int, Sequence[int]], tuple[int, Coroutine[Any, Any, Localization]]]
"""(failed leaf, leaves of all trajectories from the prompt so far) -> the most completions that its
search can ask for, and the search."""


async def grow(rollout: Rollout, config: GrowthConfig) -> None:
    """Algorithm 1."""
    bel, tree = config.bel, rollout.tree

    def begin(leaf: int, roots: Sequence[int]) -> tuple[int, Coroutine[Any, Any, Localization]]:
        steps = tree.steps(leaf)
        lo = known_sound(tree, leaf, roots) + 1 if bel.use_tree else 1
        return max_search_cost(steps, bel, lo), search(rollout, leaf, bel, lo)

    await search_failures(rollout, bel, begin)


async def search_failures(
    rollout: Rollout, bel: BelConfig, begin: Begin, most: int | None = None
) -> None:
    """Collect failures and search one of them, again and again (Algorithm 1).

    Concurrent sampling is equivalent to the sequential loop: only what that loop samples in any
    case is sampled early (`sure_roots`), and only where the budget is fixed. What was sampled ahead
    is looked at when the loop comes to it; until then no search knows of it. `most`: completions
    that no search exceeds, if that is known beforehand.
    """
    tree, b_max = rollout.tree, bel.b_max
    ahead: list[int] = []
    roots: list[int] = []

    def left() -> int:
        """Rollouts that the sequential loop has left."""
        return rollout.remaining + len(ahead)

    while left() > 0 and not rollout.enough:
        failures: list[int] = []
        while (missing := b_max - len(failures)) > 0 and left() > 0 and not rollout.enough:
            if not ahead:
                bound = most if rollout.fixed else None
                ahead = await sample(rollout, sure_roots(left(), missing, b_max, bound))
            taken, ahead = ahead[:missing], ahead[missing:]
            failures += [leaf for leaf in taken if outcome(tree, leaf) is False]
            roots += taken
        searchable = [leaf for leaf in failures if num_tool_steps(tree.steps(leaf)) > 0]
        if searchable and left() > 0:
            # max keeps the first of equals; failures are in sampling order
            searched = max(searchable, key=lambda leaf: entropy_gain(tree.steps(leaf), bel))
            cost, search = begin(searched, tuple(roots))
            sure = sure_roots(max(0, left() - cost), b_max, b_max, most) - len(ahead)
            count = max(0, sure) if rollout.fixed else 0
            more, found = await together(sample(rollout, count), search)
            ahead += more
            tree.localizations.append(found)


def sure_roots(left: int, missing: int, b_max: int, most: int | None) -> int:
    """How many of `left` rollouts go to trajectories from the prompt whatever comes of them, if the
    next search waits for `missing` failures, every later one for `b_max`, and none costs more than
    `most`; None: that is not known, so that only those before the next search are sure."""
    sure = 0
    while left > missing:
        sure, left = sure + missing, left - missing
        if most is None or left <= most:
            return sure
        left, missing = left - most, b_max
    return sure + left


async def search(rollout: Rollout, leaf: int, bel: BelConfig, lo: int = 1) -> Localization:
    """Binary search over the anchors of the failed trajectory that ends in `leaf`; the steps before
    `lo` are known to be recoverable.

    [lo, crit] always holds the critical step: every probed anchor below `lo` was recoverable, and
    `crit` is the smallest one found irrecoverable, at first the last candidate. With
    `verify_final` the candidates are 1..K+1 and each of 1..K is probed before it is named;
    without it they are 1..K and Algorithm 1 takes the last one unprobed. A tree that shows all of
    them to be recoverable leaves nothing to name.
    """
    path = rollout.tree.path(leaf)
    steps = rollout.tree.steps(leaf)
    first, crit = candidates(steps, bel)
    probes: list[Probe] = []
    evidence = lo > first
    conclusive = True
    while lo < crit and conclusive and rollout.remaining > 0:
        m = middle(lo, crit, bel)
        wanted = probe_size(steps, m, bel)
        verdicts = await probe(rollout, path[m - 1], m, wanted, bel)
        failures, successes = verdicts.count(False), verdicts.count(True)
        probes.append(Probe(anchor=m, attempts=failures + successes, successes=successes))
        evidence = True
        if successes:
            lo = m + 1
        elif failures == wanted:
            crit = m
        else:
            conclusive = False
    found = lo == crit and evidence
    return Localization(
        leaf=leaf,
        critical=path[crit - 1] if found else None,
        confirmed=found,
        interval=(lo, max(lo, crit)),
        probes=probes,
    )


async def probe(
    rollout: Rollout, node: int, anchor: int, wanted: int, bel: BelConfig
) -> list[bool | None]:
    """Outcomes of at most `wanted` completions of a prefix: all at once, or with `early_stop` one
    after the other until one succeeds."""
    verdicts: list[bool | None] = []
    together = 1 if bel.early_stop else wanted
    while len(verdicts) < wanted and rollout.remaining > 0 and True not in verdicts:
        count = min(together, rollout.remaining)
        leaves = await sample(rollout, count, at=node, anchor=anchor)
        verdicts += [outcome(rollout.tree, leaf) for leaf in leaves]
    return verdicts


def known_sound(tree: RolloutTree, leaf: int, roots: Sequence[int]) -> int:
    """The last tool step of a failed trajectory that one of the successful trajectories in `roots`
    has too, with all steps before it, token for token; 0 without any."""
    steps = tree.steps(leaf)
    return max(
        (
            common_steps(steps, tree.steps(root), same_tokens)
            for root in roots
            if outcome(tree, root)
        ),
        default=0,
    )


def candidates(steps: Sequence[Step], bel: BelConfig) -> tuple[int, int]:
    """(first, last) step that a search may name."""
    return 1, num_tool_steps(steps) + bel.verify_final


def middle(lo: int, crit: int, bel: BelConfig) -> int:
    """The next anchor: Figure 4 halves [lo, crit-1], Algorithm 1 halves [lo, crit]."""
    return (lo + crit - 1) // 2 if bel.verify_final else (lo + crit) // 2


def max_search_cost(steps: Sequence[Step], bel: BelConfig, first: int = 1) -> int:
    """The most completions that a search of a trajectory with these steps, from step `first` on,
    can ask for: the sum of its probe sizes, maximized over what the probes may find."""

    def cost(lo: int, crit: int) -> int:
        if lo >= crit:
            return 0
        m = middle(lo, crit, bel)
        return probe_size(steps, m, bel) + max(cost(m + 1, crit), cost(lo, m))

    return cost(first, candidates(steps, bel)[1])


def probe_size(steps: Sequence[Step], anchor: int, bel: BelConfig) -> int:
    """X_m = X_min + (X_max - X_min) σ(β (H_m - H_root)), rounded half up (Eq. 5)."""
    gain = segment_entropy(steps[anchor], bel) - segment_entropy(steps[0], bel)
    sigmoid = 0.5 * (1 + math.tanh(bel.beta * gain / 2))
    size = math.floor(bel.x_min + (bel.x_max - bel.x_min) * sigmoid + 0.5)
    return min(max(size, bel.x_min), bel.x_max)


def entropy_gain(steps: Sequence[Step], bel: BelConfig) -> float:
    """H_tool(τ) - H_root(τ), in nats (Eq. 4): H_tool is the mean of H_m over m = 1..K, where H_m
    is the entropy of the turn after tool response m (Eq. 3). Needs K > 0."""
    after_tool = [segment_entropy(steps[m], bel) for m in range(1, num_tool_steps(steps) + 1)]
    return math.fsum(after_tool) / len(after_tool) - segment_entropy(steps[0], bel)


def segment_entropy(step: Step, bel: BelConfig) -> float:
    """Mean entropy, in nats, of the first `entropy_tokens` sampled tokens of a turn."""
    entropies = step.turn.entropies
    if bel.entropy_tokens != -1:
        entropies = entropies[: bel.entropy_tokens]
    return math.fsum(entropies) / len(entropies)


def num_tool_steps(steps: Sequence[Step]) -> int:
    """K: the steps with an observation. Every trajectory has one step more, its last turn."""
    return sum(step.result is not None for step in steps)


def outcome(tree: RolloutTree, leaf: int) -> bool | None:
    """Whether a completed trajectory succeeded; None without a verdict."""
    score = tree.nodes[leaf].score
    assert score is not None, f"node {leaf} is not a completed trajectory"
    return score.success if score.graded else None
