"""The analyses by name, and the job that runs one of them on a rollout worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from elpo_ray.config.measure import AnalysisName, AnalyzeConfig
from elpo_ray.evaluation.analysis import localization, ranking, recovery
from elpo_ray.evaluation.analysis.failures import Record
from elpo_ray.rollout.worker import RolloutWorker, TreeRollout
from elpo_ray.scheduling.jobs import Job, OnComplete

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


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalyzeJob(Job[list[Record]]):
    """Make all records of one problem."""

    config: AnalyzeConfig

    async def run(self, worker: RolloutWorker, on_complete: OnComplete) -> list[Record]:
        name, config = self.config.analysis, self.config
        grows = name is AnalysisName.ranking
        budget = config.algorithm.growth.n_total if grows else config.rollouts
        rollout = TreeRollout(worker, self.problem, 0, budget)
        try:
            await rollout.begin()
            return await EXAMINE[name](rollout, worker.task, self.problem, config)
        finally:
            await rollout.close()
