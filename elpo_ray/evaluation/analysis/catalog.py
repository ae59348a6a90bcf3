"""The analyses by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from elpo_ray.config.measure import AnalysisName, AnalyzeConfig
from elpo_ray.evaluation.analysis import localization, ranking, recovery
from elpo_ray.rollout.worker import RolloutWorker, TreeRollout
from elpo_ray.types import Problem

Record = dict[str, Any]
EXAMINE = {
    AnalysisName.recovery: recovery.examine,
    AnalysisName.ranking: ranking.examine,
    AnalysisName.localization: localization.examine,
}
SUMMARIZE: dict[AnalysisName, Callable[[Sequence[Record]], list[dict[str, Any]]]] = {
    AnalysisName.recovery: recovery.summarize,
    AnalysisName.ranking: ranking.summarize,
    AnalysisName.localization: localization.summarize,
}


async def examine(worker: RolloutWorker, problem: Problem, config: AnalyzeConfig) -> list[Record]:
    """All records of one problem. Raises InfrastructureError."""
    grows = config.analysis is AnalysisName.ranking
    budget = config.algorithm.growth.n_total if grows else config.rollouts
    rollout = TreeRollout(worker, problem, 0, budget)
    try:
        return await EXAMINE[config.analysis](rollout, worker.task, problem, config)
    finally:
        await rollout.close()
