"""Rollout workers on Ray over a scripted policy: they pull, die, hang, and are replaced."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fakes
import psutil
import pytest
import ray
from fakes import FakeTask, bel, make_config, make_worker, planted
from processes import ended, eventually

from elpo_ray.cluster.rollout_actor import RolloutActor
from elpo_ray.cluster.rollouts import RolloutGroup
from elpo_ray.config import Config
from elpo_ray.growth.budget import Totals
from elpo_ray.scheduling.jobs import SetAside
from elpo_ray.scheduling.runner import JobRunner
from elpo_ray.tree import RolloutTree
from elpo_ray.types import Fault

pytestmark = [pytest.mark.real, pytest.mark.chaos]
TASK = FakeTask()
N_TOTAL = 16


class ScriptedActor(RolloutActor):
    """No engine: turns are scripted and take a moment. Input p3 kills its process and p5 hangs it
    the first time, where the test asks for that with a file in `folder`."""

    async def start(self, config: Config, folder: str, sandboxes: list[Any]) -> None:
        worker = make_worker(planted(4, 2), config, first=1000 * os.getpid())
        self.engine, self.version = None, 0
        self.runner = JobRunner(worker, 24, lambda: None)
        policy: Any = worker.agent.policy
        scripted, asked = policy.generate, Path(folder)

        async def generate(prefix: Any, sampling: Any) -> Any:
            text = fakes.decode(prefix)
            if text.startswith("Q:go 3|") and (asked / "poison").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            if text.startswith("Q:go 5|") and (asked / "hang").exists():
                (asked / "hang").unlink()
                time.sleep(600)  # the whole process, event loop included
            await asyncio.sleep(0.1)
            return await scripted(prefix, sampling)

        policy.generate = generate

    async def process(self) -> int:
        return os.getpid()

    async def serve(self, version: int) -> None:
        self.version = version

    async def engine_version(self) -> int:
        return self.version


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.cloudpickle.register_pickle_by_value(fakes)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a test asks the shared group's actors for something."""
    return tmp_path_factory.mktemp("asked")


@pytest.fixture(scope="module")
def shared(cluster: None, asked: Path) -> Iterator[RolloutGroup]:
    with started(asked) as rollouts:
        yield rollouts


@pytest.fixture
def group(shared: RolloutGroup) -> RolloutGroup:
    """Two workers that serve the same version, whatever happened in other tests."""
    until(lambda: len(shared.members) == 2, "a worker did not come back", 60)
    publish(shared, 0)
    return shared


@contextmanager
def started(folder: Path) -> Iterator[RolloutGroup]:
    config = make_config(bel(N_TOTAL))
    config.cluster.stuck_s = 10.0
    others = starting_threads()
    made: list[Any] = []
    remote: Any = ray.remote(ScriptedActor)

    def spawn(number: int, life: int) -> Any:
        made.append(remote.options(num_cpus=0, max_concurrency=1000).remote())
        return made[-1]

    workers = [spawn(number, 0) for number in range(2)]
    ray.get([worker.start.remote(config, str(folder), []) for worker in workers], timeout=120)
    rollouts = RolloutGroup(workers, [], config, str(folder), spawn)
    rollouts.bring_up_to_date = lambda version, handles: ray.get(
        [handle.serve.remote(version) for handle in handles]
    )
    yield rollouts
    pids = [pid(handle) for handle in rollouts.members]
    rollouts.close()
    for actor in made:
        ray.kill(actor)
    asyncio.run(ended(pids, 20))
    until(lambda: starting_threads() <= others, "a thread that starts a worker outlived its group")


def until(reached: Callable[[], bool], otherwise: str, seconds: float = 20) -> None:
    asyncio.run(eventually(reached, otherwise, seconds))


def starting_threads() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith("rollout-start")}


def pid(handle: Any) -> int:
    return ray.get(handle.process.remote(), timeout=30)


def publish(group: RolloutGroup, version: int) -> None:
    ray.get([handle.serve.remote(version) for handle in group.members])
    group.version = version


def grow(group: RolloutGroup, count: int, step: int = 0) -> list[Any]:
    return group.grow([TASK.train_problem(i) for i in range(count)], step)


def check(tree: Any, index: int) -> None:
    assert isinstance(tree, RolloutTree) and tree.task_id == f"p{index}"
    assert len(tree.leaves()) == tree.budget == N_TOTAL == Totals.of(tree.ledger).rollouts
    assert all(leaf.score is not None and leaf.score.graded for leaf in tree.leaves())


def test_workers_pull_and_what_dies_goes_on_from_its_last_completion(group: RolloutGroup) -> None:
    publish(group, 7)
    restarts = group.restarts
    stop, killed = threading.Event(), []

    def strike() -> None:
        draw, before = random.Random(0), 0
        while not stop.wait(draw.uniform(0.1, 0.5)) and len(killed) < 4:
            up = group.members
            if len(up) < 2:  # one that has just begun is given time to complete something
                before = group.completed
            elif group.completed > before + 60:
                before = group.completed
                killed.append(pid(draw.choice(up)))
                os.kill(killed[-1], signal.SIGKILL)

    striker = threading.Thread(target=strike)
    striker.start()
    trees = grow(group, 48)
    stop.set()
    striker.join()
    assert killed
    for index, tree in enumerate(trees):
        check(tree, index)
    assert group.completed == 48 * N_TOTAL
    until(
        lambda: len(group.members) == 2 and group.restarts >= restarts + len(killed),
        "a worker did not come back",
        60,
    )
    versions = ray.get([handle.engine_version.remote() for handle in group.members])
    assert versions == [7, 7], "a new worker serves what the others serve"
    assert group.metrics()["faults/restarts"] == restarts + len(killed)


def test_an_input_that_kills_its_worker_is_set_aside(group: RolloutGroup, asked: Path) -> None:
    before = group.metrics()["faults/inputs_set_aside"]
    (asked / "poison").touch()
    trees = grow(group, 6)
    (asked / "poison").unlink()
    assert isinstance(trees[3], SetAside) and "died" in trees[3].why
    for index in (0, 1, 2, 4, 5):
        check(trees[index], index)
    assert group.metrics()["faults/inputs_set_aside"] == before + 1


def test_a_worker_that_hangs_is_replaced(group: RolloutGroup, asked: Path) -> None:
    restarts = group.restarts
    (asked / "hang").touch()
    hung = {pid(handle) for handle in group.members}
    for index, tree in enumerate(grow(group, 8)):
        check(tree, index)
    assert group.restarts == restarts + 1
    assert len(hung & {p for p in hung if psutil.pid_exists(p)}) == 1


def test_a_worker_that_missed_the_weights_is_replaced(group: RolloutGroup) -> None:
    restarts = group.restarts
    ray.get(group.members[0].serve.remote(3))
    group.version = 3
    for index, tree in enumerate(grow(group, 4)):
        check(tree, index)
    until(lambda: len(group.members) == 2 and group.restarts > restarts, "it was not replaced", 60)
    assert group.restarts == restarts + 1
    versions = ray.get([handle.engine_version.remote() for handle in group.members])
    assert versions == [3, 3]


def test_workers_that_die_again_and_again_end_the_run(cluster: None, tmp_path: Path) -> None:
    with started(tmp_path) as group:
        real = group._spawn

        def doomed(number: int, life: int) -> Any:
            actor = real(number, life)
            ray.kill(actor)
            return actor

        group._spawn = doomed
        for handle in group.members:
            os.kill(pid(handle), signal.SIGKILL)
        with pytest.raises(Fault, match="keeps dying"):
            grow(group, 2)


def test_a_worker_that_starts_when_all_ends_is_not_waited_for(
    cluster: None, tmp_path: Path
) -> None:
    """The thread that waits for it would keep the trainer's process from ending."""
    with started(tmp_path) as group:
        before = starting_threads()
        os.kill(pid(group.members[0]), signal.SIGKILL)
        until(lambda: bool(starting_threads() - before), "nobody starts a new worker")


def test_evaluations_are_drawn_while_trees_wait(group: RolloutGroup) -> None:
    problems = TASK.eval_problems(5)
    drawn = group.evaluate(problems, 3, lambda done: None)
    assert sorted((s.problem, s.index) for s in drawn) == sorted(
        (p.id, i) for p in problems for i in range(3)
    )
