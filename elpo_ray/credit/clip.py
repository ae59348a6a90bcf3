"""Error-localized adaptive clipping: which nodes get the looser lower bound (Eq. 11).

Only steps of failed leaves get it, never the root; all scopes but `first_wrong_all` go by confirmed
localizations.
"""

from __future__ import annotations

from elpo_ray.config.algorithm import ClipConfig, ElcScope
from elpo_ray.credit.parts import any_leaf, recoverable
from elpo_ray.tree import RolloutTree


def clip_low(tree: RolloutTree, config: ClipConfig) -> list[float]:
    """1 - ε_low^t, the lower clip bound of a node's agent tokens. Shape: [num_nodes]."""
    loose = elc_region(tree, config.scope)
    return [1 - (config.eps_low + config.eps_elc * inside) for inside in loose]


def elc_region(tree: RolloutTree, scope: ElcScope) -> list[bool]:
    """Whether a node belongs to a critical step or its suffix, by `scope`. Shape: [num_nodes]."""
    inside = [False] * len(tree.nodes)
    confirmed = [
        (found.leaf, found.critical)
        for found in tree.localizations
        if found.confirmed and found.critical is not None
    ]
    match scope:
        case ElcScope.none:
            pass
        case ElcScope.searched_only:
            for leaf, critical in confirmed:
                path = tree.path(leaf)
                for i in path[path.index(critical) :]:
                    inside[i] = True
        case ElcScope.critical_subtree:
            critical_nodes = {critical for _, critical in confirmed}
            failed = _has_failure(tree)
            for parent, child in tree.edges():
                inside[child] = failed[child] and (child in critical_nodes or inside[parent])
        case ElcScope.first_wrong_all:
            alive, failed = recoverable(tree), _has_failure(tree)
            inside = [False] + [f and not a for f, a in zip(failed[1:], alive[1:], strict=True)]
    return inside


def _has_failure(tree: RolloutTree) -> list[bool]:
    """Whether a failed leaf lies at or below a node. Shape: [num_nodes]."""
    return any_leaf(tree, lambda score: score.graded and not score.success)
