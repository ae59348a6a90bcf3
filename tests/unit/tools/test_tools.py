"""Tool calls in, observations out, over real sandboxes of this host."""

from __future__ import annotations

import asyncio
import pickle
import struct
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio
from fakes import local_tools

from elpo_ray.config.rollout import LastLine, SandboxConfig
from elpo_ray.tools.code_interpreter import printing_last_line
from elpo_ray.tools.interpreter import PooledTools, observation
from elpo_ray.tools.sandbox_host import Opened, SandboxHost, limits_of
from elpo_ray.types import InfrastructureError, ToolCall, ToolKind, ToolResult, ToolsLost
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
    session = await local_tools(sandbox, CONFIG).open(setup="x = 20")
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


class Draws:
    """A host whose every call shows figures."""

    async def open(self, *_: object) -> Opened:
        return Opened("session", "tree", "host")

    async def call(self, *_: object) -> CallResult:
        return CallResult(kind=Kind.OK, value="v", figures=tuple(images(2, 300_000)))

    async def close(self, session_id: str) -> None:
        """Nothing is open."""

    async def release(self, tree: str) -> None:
        """Nothing is kept."""


async def test_figures_are_named_in_the_observation_and_carried_in_bounds() -> None:
    session = await PooledTools([Draws()], CONFIG).open()
    results = [await session.call(run("draw")) for _ in range(3)]
    assert {result.text for result in results} == {"v\n[figure 1: 4 x 3]\n[figure 2: 4 x 3]"}
    carried = [len(result.figures) for result in results]
    assert carried == [2, 1, 0], "those that fit into a MiB"
    failed = CallResult(kind=Kind.ERROR, stderr="E", traceback="T", figures=tuple(images(1)))
    assert observation(failed) == "E\n[figure 1: 4 x 3]\nT"


def images(count: int, size: int = 20) -> list[bytes]:
    """PNG images of 4 x 3 pixels."""
    data = struct.pack(">IIBBBBB", 4, 3, 8, 2, 0, 0, 0), bytes(size), b""
    parts = zip((b"IHDR", b"IDAT", b"IEND"), data, strict=True)
    packed = (struct.pack(">I", len(d)) + name + d + bytes(4) for name, d in parts)
    return [b"\x89PNG\r\n\x1a\n" + b"".join(packed)] * count


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (ToolCall("search", {"query": "x"}), "unknown tool search; use code_interpreter"),
        (ToolCall("code_interpreter", {}), "argument code is missing"),
        (ToolCall("code_interpreter", {"code": 3}), "argument code is missing or no string"),
        (ToolCall("code_interpreter", {"code": None}), "argument code is missing or no string"),
    ],
)
async def test_malformed_calls_never_reach_the_sandbox(
    sandbox: Sandbox, call: ToolCall, said: str
) -> None:
    session = await local_tools(sandbox, CONFIG).open()
    before = sandbox.gauges()["calls"]
    result = await session.call(call)
    assert result.kind is ToolKind.MALFORMED and said in result.text
    assert sandbox.gauges()["calls"] == before
    assert session.state == SessionState()
    await session.close()


async def test_code_that_is_too_long_is_refused_and_forgotten(sandbox: Sandbox) -> None:
    session = await local_tools(sandbox, CONFIG).open(setup="x = 20")
    await session.call(run("x += 1"))
    before = session.state
    refused = await session.call(run("x = '" + "y" * (8 << 20) + "'"))
    assert (refused.kind, refused.text) == (
        ToolKind.ERROR,
        "ValueError: the code is longer than 8 MiB; it was not run",
    )
    assert session.state == before
    assert (await session.call(run("x"))).text == "21"
    await session.close()


async def test_states_branch_and_can_be_pickled(sandbox: Sandbox) -> None:
    tools = local_tools(sandbox, CONFIG)
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


async def test_a_state_that_cannot_be_rebuilt_is_lost_at_once_and_counted(sandbox: Sandbox) -> None:
    tools = local_tools(sandbox, CONFIG)
    session = await tools.open()
    await session.call(run("import os\nos.urandom(8)"))
    elsewhere = replace(session.state, tree="", host="")
    branch = await tools.open(at=elsewhere)
    with pytest.raises(ToolsLost, match=r"failed 1 times: .*replay diverged"):
        await branch.call(run("1"))
    assert (tools.calls, tools.failures, tools.lost) == (2, 1, 1)
    tools.check()
    for _ in range(98):
        await session.call(run("1"))
    tools.lost += 1
    with pytest.raises(InfrastructureError, match="lost 2 of 100 calls for good"):
        tools.check()
    await session.close()


async def test_a_failing_sandbox_is_retried_and_then_the_call_is_lost() -> None:
    sandbox = Sandbox(limits_of(CONFIG))
    tools = local_tools(sandbox, CONFIG, faults=(ValueError,))
    session = await tools.open()
    await sandbox.close()
    with pytest.raises(ToolsLost, match="failed 3 times: ValueError: the sandbox is closed"):
        await session.call(run("1"))
    assert (tools.calls, tools.failures, tools.lost) == (1, 3, 1)


async def test_sessions_are_spread_pinned_and_move_when_their_host_dies() -> None:
    sandboxes = [Sandbox(limits_of(CONFIG)) for _ in range(2)]
    hosts = [SandboxHost(made) for made in sandboxes]
    tools = PooledTools(hosts, CONFIG, faults=(ValueError,))
    sessions = [await tools.open(setup=f"x = {number}") for number in range(4)]
    results = await asyncio.gather(*(session.call(run("x += 10\nx")) for session in sessions))
    assert [result.text for result in results] == ["10", "11", "12", "13"]
    assert [host.metrics()["live_sessions"] for host in hosts] == [2, 2]

    await sandboxes[0].close()
    results = await asyncio.gather(*(session.call(run("x += 1\nx")) for session in sessions))
    assert [(result.kind, result.text) for result in results] == [
        (ToolKind.OK, text) for text in ("11", "12", "13", "14")
    ]
    assert sorted(result.restored_by for result in results) == ["fresh"] * 2 + ["replay"] * 2
    assert (tools.failures, tools.lost) == (2, 0)
    assert hosts[1].metrics()["live_sessions"] == 4
    for session in sessions:
        await session.close()
    assert hosts[1].metrics()["live_sessions"] == 0
    await sandboxes[1].close()


async def test_a_tree_stays_with_its_snapshots_until_it_is_released() -> None:
    sandboxes = [Sandbox(limits_of(CONFIG)) for _ in range(2)]
    hosts = [SandboxHost(made) for made in sandboxes]
    tools = PooledTools(hosts, CONFIG)
    trunk = await tools.open(tree="t")
    await trunk.call(run("x = [1]"))
    state = pickle.loads(pickle.dumps(trunk.state))
    await trunk.call(run("x.append(2)"))
    await trunk.close()
    branches = [await tools.open(at=state, tree="t") for _ in range(5)]
    for number, branch in enumerate(branches):
        result = await branch.call(run(f"x.append('b{number}')\nx"))
        assert (result.text, result.restored_by) == (f"[1, 'b{number}']", "fork")
        await branch.close()
    counts = [host.metrics() for host in hosts]
    assert sorted(count["opened"] for count in counts) == [0, 6]
    assert sum(count["replays"] for count in counts) == 0
    assert sum(count["live_snapshots"] for count in counts) == 7

    await tools.release("t")
    assert sum(host.metrics()["live_snapshots"] for host in hosts) == 0
    late = await tools.open(at=state, tree="t")
    result = await late.call(run("x"))
    assert (result.text, result.restored_by) == ("[1]", "replay")
    for sandbox in sandboxes:
        await sandbox.close()


async def test_stateless_calls_all_start_from_the_setup(sandbox: Sandbox) -> None:
    tools = local_tools(sandbox, SandboxConfig(stateless=True))
    session = await tools.open(setup="x = 1", tree="stateless")
    results = [await session.call(run("x += 1\nopen('f', 'a').write('a')\nx")) for _ in range(3)]
    assert [result.text for result in results] == ["2"] * 3
    assert session.state.entries == ()
    assert sandbox.gauges()["live_snapshots"] <= 1  # the state after the setup
    await session.close()
    await tools.release("stateless")


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        ("x = 1\nx", "x = 1\nprint(x)"),
        ("print(1)\n", "print(1)\n"),
        ("x = 1", "print(x = 1)"),
        ("text\n```python\n2\n```", "print(2)"),
        ("", ""),
    ],
)
async def test_the_last_line_is_wrapped_by_text_if_asked_for(code: str, printed: str) -> None:
    assert printing_last_line(code) == printed


async def test_the_policy_may_see_the_last_line_printed(sandbox: Sandbox) -> None:
    tools = local_tools(sandbox, SandboxConfig(last_line=LastLine.printed))
    session = await tools.open()
    assert (await session.call(run("y = 3\ny"))).text == "3"
    assert (await session.call(run("if y:\n    y"))).kind is ToolKind.ERROR
    await session.close()


async def test_no_host_is_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match="at least one"):
        PooledTools([], CONFIG)


async def test_every_kind_that_the_policy_may_see_is_a_tool_kind() -> None:
    for kind in set(Kind) - {Kind.SANDBOX_FAILURE}:
        result = CallResult(kind=kind, state_kept=False, traceback="why")
        assert isinstance(ToolResult(ToolKind(kind.value), observation(result)), ToolResult)


async def test_a_session_without_branches_forks_once_and_others_have_its_states_rebuilt(
    sandbox: Sandbox,
) -> None:
    tools = local_tools(sandbox, CONFIG)
    session = await tools.open(setup="left = [1, 2, 3]", tree="line", branches=False)
    await session.call(run("left.pop()"))
    forks = sandbox.gauges()["forks"]
    for _ in range(2):
        await session.call(run("left.append(7)"))
    assert sandbox.gauges()["forks"] == forks
    first = session.state
    await session.call(run("left.clear()"))
    branch = await tools.open(at=first, tree="line")
    result = await branch.call(run("left"))
    assert (result.text, result.restored_by) == ("[1, 2, 7, 7]", "replay")
    await tools.release("line")
