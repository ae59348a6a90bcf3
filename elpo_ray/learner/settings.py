"""What a learner is told: the configuration it reads, and what an update optimises."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from elpo_ray.config.algorithm import ClipConfig, LossConfig
from elpo_ray.config.learner import LearnerConfig
from elpo_ray.config.model import ModelConfig


class Objective(Enum):
    """What an update optimises."""

    surrogate = "surrogate"
    """The clipped policy-gradient objective."""
    nll = "nll"
    """Negative log-likelihood of the agent tokens: the cold start."""


@dataclass(kw_only=True)
class LearnerSettings:
    """The parts of the configuration that the learner reads."""

    model: ModelConfig = field(default_factory=ModelConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    temperature: float = 1.0
    """Of the rollouts: the surrogate's policy is the distribution that was sampled from."""
