"""The doctor on real engines: sound, with weights that are behind, and with another version."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from elpo_ray.cluster.cluster import Cluster
from elpo_ray.cluster.learner import LearnerGroup
from elpo_ray.cluster.rollouts import RolloutGroup
from elpo_ray.config import Config
from elpo_ray.config.compose import composed
from elpo_ray.doctor import __main__ as doctor
from elpo_ray.doctor import engines
from elpo_ray.doctor.catalog import engine_checks
from elpo_ray.doctor.finding import Finding, Status, examine
from elpo_ray.tasks import make_task

pytestmark = pytest.mark.real
PARTS = ["Ray", "DeepSpeed", "vLLM", "vLLM generate", "DeepSpeed step", "weight sync"]


@pytest.fixture(scope="module")
def findings() -> Iterator[dict[str, Finding]]:
    """What the doctor found, and what it says of the same engine and learner "behind": a step of
    the learner has not been published, and "ahead": it has, as a version not asked for."""
    small = doctor.smallest(composed(["+experiment=quickstart"]))
    made: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("learner", "rollouts"):
            patch.setattr(Cluster, name, keeping(getattr(Cluster, name), made, name))
        synced, found = engines._synced, {}

        def and_behind(trees: Any, stats: Any, seconds: float) -> Finding:
            learner, rollouts = made["learner"], made["rollouts"]
            found["behind"] = synced(*another(learner, rollouts, small), 0.0)
            learner.publish(version=2)
            found["ahead"] = synced(*another(learner, rollouts, small), 0.0)
            return synced(trees, stats, seconds)

        patch.setattr(engines, "_synced", and_behind)
        yield {f.name: f for f in examine(engine_checks(small))} | found


def keeping(start: Any, made: dict[str, Any], name: str) -> Any:
    def started(*args: Any, **kwargs: Any) -> Any:
        made[name] = start(*args, **kwargs)
        return made[name]

    return started


def another(learner: LearnerGroup, rollouts: RolloutGroup, config: Config) -> tuple[Any, Any]:
    """Trees of the engine as it is, and what the learner says in a step on them."""
    task = make_task(config.task, config.trainer.seed)
    inputs = [task.train_problem(index) for index in range(engines.INPUTS)]
    trees = engines._whole(rollouts.grow(inputs, 1))
    return trees, learner.update(engines._forest(trees, config))


def test_the_engines_work_together(findings: dict[str, Finding]) -> None:
    assert [name for name in findings if name not in ("behind", "ahead")] == PARTS
    for name in PARTS:
        assert findings[name].status is not Status.FAILURE, findings


def difference(sync: Finding) -> float:
    return float(sync.detail.partition("differ by ")[2].split()[0])


def test_a_lost_sync_is_found_by_log_probs_alone(findings: dict[str, Finding]) -> None:
    sync = findings["behind"]
    assert sync.status is Status.FAILURE and "versions served: [1]" in sync.detail
    assert difference(sync) > 0.1


def test_another_version_is_found_by_its_number_alone(findings: dict[str, Finding]) -> None:
    sync = findings["ahead"]
    assert sync.status is Status.FAILURE and "versions served: [2]" in sync.detail
    assert difference(sync) < engines.MISMATCH
