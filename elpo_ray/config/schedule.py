"""How far growth may run ahead of the learner, and whether inputs share the budget of a step."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Annotated

from elpo_ray.config.growth import Trajectories
from elpo_ray.config.rules import PositiveFloat, Section, between

Staleness = Annotated[
    int, between(0, 1, "use 0 (on-policy) or 1 (grow the next step's trees during the update)")
]


@dataclass(kw_only=True)
class ScheduleConfig(Section, key="schedule"):
    """Whether trees grow while the learner updates, or before it does."""

    staleness: Staleness = 0
    """0 = on-policy: the weights of a step grow its trees. 1 = the next step's trees grow while the
    learner updates; the engines take the new weights between two turns."""
    tis_cap: PositiveFloat = 2.0
    """Cap of the importance weights π_old/π_rollout that correct stale tokens, where
    `algorithm.loss.tis_cap` is null and `staleness` is 1."""


class BudgetScope(Enum):
    """What a budget of rollouts belongs to."""

    input = "input"
    """Every input has its own N_total (the paper)."""
    batch = "batch"
    """The step's inputs share: one from which nothing more can be learned gives up what is left."""


@dataclass(kw_only=True)
class BudgetConfig(Section, key="budget"):
    """The rollouts of a step; the N_total of an input is `algorithm.growth.n_total`."""

    scope: BudgetScope = BudgetScope.input
    min: Trajectories | None = None
    """Fewest rollouts that an input gets under scope=batch; null = half of N_total."""
    max: Trajectories | None = None
    """Most rollouts that an input may get under scope=batch; null = twice N_total."""
