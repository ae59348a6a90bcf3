"""A Ray cluster brought up by hand: a head and a worker, joined by the driver and left standing.

The run that joins it is one that had ended elsewhere and is asked for more steps.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real.runs import Story, metrics, train

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]
RAY = Path(sys.executable).with_name("ray")
START_S = 240.0
LOOK = """
import json, ray
from ray.util.state import list_actors
ray.init(logging_level="ERROR")
nodes = [node for node in ray.nodes() if node["Alive"]]
actors = [a.class_name for a in list_actors(filters=[("state", "=", "ALIVE")])]
print(json.dumps([len(nodes), actors]))
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def look(address: str) -> tuple[int, list[str], str]:
    """Living nodes and actors, as another driver sees them; 0 and why, if it cannot."""
    there = os.environ | {"RAY_ADDRESS": address}  # other clusters may run on this machine
    done = subprocess.run(
        [sys.executable, "-c", LOOK], env=there, capture_output=True, text=True, timeout=120
    )
    if done.returncode:
        return 0, [], done.stderr[-2000:]
    nodes, actors = json.loads(done.stdout.splitlines()[-1])
    return nodes, actors, ""


def start(*options: str) -> subprocess.Popen[bytes]:
    """A node in a process group of its own; it ends with its `ray start`."""
    command = [str(RAY), "start", "--block", "--num-cpus=2", "--disable-usage-stats", *options]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True
    )


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a cluster of two nodes on this machine."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    address = f"127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory(prefix="br", dir="/tmp", ignore_cleanup_errors=True) as folder:
        port = address.rpartition(":")[2]
        nodes = [
            start(
                "--head", "--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={folder}",
                f"--dashboard-port={free_port()}",
            )
        ]  # fmt: skip
        try:
            deadline = time.monotonic() + START_S
            while look(address)[0] < 1:
                assert nodes[0].poll() is None and time.monotonic() < deadline, "no head"
            nodes.append(start(f"--address={address}", "--node-ip-address=127.0.0.1"))
            while look(address)[0] < 2:
                assert nodes[1].poll() is None and time.monotonic() < deadline, "no worker"
            yield address
        finally:
            for node in reversed(nodes):
                node.send_signal(signal.SIGTERM)
            for node in nodes:
                try:
                    node.wait(30)
                except subprocess.TimeoutExpired:
                    os.killpg(node.pid, signal.SIGKILL)


def test_a_finished_run_goes_on_in_a_cluster_and_leaves_it_standing(
    address: str, story: Story, cache: Path, tmp_path: Path
) -> None:
    run, steps = tmp_path / "joined", story.steps + 1
    shutil.copytree(story.folder, run)
    more = (f"trainer.resume={run}", f"trainer.steps={steps}", f"cluster.address={address}")
    train(tmp_path, cache, *more)
    assert [row["step"] for row in metrics(run)] == list(range(1, steps + 1))
    assert json.loads((run / "summary.json").read_text())["rollouts"] == 12 * steps
    nodes, actors, fault = look(address)
    assert nodes == 2, f"the driver ended a cluster that is not its own? {fault}"
    assert actors == [], "actors of the run are still there"
