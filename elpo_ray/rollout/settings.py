"""The parts of the configuration that a rollout worker reads."""

from __future__ import annotations

from dataclasses import dataclass

from elpo_ray.config import Config
from elpo_ray.config.growth import GrowthConfig
from elpo_ray.config.rollout import SamplingConfig
from elpo_ray.config.schedule import BudgetScope


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSettings:
    """How trees grow and what bounds their episodes."""

    growth: GrowthConfig
    sampling: SamplingConfig
    """How trees are sampled."""
    seed: int
    """The run's; every episode's seed depends on it."""
    fixed_budget: bool
    """Whether every input spends its own N_total, no less and no more."""
    min_rollouts: int
    """Fewest rollouts of an input whose budget is not fixed."""
    retries: int
    """Further attempts at an episode that the infrastructure destroyed."""
    max_context: int
    """Tokens of prompt and episode together."""
    max_turn_tokens: int
    """Tokens of one turn; what the context still holds bounds it too."""
    max_turns: int
    """Assistant turns of an episode."""
    train_turns: tuple[int, ...]
    """The same by training step; the last one holds for all later steps."""
    max_observation_chars: int

    @classmethod
    def of(cls, config: Config) -> RolloutSettings:
        task = config.task
        return cls(
            growth=config.algorithm.growth,
            sampling=config.sampling,
            seed=config.trainer.seed,
            fixed_budget=config.budget.scope is BudgetScope.input,
            min_rollouts=config.allowance[0],
            retries=config.sandbox.retries,
            max_context=config.model.max_context,
            max_turn_tokens=task.max_turn_tokens or config.model.max_context,
            max_turns=task.max_turns,
            train_turns=tuple(map(config.train_turns, range(config.trainer.steps))),
            max_observation_chars=task.max_observation_chars,
        )
