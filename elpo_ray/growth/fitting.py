"""Beta(a, b) of the chance V that a completion of a recoverable prefix succeeds, from probes.

Which probed prefixes were recoverable is not known, only believed: a prefix counts with the
probability that its search gave it at its end. What is fitted is a mode: the likelihood of all
counted outcomes, given what the tree showed of their prefixes before, times a prior that keeps a
and b near the configured values while little is known.

Invariant: what a step's searches use is fitted to finished steps only and stays the same for the
whole step, so that a tree can be grown again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

from elpo_ray.tree import RolloutTree

Beta = tuple[float, float]
DECAY = 0.9
"""What a step's outcomes weigh is multiplied by this with each later step: V changes as the policy
learns."""
SPREAD = 1.0
"""Standard deviation of log a and log b around the configured values, before any outcome."""
REACH, RESOLUTION = 3.0, 0.25
"""a and b are sought between e^-REACH and e^REACH times the configured values, in steps of
e^RESOLUTION."""


@dataclass(kw_only=True)
class BetaFit:
    """Outcomes of the probes of all finished steps, and what was fitted to them; JSON data."""

    outcomes: dict[str, float] = field(default_factory=dict)
    """Weights of probed anchors by "failures known before,attempts,successes"."""
    fitted: dict[str, Beta] = field(default_factory=dict)
    """By the number of finished steps: what was fitted after them. The last few only."""

    def before(self, step: int, staleness: int, configured: Beta) -> Beta:
        """What the `step`-th step, from 0, is grown with: fitted to the steps that were finished
        when its growth could begin."""
        a, b = self.fitted.get(str(step - staleness), configured)
        return a, b

    def add(self, step: int, trees: Sequence[RolloutTree], configured: Beta) -> None:
        """Count the probes of the trees of the `step`-th finished step, from 1, and fit anew."""
        self.outcomes = {key: DECAY * weight for key, weight in self.outcomes.items()}
        for *counts, weight in probed_anchors(trees):
            key = ",".join(map(str, counts))
            self.outcomes[key] = self.outcomes.get(key, 0.0) + weight
        kept = {key: beta for key, beta in self.fitted.items() if int(key) in (step - 1, step - 2)}
        self.fitted = {**kept, str(step): fit(self.outcomes, configured)}


def probed_anchors(trees: Sequence[RolloutTree]) -> Iterator[tuple[int, int, int, float]]:
    """(failures known before, attempts, successes, probability that the anchor is recoverable) of
    every anchor that a search by evidence probed."""
    for tree in trees:
        for found in tree.localizations:
            if found.posterior is None:
                continue
            known = {one.anchor: one.attempts - one.successes for one in found.posterior.free}
            for anchor in sorted({probe.anchor for probe in found.probes}):
                mine = [probe for probe in found.probes if probe.anchor == anchor]
                attempts = sum(probe.attempts for probe in mine)
                successes = sum(probe.successes for probe in mine)
                if attempts:
                    sound = math.fsum(found.posterior.last[anchor:])
                    yield known.get(anchor, 0), attempts, successes, sound


def fit(outcomes: dict[str, float], configured: Beta) -> Beta:
    """The likeliest (a, b) on a grid around the configured ones."""
    counts = [(tuple(map(int, key.split(","))), weight) for key, weight in outcomes.items()]
    places = [RESOLUTION * i for i in range(-round(REACH / RESOLUTION), 1)]
    places += [-place for place in reversed(places[:-1])]

    def fitness(shift: tuple[float, float]) -> float:
        a, b = (value * math.exp(log) for value, log in zip(configured, shift, strict=True))
        likelihood = math.fsum(
            weight * _log_likelihood(attempts, successes, a, b + known)
            for (known, attempts, successes), weight in counts
        )
        return likelihood - sum(log * log for log in shift) / (2 * SPREAD**2)

    best = max(product(places, places), key=fitness)
    return configured[0] * math.exp(best[0]), configured[1] * math.exp(best[1])


def _log_likelihood(attempts: int, successes: int, a: float, b: float) -> float:
    """log of B(a + s, b + f) / B(a, b): of the outcomes in one order."""
    failures = attempts - successes
    return (
        math.fsum(math.log(a + i) for i in range(successes))
        + math.fsum(math.log(b + i) for i in range(failures))
        - math.fsum(math.log(a + b + i) for i in range(attempts))
    )
