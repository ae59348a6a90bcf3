"""How far growth may run ahead of the learner, and who shares the budget of a step."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from elpo_ray.config.rules import require


@dataclass(kw_only=True)
class ScheduleConfig:
    """Growth and learner: in turns, or at the same time."""

    staleness: int = 0
    """0 = on-policy: the weights of a step grow its trees. 1 = the next step's trees grow while the
    learner updates; the engines take the new weights between two turns."""
    tis_cap: float = 2.0
    """Cap of the importance weights π_old/π_rollout that correct stale tokens, where
    `algorithm.loss.tis_cap` is null and `staleness` is 1."""

    def __post_init__(self) -> None:
        require(
            self.staleness in (0, 1),
            "schedule.staleness",
            self.staleness,
            "use 0 (on-policy) or 1 (grow the next step's trees during the update)",
        )
        require(self.tis_cap > 0, "schedule.tis_cap", self.tis_cap, "use a value above 0")


class BudgetScope(Enum):
    """Who owns the rollouts of a step."""

    input = "input"
    """Every input its own N_total (the paper)."""
    batch = "batch"
    """The step's inputs together: one that cannot teach any more hands over what it has left."""


@dataclass(kw_only=True)
class BudgetConfig:
    """The rollouts of a step; N_total an input is `algorithm.growth.n_total`."""

    scope: BudgetScope = BudgetScope.input
    min: int | None = None
    """Fewest rollouts of an input under scope=batch; null = half of N_total."""
    max: int | None = None
    """Most rollouts of an input under scope=batch; null = twice N_total."""

    def __post_init__(self) -> None:
        for key in ("min", "max"):
            value = getattr(self, key)
            require(
                value is None or value >= 2,
                f"budget.{key}",
                value,
                "an advantage needs at least 2 trajectories; use 2 or more, or null",
            )
