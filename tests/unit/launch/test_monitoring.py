"""The dashboard and the alerts ask for what the actors report, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from elpo_ray.rollout.counters import RolloutCounters
from launch.monitoring.dashboard import grafana
from sandbox.supervisor import Sandbox

FOLDER = Path(__file__).parents[3] / "launch" / "monitoring"
NAME = re.compile(r"ray_elpo_(\w+)")


def asked() -> set[str]:
    texts = [(FOLDER / "rules.yaml").read_text(), json.dumps(grafana())]
    return {name for text in texts for name in NAME.findall(text)}


def test_the_dashboard_in_the_repository_is_the_generated_one() -> None:
    assert json.loads((FOLDER / "grafana.json").read_text()) == grafana()


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    panels = grafana()["panels"]
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels) == len({panel["id"] for panel in panels})


def test_what_is_asked_of_actors_is_what_they_report() -> None:
    sandbox = {name.removeprefix("sandbox_") for name in asked() if name.startswith("sandbox_")}
    assert sandbox and sandbox <= set(Sandbox().snapshot())
    worker = {name.removeprefix("worker_") for name in asked() if name.startswith("worker_")}
    assert worker and worker <= {*RolloutCounters().values(), "weight_version"}


def test_every_alert_says_what_to_do() -> None:
    (group,) = yaml.safe_load((FOLDER / "rules.yaml").read_text())["groups"]
    for rule in group["rules"]:
        assert rule["annotations"]["summary"] and rule["annotations"]["description"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Prometheus is not installed")
@pytest.mark.parametrize("what", ["rules", "config"])
def test_prometheus_accepts_the_files(what: str) -> None:
    file = "rules.yaml" if what == "rules" else "prometheus.yaml"
    subprocess.run(["promtool", "check", what, file], cwd=FOLDER, check=True)
