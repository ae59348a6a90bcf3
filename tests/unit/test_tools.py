"""Tool calls in, observations out, over real sandboxes of this host."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from elpo_ray.config import SandboxConfig
from elpo_ray.tools import (
    PooledTools,
    SandboxHost,
    SandboxTools,
    limits_of,
    observation,
)
from elpo_ray.types import InfrastructureError, ToolCall, ToolKind, ToolResult
from sandbox.results import CallResult, Kind, SessionState
from sandbox.supervisor import Sandbox

pytestmark = pytest.mark.asyncio(loop_scope="module")

CONFIG = SandboxConfig(wall_s=1.0, memory_mib=512)


def run(code: str) -> ToolCall:
    return ToolCall("code_interpreter", {"code": code})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sandbox() -> AsyncIterator[Sandbox]:
    async with Sandbox(limits_of(CONFIG)) as made:
        yield made


async def test_a_call_becomes_an_observation(sandbox: Sandbox) -> None:
    session = await SandboxTools(sandbox, CONFIG).open(setup="x = 20")
    result = await session.call(run("print('so')\nx + 1"))
    assert (result.kind, result.text) == (ToolKind.OK, "so\n21")
    assert result.duration_s > 0
    assert (await session.call(run("y = 1"))).text == "[no output]"
    failed = await session.call(run("print('first')\n1 / 0"))
    assert failed.kind is ToolKind.ERROR
    assert failed.text.startswith("first\nTraceback")
    assert failed.text.endswith("ZeroDivisionError: division by zero")
    late = await session.call(run("print('begun')\nwhile True: pass"))
    assert late.kind is ToolKind.TIMEOUT
    assert late.text == (
        "begun\n[timeout: ran for 1 s; the session continues from before this call]"
    )
    await session.close()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (ToolCall("search", {"query": "x"}), "Unknown tool 'search'"),
        (ToolCall("code_interpreter", {}), "Missing argument"),
        (ToolCall("code_interpreter", {"code": 3}), "must be a string of Python code, not int"),
        (ToolCall("code_interpreter", {"code": None}), "not NoneType"),
    ],
)
async def test_malformed_calls_never_reach_the_sandbox(
    sandbox: Sandbox, call: ToolCall, said: str
) -> None:
    session = await SandboxTools(sandbox, CONFIG).open()
    before = sandbox.snapshot()["calls"]
    result = await session.call(call)
    assert result.kind is ToolKind.MALFORMED and said in result.text
    assert sandbox.snapshot()["calls"] == before
    assert session.state == SessionState()
    await session.close()


async def test_states_branch_and_travel(sandbox: Sandbox) -> None:
    tools = SandboxTools(sandbox, CONFIG)
    session = await tools.open(setup="left = [1, 2, 3]")
    await session.call(run("left.pop()"))
    state = pickle.loads(pickle.dumps(session.state))
    await session.call(run("left.clear()"))
    await session.close()
    branch = await tools.open(at=state)
    assert (await branch.call(run("left"))).text == "[1, 2]"
    await branch.close()
    with pytest.raises(ValueError, match="closed"):
        await branch.call(run("left"))


async def test_a_lasting_failure_is_raised_after_the_retries_and_counted(sandbox: Sandbox) -> None:
    tools = SandboxTools(sandbox, CONFIG)
    session = await tools.open()
    await session.call(run("import os\nos.urandom(8)"))
    with pytest.raises(InfrastructureError, match=r"failed 3 times: .*replay diverged"):
        await tools.open(at=session.state)
    assert (tools.calls, tools.failures) == (5, 3)
    tools.check()
    for _ in range(100):
        await session.call(run("1"))
    with pytest.raises(InfrastructureError, match="lost 3 of 105 calls"):
        tools.check()
    await session.close()


async def test_sessions_are_spread_pinned_and_move_when_their_host_dies() -> None:
    sandboxes = [Sandbox(limits_of(CONFIG)) for _ in range(2)]
    hosts = [SandboxHost(made) for made in sandboxes]
    tools = PooledTools(hosts, CONFIG, faults=(ValueError,))
    sessions = [await tools.open(setup=f"x = {number}") for number in range(4)]
    assert [host.metrics()["live_sessions"] for host in hosts] == [2, 2]
    results = await asyncio.gather(*(session.call(run("x += 10\nx")) for session in sessions))
    assert [result.text for result in results] == ["10", "11", "12", "13"]

    await hosts[0].shutdown()
    results = await asyncio.gather(*(session.call(run("x += 1\nx")) for session in sessions))
    assert [(result.kind, result.text) for result in results] == [
        (ToolKind.OK, text) for text in ("11", "12", "13", "14")
    ]
    assert tools.failures == 2
    assert hosts[1].metrics()["live_sessions"] == 4
    for session in sessions:
        await session.close()
    assert hosts[1].metrics()["live_sessions"] == 0
    await hosts[1].shutdown()


async def test_no_host_is_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match="at least one"):
        PooledTools([], CONFIG)


async def test_every_kind_that_the_policy_may_see_is_a_tool_kind() -> None:
    for kind in set(Kind) - {Kind.SANDBOX_FAILURE}:
        result = CallResult(kind=kind, state_kept=False, traceback="why")
        assert isinstance(ToolResult(ToolKind(kind.value), observation(result)), ToolResult)
