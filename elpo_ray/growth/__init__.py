"""How the budget of one input becomes a tree: one rule a file, each an async `grow`.

A rule only ever samples completions through `interfaces.Rollout`; it returns when the budget is
spent, and leaves what it found in `rollout.tree.localizations`. What it asks for depends on nothing
but the outcomes of what it asked for before and on `rollout.random`, so that a tree can be taken up
again (`rollout.journal`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from elpo_ray.config.growth import GrowthConfig, GrowthRule
from elpo_ray.growth import bel, entropy_branch, independent, posterior, random_branch
from elpo_ray.interfaces import Rollout

GROWTH: dict[GrowthRule, Callable[[Rollout, GrowthConfig], Awaitable[None]]] = {
    GrowthRule.bel: bel.grow,
    GrowthRule.posterior: posterior.grow,
    GrowthRule.independent: independent.grow,
    GrowthRule.entropy_branch: entropy_branch.grow,
    GrowthRule.random_branch: random_branch.grow,
}


def branches(config: GrowthConfig) -> bool:
    """Whether the rule may continue from inside a completion that was sampled as no probe."""
    return config.rule is not GrowthRule.independent


def width(config: GrowthConfig) -> int:
    """Completions that one input keeps under way at once, at its start: all, unless a rule says
    otherwise."""
    widths = {
        GrowthRule.bel: config.bel.b_max,
        GrowthRule.posterior: posterior.first_roots(config),
        GrowthRule.entropy_branch: config.entropy.initial,
        GrowthRule.random_branch: config.random.trees * config.random.chains,
    }
    return min(widths.get(config.rule, config.n_total), config.n_total)


def fair_roots(config: GrowthConfig, *, fixed: bool = True) -> int:
    """How many trajectories from the prompt every input begins with, whatever comes of them: their
    mean success is an unbiased estimate of pass@1. What is sampled later may depend on outcomes; so
    may how many AEPO's monitored start begins with, all but its first. A rule that is not listed
    begins with one. `fixed`: every input spends its own budget (`Rollout.fixed`)."""
    fair = {
        GrowthRule.bel: config.bel.b_max,
        GrowthRule.posterior: posterior.first_roots(config) if fixed else config.bel.b_max,
        GrowthRule.independent: config.n_total,
        GrowthRule.entropy_branch: 1 if config.entropy.monitor else config.entropy.initial,
        GrowthRule.random_branch: config.random.trees * config.random.chains,
    }
    return min(fair.get(config.rule, 1), config.n_total)
