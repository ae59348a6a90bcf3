"""How the budget of one input becomes a tree: one rule a file, each an async `grow`.

A rule only ever samples completions through `interfaces.Rollout`; it returns when the budget is
spent, and leaves what it found in `rollout.tree.localizations`. What it asks for depends on nothing
but the outcomes of what it asked for before and on `rollout.random`, so that a tree can be taken up
again (`rollout.journal`).

A rule of the user's is named by its dotted path. What else the framework wants to know of it stands
in attributes of the function, all of which may be absent:

* `width`: completions that it keeps under way at once at its start (all of the budget without it);
* `branches = False`: it never continues from inside a completion, which makes tool calls cheaper;
* `shares_budget = True`: it may run under `budget.scope=batch`. It then returns once
  `rollout.enough`, and with a larger budget it first asks for what it asked for with a smaller one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from elpo_ray.config.dotted import check_call, is_path, load_object
from elpo_ray.config.growth import GrowthConfig, GrowthRule
from elpo_ray.growth import (
    bel,
    contrast,
    entropy_branch,
    independent,
    pivot,
    posterior,
    random_branch,
    reset,
)
from elpo_ray.interfaces import Rollout
from elpo_ray.types import InfrastructureError

KEY = "algorithm.growth.rule"

GROWTH: dict[str, Callable[[Rollout, GrowthConfig], Awaitable[None]]] = {
    GrowthRule.bel: bel.grow,
    GrowthRule.posterior: posterior.grow,
    GrowthRule.independent: independent.grow,
    GrowthRule.entropy_branch: entropy_branch.grow,
    GrowthRule.random_branch: random_branch.grow,
    GrowthRule.pivot: pivot.grow,
    GrowthRule.contrast: contrast.grow,
    GrowthRule.reset: reset.grow,
}


async def grow(rollout: Rollout, config: GrowthConfig) -> None:
    """Spend the budget of one input by the configured rule. ValueError, in one line, if a rule of
    the user's fails or leaves rollouts unspent; InfrastructureError passes through."""
    if not is_path(config.rule):
        await GROWTH[config.rule](rollout, config)
        return
    where = f"{KEY}={config.rule!r}"
    try:
        await _own(config.rule)(rollout, config, **config.options)
    except InfrastructureError:
        raise
    except Exception as fault:  # the user's code is a boundary
        raise ValueError(f"{where}: raised {type(fault).__name__}: {fault}; mend it") from fault
    if rollout.remaining and not rollout.enough:
        raise ValueError(
            f"{where}: it returned with {rollout.remaining} rollouts unspent; await "
            "rollout.complete(…) until rollout.remaining is 0"
        )


def check(config: GrowthConfig, *, shared_budget: bool = False) -> None:
    """ValueError if the rule is the user's and cannot be used as configured."""
    if not is_path(config.rule):
        return
    where, rule = f"{KEY}={config.rule!r}", _own(config.rule)
    check_call(where, rule, ("rollout", "config"), config.options)
    if shared_budget and not getattr(rule, "shares_budget", False):
        raise ValueError(
            f"{where}: inputs share the budget (budget.scope=batch), which this rule does not say "
            "it can do; use budget.scope=input, or set shares_budget = True on it"
        )
    width(config)


def branches(config: GrowthConfig) -> bool:
    """Whether the rule may continue from inside a completion that was sampled as no probe."""
    if is_path(config.rule):
        return bool(getattr(_own(config.rule), "branches", True))
    return config.rule != GrowthRule.independent


def width(config: GrowthConfig) -> int:
    """Completions that one input keeps under way at once, at its start: all, unless a rule says
    otherwise."""
    if is_path(config.rule):
        found = getattr(_own(config.rule), "width", config.n_total)
        if not isinstance(found, int) or found < 1:
            raise ValueError(
                f"{KEY}={config.rule!r}: its width={found!r} is no number of completions; set it "
                "to 1 or more, or leave it out"
            )
        return min(found, config.n_total)
    widths = {
        GrowthRule.bel: config.bel.b_max,
        GrowthRule.posterior: posterior.first_roots(config),
        GrowthRule.entropy_branch: config.entropy.initial,
        GrowthRule.random_branch: config.random.trees * config.random.chains,
        GrowthRule.pivot: config.pivot.roots,
        GrowthRule.contrast: config.contrast.bases,
        GrowthRule.reset: config.reset.roots,
    }
    return min(widths.get(GrowthRule(config.rule), config.n_total), config.n_total)


def fair_roots(config: GrowthConfig, *, fixed: bool = True) -> int:
    """How many trajectories from the prompt every input begins with, whatever comes of them: their
    mean success is an unbiased estimate of pass@1. What is sampled later may depend on outcomes; so
    may how many AEPO's monitored start begins with, all but its first. Of a rule of the user's
    it is one. `fixed`: every input spends its own budget (`Rollout.fixed`)."""
    if is_path(config.rule):
        return 1
    fair = {
        GrowthRule.bel: config.bel.b_max,
        GrowthRule.posterior: posterior.first_roots(config) if fixed else config.bel.b_max,
        GrowthRule.independent: config.n_total,
        GrowthRule.entropy_branch: 1 if config.entropy.monitor else config.entropy.initial,
        GrowthRule.random_branch: config.random.trees * config.random.chains,
        GrowthRule.pivot: config.pivot.roots,
        GrowthRule.contrast: config.contrast.bases,
        GrowthRule.reset: config.reset.roots,
    }
    return min(fair[GrowthRule(config.rule)], config.n_total)


def _own(path: str) -> Callable[..., Any]:
    """The user's rule."""
    rule = load_object(KEY, path)
    if not callable(rule):
        raise ValueError(f"{KEY}={path!r}: it is no function")
    own: Callable[..., Any] = rule
    return own
