"""Sandbox actors on Ray: branches stay with their snapshots, and a killed actor costs only time."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import ray
from fakes import FakeChat, FakeTask, ScriptedPolicy, bel, make_config, planted

from elpo_ray.cluster.sandboxes import RemoteHost, SandboxActor
from elpo_ray.config import Config
from elpo_ray.dump import dump_tree
from elpo_ray.rollout.settings import RolloutSettings
from elpo_ray.rollout.worker import RolloutWorker
from elpo_ray.tools.interpreter import PooledTools
from elpo_ray.tree import RolloutTree
from elpo_ray.types import Parsed, ToolCall

pytestmark = pytest.mark.real
TOOL_STEPS, CRITICAL = 5, 3


class CodingChat(FakeChat):
    """A move is code that records it; slow enough to be killed in the middle of."""

    def parse(self, token_ids: Sequence[int]) -> Parsed:
        parsed = super().parse(token_ids)
        if parsed.call is None:
            return parsed
        move = parsed.call.arguments["move"]
        code = f"import time\ntime.sleep(0.05)\nmoves.append({move!r})\nprint(*moves)"
        return Parsed(parsed.text, call=ToolCall("code_interpreter", {"code": code, "move": move}))


class CodingTask(FakeTask):
    def train_problem(self, index: int) -> Any:
        problem = super().train_problem(index)
        return type(problem)(problem.id, problem.messages, None, setup="moves = []")


def configured() -> Config:
    config = make_config(bel(16))
    config.sandbox.preload = type(config.sandbox.preload).none
    return config


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import tests
    yield
    ray.shutdown()


class SlowlyBack(SandboxActor):
    """Takes its time when Ray makes it anew, as on a busy machine."""

    def __init__(self, config: Config) -> None:
        if ray.get_runtime_context().was_current_actor_reconstructed:
            time.sleep(8)
        super().__init__(config)


def actors(config: Config, count: int, kind: type[SandboxActor] = SandboxActor) -> list[Any]:
    remote: Any = ray.remote(kind)
    options = {"num_cpus": 0, "max_concurrency": 1000, "max_restarts": -1}
    made = [remote.options(**options).remote(config) for _ in range(count)]
    ray.get([actor.start.remote() for actor in made])
    return made


def worker_over(handles: list[Any], config: Config) -> RolloutWorker:
    faults = (ray.exceptions.RayError,)
    hosts = [RemoteHost(actor, config) for actor in handles]
    tools = PooledTools(hosts, config.sandbox, faults=faults)
    policy = ScriptedPolicy(planted(TOOL_STEPS, CRITICAL))
    return RolloutWorker(policy, tools, CodingChat(), CodingTask(), RolloutSettings.of(config))


def restored(tree: RolloutTree) -> list[str]:
    nodes = dump_tree(tree)["nodes"]
    return [node["restored_by"] for node in nodes if "restored_by" in node]


def check_observations(tree: RolloutTree) -> None:
    """Every call saw exactly the moves of its own path."""
    for leaf in tree.leaves():
        moves: list[str] = []
        for step in tree.steps(leaf.id):
            if step.call is not None and step.result is not None:
                moves.append(step.call.arguments["move"])
                assert step.observation_text == " ".join(moves)


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.long), 2])
def test_branches_are_forked_where_their_tree_is(cluster: None, count: int) -> None:
    config = configured()
    handles = actors(config, count)
    worker = worker_over(handles, config)
    tree = asyncio.run(worker.grow(worker.task.train_problem(0), 0))
    check_observations(tree)
    assert set(restored(tree)) == {"fresh", "fork"}
    assert any(found.confirmed for found in tree.localizations)
    hosts = ray.get([actor.metrics.remote() for actor in handles])
    seen = {name: sum(host[name] for host in hosts) for name in hosts[0]}
    assert (seen["replays"], seen["live_trees"], seen["live_snapshots"]) == (0, 0, 0)
    assert seen["calls"] == seen["calls_ok"] == len(restored(tree))
    for actor in handles:
        ray.kill(actor)


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_killed_actor_costs_neither_budget_nor_branches(cluster: None, count: int) -> None:
    config = configured()
    handles = actors(config, count, SlowlyBack)
    worker = worker_over(handles, config)

    async def step() -> list[RolloutTree]:
        problems = [worker.task.train_problem(index) for index in range(3)]
        growing = [asyncio.ensure_future(worker.grow(problem, 0)) for problem in problems]
        while worker.counters.completed < 6:  # trees are under way, and have snapshots
            await asyncio.sleep(0.02)
        victim = await handles[0].__ray_call__.remote(lambda _: os.getpid())
        os.kill(victim, signal.SIGKILL)
        return list(await asyncio.gather(*growing))

    trees = asyncio.run(step())
    for tree in trees:
        assert len(tree.leaves()) == tree.budget == 16
        assert all(leaf.score is not None and leaf.score.graded for leaf in tree.leaves())
        check_observations(tree)
    assert "replay" in {how for tree in trees for how in restored(tree)}
    tools = worker.agent.tools
    assert isinstance(tools, PooledTools) and tools.failures > 0 and tools.lost == 0
    tools.check()
    for actor in handles:
        ray.kill(actor)
