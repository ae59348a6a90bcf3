"""Heavy tools in actors of their own, and a tool that ends its worker, on real Ray."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from elpo_ray.cluster.rollout_actor import RolloutActor
from elpo_ray.cluster.rollouts import RolloutGroup
from elpo_ray.cluster.tool_actors import RemoteSource, ToolActor
from elpo_ray.cluster.user_code import UserCode
from elpo_ray.config import Config
from elpo_ray.config.model import ModelConfig
from elpo_ray.config.rollout import SandboxConfig
from elpo_ray.config.task import TaskConfig
from elpo_ray.rollout.settings import RolloutSettings
from elpo_ray.rollout.worker import RolloutWorker
from elpo_ray.scheduling.jobs import SetAside
from elpo_ray.scheduling.runner import JobRunner
from elpo_ray.tools import catalog
from elpo_ray.tools.agent import AgentTools
from elpo_ray.tools.caller import Caller
from elpo_ray.tree import RolloutTree
from elpo_ray.types import InfrastructureError, Problem, ToolCall, ToolKind
from tests import fakes
from tests.fakes import FakeChat, FakeTask, ScriptedPolicy, bel, make_config, planted

pytestmark = pytest.mark.real
HEAVY = '''
import os, time

class Index:
    """One object serves all."""

    def __init__(self):
        self.rows = ["tea 3", "cake 5"]
        self.busy = False

    def find(self, query: str) -> str:
        """Search the index.

        Args:
            query: a word
        """
        assert not self.busy, "two calls at once"
        self.busy = True
        time.sleep(0.02)
        self.busy = False
        return f"{os.getpid()} " + ", ".join(row for row in self.rows if query in row)

    def variable(self, name: str) -> str:
        """Read a variable.

        Args:
            name: of the variable
        """
        return os.environ.get(name, "unset")

    def crash(self) -> str:
        """End the process."""
        os._exit(5)


class Counter:
    """One object for each trajectory."""

    def reset(self, start: int = 0) -> str:
        self.count = start
        return f"begin at {start}"

    def add(self, number: int) -> str:
        """Add a number.

        Args:
            number: how much
        """
        self.count += number
        return f"{self.count} in {os.getpid()}" if number == 0 else str(self.count)

    def reward(self) -> float:
        return self.count / 10
'''
PROBLEM = Problem("p", ({"role": "user", "content": "x"},), None, extra={"row": {"start": 2}})


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("heavy")
    (folder / "heavy_tools.py").write_text(HEAVY)
    sys.path.insert(0, str(folder))
    os.environ["NOT_FOR_TOOLS"] = os.environ["FOR_TOOLS"] = "seen"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.cloudpickle.register_pickle_by_value(fakes)
    yield folder
    ray.shutdown()
    sys.path.remove(str(folder))


def agent(folder: Path, *names: str, count: int = 2) -> tuple[AgentTools, list[Any]]:
    task = TaskConfig(
        name="jsonl", tools=[f"heavy_tools:{n}" for n in names], modules=[str(folder)]
    )
    user = UserCode(variables={"FOR_TOOLS": "yes"})
    config = Config(task=task, model=ModelConfig(path="unused"))
    caller = Caller(5.0)
    made, actors = catalog.sources(task, caller), []
    remote: Any = ray.remote(ToolActor)
    for place, source in enumerate(made):
        options = {"num_cpus": 0, "max_concurrency": 1000, "max_restarts": -1}
        actors += [remote.options(**options).remote(config, place, user) for _ in range(count)]
        made[place] = RemoteSource(source, actors[-count:], 60.0)
    ray.get([actor.start.remote() for actor in actors], timeout=120)
    schemas = catalog.joined(task, SandboxConfig(), made)
    return AgentTools(schemas, None, made, caller), actors


async def test_one_object_an_actor_serves_all_one_call_at_a_time(heavy: Path) -> None:
    tools, _ = agent(heavy, "Index")
    await tools.begin(PROBLEM, "tree")
    session = await tools.open(tree="tree")
    call = ToolCall("find", {"query": "tea"})
    results = await asyncio.gather(*(session.call(call) for _ in range(20)))
    assert all(result.text.endswith("tea 3") for result in results), results
    assert len({result.text.split()[0] for result in results}) == 2, "both actors work"
    assert max(result.queue_s for result in results) > 0.05 > max(r.duration_s for r in results) / 2
    seen = [await session.call(ToolCall("variable", {"name": name}))
            for name in ("FOR_TOOLS", "NOT_FOR_TOOLS")]  # fmt: skip
    assert [result.text for result in seen] == ["yes", "unset"]


async def test_an_actor_that_dies_comes_back_and_a_tool_that_kills_it_is_named(heavy: Path) -> None:
    tools, actors = agent(heavy, "Index", count=1)
    await tools.begin(PROBLEM, "tree")
    session = await tools.open(tree="tree")
    ray.kill(actors[0], no_restart=False)
    result = await session.call(ToolCall("find", {"query": "tea"}))
    assert result.kind is ToolKind.OK and result.text.endswith("tea 3")
    with pytest.raises(InfrastructureError, match="tool crash failed 3 times: its actor failed"):
        await session.call(ToolCall("crash", {}))
    assert (await session.call(ToolCall("find", {"query": "cake"}))).text.endswith("cake 5")


async def test_objects_of_trajectories_branch_in_their_actor_and_survive_it(heavy: Path) -> None:
    tools, actors = agent(heavy, "Counter")
    assert await tools.begin(PROBLEM, "tree") == "begin at 2"
    trunk = await tools.open(tree="tree")
    await trunk.call(ToolCall("add", {"number": 3}))
    middle = trunk.state
    await trunk.call(ToolCall("add", {"number": 4}))
    branch = await tools.open(tree="tree", at=middle)
    result = await branch.call(ToolCall("add", {"number": 1}))
    assert (result.text, result.restored_by) == ("6", "fork")
    for actor in actors:
        ray.kill(actor, no_restart=False)
    await asyncio.sleep(0.5)
    assert (await trunk.call(ToolCall("add", {"number": 1}))).text == "10"
    assert await branch.reward() in (0.6, 0.6000000000000001)
    await tools.release("tree")


# --- a tool that ends the worker ------------------------------------------------------------------


def move(move: str) -> str:
    """Make a move.

    Args:
        move: which
    """
    if move == "b" and os.environ.get("ELPO_TEST_POISON"):
        os._exit(7)
    return move


class ToolWorker(RolloutActor):
    """No engine: turns are scripted, tools are real."""

    async def start(self, config: Config, folder: str, sandboxes: list[Any]) -> None:
        os.environ["ELPO_TEST_POISON"] = "1"
        self.engine = None
        self.interpreter: Any = None
        self._tools(config)
        policy = ScriptedPolicy(planted(2, 1), first=1000 * os.getpid())
        settings = RolloutSettings.of(config)
        worker = RolloutWorker(policy, self.tools, FakeChat(), FakeTask(), settings)
        self.runner = JobRunner(worker, 24, lambda: None)


def test_a_tool_that_exits_is_named_and_its_input_is_not_lost_silently(heavy: Path) -> None:
    entry = "tests.real.tools.test_tool_actors:move"
    config = make_config(bel(4), tools=["code_interpreter", entry])
    config.cluster.stuck_s = 20.0
    made: list[Any] = []
    remote: Any = ray.remote(ToolWorker)

    def spawn(number: int, life: int) -> Any:
        made.append(remote.options(num_cpus=0, max_concurrency=1000).remote())
        return made[-1]

    workers = [spawn(0, 0)]
    ray.get(workers[0].start.remote(config, "", []), timeout=120)
    group = RolloutGroup(workers, [], config, "", spawn)
    try:
        began = time.monotonic()
        (result,) = group.grow([FakeTask().train_problem(0)], 0)
        assert isinstance(result, SetAside), result
        assert result.why.endswith("it was running: move"), result.why
        assert group.queue.requeued >= 1 and time.monotonic() - began < 120
    finally:
        group.close()
        for actor in made:
            ray.kill(actor)
    assert not isinstance(result, RolloutTree)
