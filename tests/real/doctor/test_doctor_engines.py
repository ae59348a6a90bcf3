"""The doctor on the real engines: sound, and with a sync of weights that does nothing."""

from __future__ import annotations

import pytest

from elpo_ray import doctor
from elpo_ray.cluster import LearnerGroup
from elpo_ray.config.compose import composed
from elpo_ray.doctor.catalog import engine_checks
from elpo_ray.doctor.finding import Finding, Status, examine

pytestmark = pytest.mark.real
PARTS = ["Ray", "DeepSpeed", "vLLM", "vLLM generate", "DeepSpeed step", "weight sync"]


def engines() -> dict[str, Finding]:
    small = doctor.smallest(composed(["+experiment=quickstart"]))
    return {finding.name: finding for finding in examine(engine_checks(small))}


def test_the_engines_work_together() -> None:
    findings = engines()
    assert list(findings) == PARTS
    assert all(f.status is not Status.FAILURE for f in findings.values()), findings


def test_a_lost_sync_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LearnerGroup, "publish", lambda self, version: None)
    sync = engines()["weight sync"]
    assert sync.status is Status.FAILURE and "versions served: [0]" in sync.detail
    differ = float(sync.detail.partition("differ by ")[2].split()[0])
    assert differ > 0.1, "the comparison of log-probs alone must notice it"
