"""Gauges of an actor reach Ray's exporter, and a real Prometheus where one is installed."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from elpo_ray.cluster.gauges import Gauges

pytestmark = pytest.mark.real
FOLDER = Path(__file__).parents[3] / "launch" / "monitoring"
PATIENCE_S = 90.0


class Worker:
    """An actor that reports as the project's actors do."""

    def report(self) -> None:
        self.gauges = Gauges("elpo_worker_")
        self.gauges.set({"tokens": 12.0, "weight_version": 3.0})


@pytest.fixture(scope="module")
def exporter() -> Iterator[str]:
    """Address of the metrics of a cluster whose driver and one actor reported."""
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    Gauges().set({"reward": 0.25, "seconds/grow": 7.0})
    remote: Any = ray.remote(Worker)
    actor = remote.options(name="rollout-0.1").remote()
    ray.get(actor.report.remote())
    (node,) = ray.nodes()
    yield f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
    ray.shutdown()


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


def awaited(look: Any, wanted: Any) -> Any:
    """What `look` returns once `wanted` accepts it."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            seen = look()
        except OSError:
            seen = None
        if (seen is not None and wanted(seen)) or time.monotonic() > deadline:
            return seen
        time.sleep(1)


def test_gauges_are_exported_under_their_names_with_their_actor(exporter: str) -> None:
    names = ("ray_elpo_reward{", "ray_elpo_worker_tokens{")
    text = awaited(
        lambda: read(f"http://{exporter}/metrics"), lambda t: all(name in t for name in names)
    )
    lines = [line for line in text.splitlines() if line.startswith("ray_elpo_")]
    found = {line.partition("{")[0]: line for line in lines}
    assert found["ray_elpo_reward"].endswith(" 0.25")
    assert found["ray_elpo_seconds_grow"].endswith(" 7.0")
    assert 'actor="driver"' in found["ray_elpo_reward"]
    assert 'actor="rollout-0"' in found["ray_elpo_worker_tokens"]
    assert "SessionName=" in found["ray_elpo_reward"], "the dashboard selects runs by it"


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed")
def test_prometheus_scrapes_them_and_knows_the_rules(exporter: str, tmp_path: Path) -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    config["global"]["scrape_interval"] = "1s"
    config["rule_files"] = [str(FOLDER / "rules.yaml")]
    config["scrape_configs"][0] = {"job_name": "ray", "static_configs": [{"targets": [exporter]}]}
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        here = f"127.0.0.1:{probe.getsockname()[1]}"
    server = subprocess.Popen(
        [
            "prometheus", f"--config.file={tmp_path}/prometheus.yaml",
            f"--storage.tsdb.path={tmp_path}/data", f"--web.listen-address={here}",
        ],
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:

        def ask(query: str) -> list[Any]:
            told = read(f"http://{here}/api/v1/query?query={urllib.parse.quote(query)}")
            result: list[Any] = json.loads(told)["data"]["result"]
            return result

        (sample,) = awaited(lambda: ask("ray_elpo_reward"), bool)
        assert sample["value"][1] == "0.25"
        assert ask('ray_elpo_worker_weight_version{actor="rollout-0"}')[0]["value"][1] == "3"
        groups = json.loads(read(f"http://{here}/api/v1/rules"))["data"]["groups"]
        rules = awaited(lambda: groups[0]["rules"], bool)
        assert len(rules) == 8 and not any(rule["state"] == "firing" for rule in rules)
    finally:
        server.terminate()
        server.wait(30)
