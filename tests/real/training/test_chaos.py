"""kill -9 of every kind of process in a real run: the run goes on, and nothing of it is lost."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import psutil
import pytest
from omegaconf import OmegaConf
from processes import ended, family

from elpo_ray.dump import read_tree
from elpo_ray.growth.budget import Totals
from tests.real.runs import SMALL, metrics, start, wait_for_steps

pytestmark = [pytest.mark.real, pytest.mark.chaos]
LEARNER = "ray::LearnerActor"
KINDS = {
    "engine": "EngineCore",
    "rollout worker": "ray::RolloutActor",
    "sandbox actor": "ray::SandboxActor",
    "learner": LEARNER,
}
"""What the command line of a process of each kind contains; the run mends each and goes on."""
QUICKSTART = [
    "+experiment=quickstart",
    "trainer.checkpoint_every=1",
    "trainer.background_checkpoints=true",
]
"""The whole one: unlike `SMALL`, its model learns."""
STANDARD_ERROR = 0.03
"""Standard error of a difference in held-out pass@1 between two such runs."""


def processes(run: subprocess.Popen[str], title: str) -> list[int]:
    """Processes of a run whose command line contains `title`."""
    found = []
    for pid in family(run.pid):
        try:
            if title in " ".join(psutil.Process(pid).cmdline()):
                found.append(pid)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def kill(run: subprocess.Popen[str], title: str, within_s: float = 120) -> int | None:
    """kill -9 of one such process, once there is one; None if the run has ended before."""
    deadline = time.monotonic() + within_s
    while not (found := processes(run, title)):
        if run.poll() is not None:
            return None
        assert time.monotonic() < deadline, f"no process {title}"
        time.sleep(0.1)
    victim = random.choice(found)
    os.kill(victim, signal.SIGKILL)
    return victim


def check_steps(folder: Path, steps: int) -> None:
    """Every step is there; every input has exactly N_total leaves, all paid for."""
    config = OmegaConf.load(folder / "config.yaml")
    inputs, n_total = config.trainer.inputs_per_step, config.algorithm.growth.n_total
    assert [row["step"] for row in metrics(folder)] == list(range(1, steps + 1))
    for step in range(1, steps + 1):
        lines = (folder / "trees" / f"step_{step:05d}.jsonl").read_text().splitlines()
        trees = [read_tree(json.loads(line)) for line in lines]
        assert len({tree.task_id for tree in trees}) == len(trees) == inputs
        for tree in trees:
            assert len(tree.leaves()) == tree.budget == n_total == Totals.of(tree.ledger).rollouts
    assert not (folder / "set_aside").exists()


def siege(
    folder: Path,
    cache: Path,
    steps: int,
    kills: list[str],
    *overrides: str,
    calm: float,
    settings: Sequence[str] = SMALL,
) -> tuple[list[int], float]:
    """A run of `steps` steps in which processes of these kinds die: a share `calm` of them about
    one a step, the others while it still mends what died before."""
    name = "siege"
    overrides = (f"trainer.run_name={name}", f"trainer.steps={steps}", *overrides)
    run = start(folder, cache, *overrides, settings=settings)
    seen: set[int] = set()
    wait_for_steps(folder / name, 2, run)  # the first checkpoint is whole
    victims = []
    for done, kind in enumerate(kills, 2):
        if run.poll() is not None:
            break
        if random.random() < calm:
            wait_for_steps(folder / name, min(done, steps - 1), run)
        time.sleep(random.uniform(0, 1.5))
        seen |= family(run.pid)
        victim = kill(run, KINDS[kind])
        if victim is not None:
            victims.append(victim)
    while True:
        seen |= family(run.pid)
        try:
            out, err = run.communicate(timeout=0.5)
            break
        except subprocess.TimeoutExpired:
            continue
    assert run.returncode == 0, out[-4000:] + err[-4000:]
    check_steps(folder / name, steps)
    asyncio.run(ended(seen, within_s=30))
    return victims, metrics(folder / name)[-1]["faults/restarts"]


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param("cluster.colocated=false", marks=pytest.mark.long),
        "cluster.colocated=true",
    ],
)
def test_whatever_dies_every_step_is_made(tmp_path: Path, cache: Path, mode: str) -> None:
    kills = list(KINDS)
    victims, restarts = siege(tmp_path, cache, 12, kills, mode, calm=0.0)
    assert len(victims) == len(kills), "the run was over before all had been killed"
    # one, not two: the worker that is killed may be the one that its lost engine already ended
    assert restarts >= 1, "neither the lost engine nor the lost worker was replaced"


def test_a_learner_that_dies_before_any_checkpoint_ends_the_run_clearly(
    tmp_path: Path, cache: Path
) -> None:
    overrides = ("trainer.run_name=cut", "trainer.steps=200", "trainer.checkpoint_every=0")
    run = start(tmp_path, cache, *overrides, "algorithm=grpo")
    wait_for_steps(tmp_path / "cut", 1, run)
    seen = family(run.pid)
    kill(run, LEARNER)
    out, err = run.communicate(timeout=120)
    assert run.returncode == 1, out[-3000:] + err[-3000:]
    assert "a learner rank died in" in err and "start the run anew" in err
    asyncio.run(ended(seen, within_s=30))


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "mode", ["schedule.staleness=0", "schedule.staleness=1", "cluster.colocated=true"]
)
def test_twenty_kills_in_twenty_steps(tmp_path: Path, cache: Path, mode: str) -> None:
    kills = [random.choice(list(KINDS)) for _ in range(20)]
    victims, _ = siege(tmp_path, cache, 20, kills, mode, calm=0.7)
    assert len(victims) >= 10, "too few processes were killed to say anything"


@pytest.mark.long
@pytest.mark.timeout(5400)
def test_a_run_under_fire_learns_like_one_in_peace(tmp_path: Path, cache: Path) -> None:
    """The whole quickstart: twenty kills move its loss no more than another seed does."""
    runs = {}
    for name, seed in (("peace", 0), ("another", 1)):
        overrides = (f"trainer.run_name={name}", f"trainer.seed={seed}")
        run = start(tmp_path, cache, *overrides, settings=QUICKSTART)
        out, err = run.communicate()
        assert run.returncode == 0, out[-4000:] + err[-4000:]
        runs[name] = tmp_path / name
    kills = [random.choice(list(KINDS)) for _ in range(20)]
    victims, _ = siege(tmp_path, cache, 20, kills, calm=0.9, settings=QUICKSTART)
    assert len(victims) >= 10, "too few processes were killed to say anything"
    runs["siege"] = tmp_path / "siege"
    loss = {name: [row["loss"] for row in metrics(run)] for name, run in runs.items()}
    moved = {name: distance(loss["peace"], loss[name]) for name in ("siege", "another")}
    after = {name: json.loads((run / "summary.json").read_text())["pass_at_1_after"]
             for name, run in runs.items()}  # fmt: skip
    print(json.dumps({"kills": len(victims), "moved": moved, "pass_at_1_after": after}))
    assert moved["siege"] <= 1.5 * moved["another"]
    assert abs(after["siege"] - after["peace"]) <= 3 * STANDARD_ERROR, after


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Mean absolute difference of two curves."""
    return fmean(abs(a - b) for a, b in zip(one, other, strict=True))
