"""The dashboard and the alerts ask for what the actors report, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from elpo_ray.rollout.counters import RolloutCounters
from launch.monitoring.dashboard import grafana
from sandbox.supervisor import Sandbox

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "launch" / "monitoring"
NAME = re.compile(r"ray_elpo_(\w+)")


def asked() -> set[str]:
    texts = [(FOLDER / "rules.yaml").read_text(), json.dumps(grafana())]
    return {name for text in texts for name in NAME.findall(text)}


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_one_command_writes_what_prometheus_and_grafana_read(tmp_path: Path) -> None:
    made = tmp_path / "new" / "monitoring"
    done = launch("monitoring", str(made))
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((made / "grafana.json").read_text()) == grafana()
    config = yaml.safe_load((made / "prometheus.yaml").read_text())
    (rules,) = config["rule_files"]
    assert (made / rules).read_bytes() == (FOLDER / "rules.yaml").read_bytes()


@pytest.mark.parametrize("words", [(), ("--help",), ("a", "b")])
def test_monitoring_needs_one_folder(words: tuple[str, ...]) -> None:
    done = launch("monitoring", *words)
    assert (done.returncode, done.stdout) == (2, "") and "monitoring FOLDER" in done.stderr


def test_every_panel_asks_one_data_source_for_something() -> None:
    graphs = [panel for panel in grafana()["panels"] if panel["type"] == "timeseries"]
    assert len(graphs) == len({graph["title"] for graph in graphs}) > 20
    for graph in graphs:
        assert graph["targets"] and all(NAME.search(target["expr"]) for target in graph["targets"])
        sources = [graph["datasource"], *(target["datasource"] for target in graph["targets"])]
        assert all(source["uid"] == "${datasource}" for source in sources)


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    panels = grafana()["panels"]
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels) == len({panel["id"] for panel in panels})


def test_what_is_asked_of_actors_is_what_they_report() -> None:
    sandbox = {name.removeprefix("sandbox_") for name in asked() if name.startswith("sandbox_")}
    assert sandbox and sandbox <= set(Sandbox().gauges())
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
