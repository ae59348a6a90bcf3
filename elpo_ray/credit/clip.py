"""Error-localized adaptive clipping: which nodes get the looser lower bound, and for which leaves
(Eq. 11).

Only steps of failed leaves get it, never the root. Where the scope is the searched trajectory, a
node that other leaves share has two bounds: the looser one in the searched leaf's own term of the
objective, the usual one in the terms of the others.
"""

from __future__ import annotations

from itertools import accumulate

from elpo_ray.config.algorithm import ClipConfig, ElcScope
from elpo_ray.credit.parts import any_leaf, recoverable
from elpo_ray.tree import Localization, RolloutTree

OWN = (ElcScope.searched_only, ElcScope.posterior)
"""Scopes that loosen the searched leaf's own terms only."""


def clip_low(tree: RolloutTree, config: ClipConfig) -> list[float] | list[list[float]]:
    """1 - ε_low^t, the lower clip bound of a node's agent tokens. Shape: [num_nodes]; with a scope
    in `OWN` [num_leaves, num_nodes], leaves in the order of `tree.leaves()`."""

    def bounds(loose: list[float]) -> list[float]:
        return [1 - (config.eps_low + config.eps_elc * extent) for extent in loose]

    if config.scope in OWN:
        return [bounds(row) for row in own_extents(tree, config.scope)]
    return bounds([float(inside) for inside in elc_region(tree, config.scope)])


def elc_region(tree: RolloutTree, scope: ElcScope) -> list[bool]:
    """Whether a node gets a looser bound for any leaf. Shape: [num_nodes]."""
    inside = [False] * len(tree.nodes)
    match scope:
        case ElcScope.none:
            pass
        case ElcScope.searched_only | ElcScope.posterior:
            for row in own_extents(tree, scope):
                inside = [known or extent > 0 for known, extent in zip(inside, row, strict=True)]
        case ElcScope.critical_subtree:
            critical_nodes = {found.critical for found in tree.localizations if found.confirmed}
            failed = _has_failure(tree)
            for parent, child in tree.edges():
                inside[child] = failed[child] and (child in critical_nodes or inside[parent])
        case ElcScope.first_wrong_all:
            alive, failed = recoverable(tree), _has_failure(tree)
            inside = [False] + [f and not a for f, a in zip(failed[1:], alive[1:], strict=True)]
    return inside


def own_extents(tree: RolloutTree, scope: ElcScope) -> list[list[float]]:
    """What share of ε_elc each leaf's own terms get on each node, from 0 to 1; 0 off its path.
    Shape: [num_leaves, num_nodes]."""
    rows = {leaf.id: [0.0] * len(tree.nodes) for leaf in tree.leaves()}
    for found in tree.localizations:
        path = tree.path(found.leaf)
        if scope is ElcScope.posterior:
            extents = lost_by(found, len(path))
        elif found.confirmed and found.critical is not None:
            critical = path.index(found.critical)
            extents = [float(place >= critical) for place in range(len(path))]
        else:
            continue
        for node, extent in zip(path, extents, strict=True):
            rows[found.leaf][node] = extent
    return list(rows.values())


def lost_by(found: Localization, steps: int) -> list[float]:
    """P(critical step <= t) for the steps t = 1..K+1 of a searched trajectory. A binary search is
    certain of the step that it named, and takes the steps of an open interval for equally likely.
    Shape: [steps]."""
    if found.posterior is not None:
        probabilities = found.posterior.last
    else:
        first, last = found.interval
        inside = [first <= step <= last for step in range(1, steps + 1)]
        probabilities = [here / (last - first + 1) for here in inside]
    return [min(total, 1.0) for total in accumulate(probabilities)]


def _has_failure(tree: RolloutTree) -> list[bool]:
    """Whether a failed leaf lies at or below a node. Shape: [num_nodes]."""
    return any_leaf(tree, lambda score: score.graded and not score.success)
