"""The searches that are compared. None was tuned on the bank `harder`."""

from __future__ import annotations

from typing import Any

from elpo_ray.config.growth import (
    BelConfig,
    FreeEvidence,
    GrowthConfig,
    GrowthRule,
    PosteriorConfig,
    Prior,
)

SHIPPED: dict[str, Any] = {"doubt": 0.25, "beta": (0.5, 1.0), "threshold": 0.7}


def bel(**settings: Any) -> GrowthConfig:
    return GrowthConfig(rule=GrowthRule.bel, bel=BelConfig(**settings))


def posterior(**settings: Any) -> GrowthConfig:
    """With the settings of algorithm=elpo_posterior where `settings` says nothing else."""
    return GrowthConfig(rule=GrowthRule.posterior, posterior=PosteriorConfig(**SHIPPED | settings))


NONE, STATE = FreeEvidence.none, FreeEvidence.state
RULES = {
    "bel": bel(),
    "bel, early_stop": bel(early_stop=True),
    "bel, use_tree": bel(use_tree=True),
    "bel, use_tree, early_stop": bel(use_tree=True, early_stop=True),
    "posterior": posterior(),
    "posterior, without doubt": posterior(doubt=0.0, beta=(0.6, 1.0), threshold=0.8),
    "posterior, free by state": posterior(free_evidence=STATE),
    "posterior, nothing free": posterior(free_evidence=NONE),
    "posterior, entropy prior": posterior(prior=Prior.entropy),
    "posterior, uniform prior": posterior(prior=Prior.uniform),
    "posterior, uniform, nothing free": posterior(prior=Prior.uniform, free_evidence=NONE),
    "posterior, no probes": posterior(max_probes=0),
    "posterior, probes without limit": posterior(max_probes=99),
    "posterior, prior shuffled": posterior(),
    "least likely token": posterior(threshold=0.01, free_evidence=NONE, max_probes=0),
}
"""The first one is what the others are compared with. `posterior` is algorithm=elpo_posterior; the
last names the likeliest step of its prior without a look at any completion."""
SHUFFLED = "posterior, prior shuffled"
"""This one is tried on `bank.shuffled`."""
