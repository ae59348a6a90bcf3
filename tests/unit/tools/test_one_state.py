"""The code interpreter beside functions and environments: one state, which branches as one."""

from __future__ import annotations

import os

import pytest
from fakes import local_tools

from elpo_ray.config.rollout import SandboxConfig
from elpo_ray.config.task import Branching, TaskConfig
from elpo_ray.tools import catalog
from elpo_ray.tools.agent import AgentTools
from elpo_ray.tools.caller import Caller
from elpo_ray.tools.code_interpreter import SCHEMA
from elpo_ray.tools.interpreter import PooledTools
from elpo_ray.tools.sandbox_host import SandboxHost, limits_of
from elpo_ray.tools.variables import keep_only, named, restored
from elpo_ray.types import Problem, ToolCall
from sandbox.results import CallResult, SandboxFailure
from sandbox.supervisor import Sandbox

CONFIG = SandboxConfig(wall_s=5.0, memory_mib=512)
SHOP = "tests.unit.tools.shop"
PROBLEM = Problem("p", ({"role": "user", "content": "x"},), None, setup="seen = []")


def run(code: str) -> ToolCall:
    return ToolCall("code_interpreter", {"code": code})


def add(item: str) -> ToolCall:
    return ToolCall("add", {"item": item})


@pytest.mark.parametrize("branching", ["auto", "replay"])
async def test_interpreter_and_environment_branch_together(branching: str) -> None:
    entries = [f"{SHOP}:ForkedCart", "code_interpreter", f"{SHOP}:search"]
    task = TaskConfig(name="jsonl", tools=entries, branching=Branching(branching))
    caller = Caller(5.0)
    made = catalog.sources(task, caller)
    schemas = catalog.joined(task, CONFIG, made)
    async with Sandbox(limits_of(CONFIG)) as sandbox:
        tools = AgentTools(schemas, local_tools(sandbox, CONFIG), made, caller)
        await tools.begin(PROBLEM, "tree")
        trunk = await tools.open(setup=PROBLEM.setup, tree="tree")
        await trunk.call(add("tea"))
        await trunk.call(run("seen.append('tea')"))
        middle = trunk.state
        await trunk.call(run("seen.append('cake')"))
        await trunk.call(add("cake"))
        branch = await tools.open(setup=PROBLEM.setup, tree="tree", at=middle)
        assert (await branch.call(run("seen"))).text == "['tea']"
        assert (await branch.call(add("milk"))).text.startswith("2 items")
        assert (await branch.call(ToolCall("search", {"query": "milk"}))).text == "milk 2"
        assert (await trunk.call(run("seen"))).text == "['tea', 'cake']"
        assert '"cake"' in (await trunk.call(ToolCall("look", {}))).text
        assert (await trunk.call(run(7))).kind.value == "malformed"  # type: ignore[arg-type]
        for session in (trunk, branch):
            await session.close()
        await tools.release("tree")


def test_only_named_variables_and_what_a_process_needs_are_kept() -> None:
    given = {"PATH": "/bin", "LC_ALL": "C", "PYTHONPATH": "x", "RAY_AUTH_TOKEN": "ray",
             "HF_HOME": "/hf", "HF_TOKEN": "hub", "WANDB_API_KEY": "w", "AWS_SECRET": "a",
             "TORCH_KEY": "t", "SHOP_URL": "s", "OTHER": "o"}  # fmt: skip
    with restored(given):
        assert named(["SHOP_URL"]) == {"SHOP_URL": "s"}
        with pytest.raises(ValueError, match=r"task.env=\['X', 'OTHER'\]: X not set"):
            named(["X", "OTHER"])
        keep_only({"SHOP_URL": "s", "NEW": "n"})
        assert dict(os.environ) == {
            "PATH": "/bin", "LC_ALL": "C", "PYTHONPATH": "x", "RAY_AUTH_TOKEN": "ray",
            "HF_HOME": "/hf", "SHOP_URL": "s", "NEW": "n",
        }  # fmt: skip
    assert "HOME" in os.environ


class Restarts(SandboxHost):
    """Loses the next call when it is told to."""

    lost = False

    async def call(self, session_id: str, code: str) -> CallResult:
        if self.lost:
            self.lost = False
            raise SandboxFailure("the host was restarted")
        return await super().call(session_id, code)


@pytest.mark.parametrize("with_sources", [False, True])
async def test_a_lone_trajectory_keeps_nothing_for_others_and_outlives_its_session(
    with_sources: bool,
) -> None:
    async with Sandbox(limits_of(CONFIG)) as sandbox:
        host = Restarts(sandbox)
        pool = PooledTools([host], CONFIG)
        tools = AgentTools([SCHEMA], pool, [], Caller(5.0)) if with_sources else pool
        forks = []
        for alone in (False, True):
            before = sandbox.gauges()["forks"]
            await tools.begin(PROBLEM, "tree", alone=alone)
            session = await tools.open(setup="seen = []", tree="tree", branches=False)
            assert (await session.call(run("seen.append(1)\nseen"))).text == "[1]"
            forks.append(sandbox.gauges()["forks"] - before)
            host.lost = True
            again = await session.call(run("seen.append(2)\nseen"))
            assert (again.text, again.restored_by) == ("[1, 2]", "replay" if alone else "fork")
            await session.close()
            await tools.release("tree")
        assert forks[0] > 0 == forks[1]
        assert sandbox.gauges()["live_sessions"] == sandbox.gauges()["live_trees"] == 0
