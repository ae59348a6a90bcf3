"""How likely a branch of a failed trajectory succeeds, by the place of its prefix (DEEP-GRPO).

A logistic regression σ(w r + b) on r alone, over the newest branchings: r is the prefix's place
over the chain's length, y is 1 if any completion succeeded. It minimises w²/2 plus the sum of the
log losses; b is free.

Invariant: as in `fitting`, a step is grown with what was fitted to finished steps only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from elpo_ray.config.growth import PivotConfig
from elpo_ray.growth.bel import num_tool_steps, outcome
from elpo_ray.growth.pivot import place
from elpo_ray.tree import RolloutTree

Coefficients = tuple[float, float]
ITERATIONS = 100
"""Most steps of Newton's method."""


@dataclass(kw_only=True)
class PivotFit:
    """The newest branchings, and what was fitted to them; JSON data."""

    feedback: list[tuple[float, int]] = field(default_factory=list)
    """(r, y), the oldest first."""
    fitted: dict[str, Coefficients | None] = field(default_factory=dict)
    """By the number of finished steps: what was fitted after them, None as long as too little was
    known. The last few only."""

    def before(self, step: int, staleness: int) -> Coefficients | None:
        """What the `step`-th step, from 0, is grown with."""
        found = self.fitted.get(str(step - staleness))
        return None if found is None else (found[0], found[1])

    def add(self, step: int, trees: Sequence[RolloutTree], config: PivotConfig) -> None:
        """Count the branchings of the trees of the `step`-th finished step, from 1, and fit
        anew."""
        seen = [pair for tree in trees for pair in branchings(tree)]
        self.feedback = [*self.feedback, *seen][-config.window :]
        enough = len(self.feedback) >= config.min_feedback
        both = len({success for _, success in self.feedback}) == 2
        found = fit(self.feedback) if enough and both else None
        kept = {key: old for key, old in self.fitted.items() if int(key) in (step - 1, step - 2)}
        self.fitted = {**kept, str(step): found}


def branchings(tree: RolloutTree) -> Iterator[tuple[float, int]]:
    """(r, y) of the tree's branches of which any completion has a verdict."""
    for branch in tree.branches:
        known = [seen for leaf in branch.leaves if (seen := outcome(tree, leaf)) is not None]
        if known:
            steps = num_tool_steps(tree.steps(branch.parent))
            yield place(branch.anchor, steps), int(any(known))


def fit(feedback: Sequence[tuple[float, int]]) -> Coefficients:
    """(w, b) by Newton's method with halved steps; the objective is convex. Needs both kinds."""
    data = np.asarray(feedback, dtype=np.float64)
    x, y = np.stack([data[:, 0], np.ones(len(data))], axis=1), data[:, 1]
    penalty = np.array([1.0, 0.0])

    def objective(at: np.ndarray) -> float:
        z = x @ at
        return float(np.logaddexp(0, z).sum() - y @ z + at @ (penalty * at) / 2)

    at = np.zeros(2)
    for _ in range(ITERATIONS):
        chance = 0.5 * (1 + np.tanh(x @ at / 2))
        gradient = x.T @ (chance - y) + penalty * at
        curvature = (x * (chance * (1 - chance))[:, None]).T @ x + np.diag(penalty)
        step = np.linalg.solve(curvature + 1e-12 * np.eye(2), gradient)
        size = 1.0
        while objective(at - size * step) > objective(at) and size > 1e-10:
            size /= 2
        at = at - size * step
        if np.abs(size * step).max() < 1e-12:
            break
    return float(at[0]), float(at[1])
