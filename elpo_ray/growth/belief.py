"""What completions say about where a failed trajectory went wrong: Bayes' rule over its steps.

A trajectory with K tool steps fails for good at one step c of 1..K+1, its first irrecoverable one
(K+1 is the answer). Anchor m, the prefix of m steps, is sound if m < c. A completion from a sound
anchor succeeds with a chance V drawn from Beta(a, b) for each anchor, one from an unsound anchor
never does. So a success at m rules out all c <= m, and f failures at m have the likelihood
E[(1 - V)^f] = B(a, b + f) / B(a, b) where m is sound, 1 where it is not.

Lists over steps run from step 1, lists over anchors from anchor 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from elpo_ray.config.growth import GrowthConfig, Prior
from elpo_ray.types import Step

FLOOR = 1e-3
"""No step is less suspect than this before the prior is normalized."""
DIGITS = 9
"""Probabilities and entropies that differ less than by rounding in this digit are equal."""


@dataclass(frozen=True, slots=True)
class Belief:
    """A prior over the steps and the completions seen so far."""

    prior: Sequence[float]
    """Shape: [K + 1]."""
    beta: tuple[float, float]
    failures: tuple[int, ...]
    """Failed completions from each anchor. Shape: [K]."""
    sound: int = 0
    """The last anchor from which a completion succeeded; 0 without any."""

    @classmethod
    def of(cls, prior: Sequence[float], beta: tuple[float, float]) -> Belief:
        """The belief before any completion."""
        return cls(prior, beta, (0,) * (len(prior) - 1))

    def seen(self, anchor: int, success: bool) -> Belief:
        """The belief after one more completion from `anchor`."""
        if success:
            return replace(self, sound=max(self.sound, anchor))
        failures = list(self.failures)
        failures[anchor - 1] += 1
        return replace(self, failures=tuple(failures))

    def posterior(self) -> list[float]:
        """P(c) for c = 1..K+1. Shape: [K + 1]."""
        a, b = self.beta
        logs: list[float] = []
        likelihood = 0.0
        for step, prior in enumerate(self.prior, start=1):
            logs.append(math.log(prior) + likelihood if step > self.sound else -math.inf)
            if self.sound < step <= len(self.failures):
                likelihood += log_no_success(self.failures[step - 1], a, b)
        top = max(logs)
        weights = [math.exp(value - top) for value in logs]
        total = math.fsum(weights)
        return [weight / total for weight in weights]

    def best_anchor(self) -> int:
        """The anchor whose next completion is expected to lower the entropy of the posterior most;
        the first one of equals."""
        posterior = self.posterior()
        anchors = range(1, len(self.prior))
        return min(anchors, key=lambda m: round(self._entropy_after(m, posterior), DIGITS))

    def _entropy_after(self, anchor: int, posterior: Sequence[float]) -> float:
        """The posterior's expected entropy, in nats, after one completion from `anchor`."""
        a, b = self.beta
        sound = math.fsum(posterior[anchor:])
        success = sound * a / (a + b + self.failures[anchor - 1])
        after = (1 - success) * entropy(self.seen(anchor, False).posterior())
        if success > 0:
            after += success * entropy(self.seen(anchor, True).posterior())
        return after


def log_no_success(failures: int, a: float, b: float) -> float:
    """log E[(1 - V)^failures] with V from Beta(a, b)."""
    return math.fsum(math.log((b + i) / (a + b + i)) for i in range(failures))


def reaches(probability: float, threshold: float) -> bool:
    """Whether a probability is at least the threshold; rounding does not decide."""
    return round(probability - threshold, DIGITS) >= 0


def entropy(probabilities: Sequence[float]) -> float:
    """Entropy in nats."""
    return -math.fsum(p * math.log(p) for p in probabilities if p > 0)


def prior_over(steps: Sequence[Step], config: GrowthConfig) -> list[float]:
    """How suspect each step of a trajectory is before any completion is seen, as
    `posterior.prior` says. Shape: [len(steps)]; adds up to 1."""
    kind = config.posterior.prior
    if kind is Prior.surprise:
        suspicion = [surprise(step, config.posterior.least_likely) for step in steps]
    elif kind is Prior.entropy:
        suspicion = [first_entropy(step, config.bel.entropy_tokens) for step in steps]
    else:
        suspicion = [1.0] * len(steps)
    floored = [max(value, FLOOR) for value in suspicion]
    total, doubt = math.fsum(floored), config.posterior.doubt
    return [(1 - doubt) * value / total + doubt / len(floored) for value in floored]


def surprise(step: Step, count: int) -> float:
    """1 - mean probability of the `count` least likely sampled tokens of a step; 0 without any."""
    least = sorted(step.turn.logprobs)[:count]
    return 1 - math.fsum(map(math.exp, least)) / len(least) if least else 0.0


def first_entropy(step: Step, count: int) -> float:
    """Mean entropy, in nats, of the first `count` sampled tokens of a step, of all with -1."""
    entropies = step.turn.entropies if count == -1 else step.turn.entropies[:count]
    return math.fsum(entropies) / len(entropies) if entropies else 0.0


def credible_interval(posterior: Sequence[float], mass: float) -> tuple[int, int]:
    """The shortest run of steps, (first, last) from 1, whose probabilities add up to `mass`; of
    equally short ones the likeliest, and the first of those."""
    count = len(posterior)
    for length in range(1, count):
        runs = [(math.fsum(posterior[i : i + length]), -i) for i in range(count - length + 1)]
        total, start = max(runs)
        if reaches(total, mass):
            return 1 - start, length - start
    return 1, count
