"""Rendered, submitted, requeued, resumed and finished by a real Slurm of two nodes."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm import Slurm, missing, slurm

from tests.real.runs import ROOT, SMALL

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.real,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]
STEPS = 4


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    with slurm() as running:
        yield running


def submit(cluster: Slurm, name: str, own: list[str], run: list[str]) -> str:
    """The number of a job rendered and submitted by the one command."""
    said = cluster.run(
        sys.executable, "-m", "launch", "slurm", "--submit", "site=cpu", f"name={name}",
        f"checkout={ROOT}", f"python={sys.executable}", f"scratch={cluster.base}/scratch",
        f"logs={cluster.base}/logs", "memory=", *own,
        "--", *SMALL, f"trainer.run_dir={cluster.base}/runs",
        f"cold_start.cache={cluster.base}/cache", *run,
    )  # fmt: skip
    number = re.search(r"Submitted batch job (\d+)", said)
    assert number is not None, said
    return number[1]


def wait_until(cluster: Slurm, job: str, holds: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        state = cluster.state(job)
        alive = state["JobState"] in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING")
        assert alive and time.monotonic() < deadline, (state, told(cluster), cluster.logs())
        time.sleep(1)


def told(cluster: Slurm) -> str:
    """Everything that jobs wrote."""
    logs = sorted((cluster.base / "logs").rglob("*.log"))
    return "\n".join(f"--- {log}\n{log.read_text(errors='replace')[-3000:]}" for log in logs)


def ended(cluster: Slurm, job: str) -> bool:
    return cluster.state(job)["JobState"] == "COMPLETED"


def steps(run: Path) -> list[int]:
    log = run / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    logged = [json.loads(line)["step"] for line in lines if line.endswith("}")]
    return [step for step in logged if step > 0]


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_run_is_requeued_and_resumes_where_it_stopped(cluster: Slurm, nodes: int) -> None:
    name = f"requeue{nodes}"
    job = submit(
        cluster, name, [f"nodes={nodes}"], [f"trainer.steps={STEPS}", "trainer.checkpoint_every=0"]
    )
    run, logs = cluster.base / "runs" / f"{name}-{job}", cluster.base / "logs" / f"{name}-{job}"
    wait_until(cluster, job, lambda: len(steps(run)) >= 1, 600)
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # as Slurm does before the time limit
    wait_until(cluster, job, lambda: cluster.state(job)["Restarts"] == "1", 120)
    (kept,) = (run / "checkpoints").glob("step_*/state.json")
    reached = json.loads(kept.read_text())["step"]
    assert 1 <= reached < STEPS
    assert not (run / "summary.json").exists()
    wait_until(cluster, job, lambda: cluster.state(job)["JobState"] == "PENDING", 60)
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm waits two minutes
    wait_until(cluster, job, lambda: ended(cluster, job), 600)
    assert steps(run) == list(range(1, STEPS + 1)), "every step once"
    assert json.loads((run / "summary.json").read_text())
    second = (logs / "1" / "n1.log").read_text()
    assert f"resumed {run} after step {reached}" in second
    for restart in ("0", "1"):
        table = (logs / restart / "preflight.txt").read_text()
        assert f"preflight: {nodes} of {nodes} nodes, 0 failures" in table
        assert len(list((logs / restart).glob("n*.log"))) == nodes, "a log for each node"
    if nodes == 2:
        assert "all-reduce, gloo: 2 nodes" in table and "versions: equal on 2 nodes" in table
        assert "On worker node" in (logs / "1" / "n2.log").read_text()
    whole = (cluster.base / "logs" / f"{name}-{job}.log").read_text()
    assert "USR1: asking for a checkpoint" in whole and "ended with code 0" in whole


def test_preflight_ends_a_job_before_anything_is_loaded(cluster: Slurm) -> None:
    model = cluster.base / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (model / name).write_text("{}")
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    job = submit(cluster, "broken", ["nodes=2"], [f"model.path={model}"])
    deadline = time.monotonic() + 200
    while (state := cluster.state(job))["JobState"] in ("PENDING", "RUNNING", "COMPLETING"):
        assert time.monotonic() < deadline, told(cluster)
        time.sleep(1)
    assert (state["JobState"], state["ExitCode"]) == ("FAILED", "1:0"), told(cluster)
    log = (cluster.base / "logs" / f"broken-{job}.log").read_text()
    for node in ("n1", "n2"):
        assert f"failure  {node}, model: " in log and "1 of 1 weight files absent" in log
    assert "download the folder again" in log and "nothing was started" in log
    assert not (cluster.base / "runs" / f"broken-{job}").exists()


def test_an_array_runs_each_seed(cluster: Slurm) -> None:
    job = submit(cluster, "seeds", ["seeds=[3,5]"], ["check_only=true"])
    logs = cluster.base / "logs"
    for task, seed in ((0, 3), (1, 5)):
        wait_until(cluster, f"{job}_{task}", lambda t=task: ended(cluster, f"{job}_{t}"), 200)
        said = (logs / f"seeds-{job}-seed{seed}" / "0").glob("n?.log")
        text = "".join(log.read_text() for log in said)
        assert f"trainer.seed={seed}" in text and f"trainer.run_name=seeds-{job}-seed{seed}" in text
        assert "optimizer steps" in text, "the run's own words"
