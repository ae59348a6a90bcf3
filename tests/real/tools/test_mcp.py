"""Tools of a real MCP server, over stdio and over HTTP."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from elpo_ray.config.rollout import SandboxConfig
from elpo_ray.config.task import TaskConfig
from elpo_ray.tools import catalog
from elpo_ray.tools.agent import AgentSession, AgentTools
from elpo_ray.tools.caller import Caller
from elpo_ray.types import Problem, ToolCall, ToolKind, ToolResult, ToolsLost

SERVER = Path(__file__).with_name("mcp_server.py")
STDIO = f"python {shlex.quote(str(SERVER))}"
PROBLEM = Problem("p", ({"role": "user", "content": "?"},), None)


def agent(
    entry: dict[str, Any], *, timeout_s: float = 60.0, env: tuple[str, ...] = ()
) -> AgentTools:
    task = TaskConfig(name="jsonl", tools=[entry], tool_timeout_s=timeout_s, env=list(env))
    caller = Caller(timeout_s)
    made = catalog.sources(task, caller)
    return AgentTools(catalog.joined(task, SandboxConfig(), made), None, made, caller)


async def opened(tools: AgentTools, at: Any = None) -> AgentSession:
    if at is None:
        await tools.begin(PROBLEM, "tree")
    return await tools.open(tree="tree", at=at)


async def said(session: AgentSession, name: str, **arguments: Any) -> ToolResult:
    return await session.call(ToolCall(name, arguments))


@contextmanager
def http_server() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, str(SERVER), str(port)], stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        process.kill()
        process.wait()


async def test_a_server_over_stdio_is_replayed_where_trajectories_branch(tmp_path: Path) -> None:
    tools = agent({"mcp": STDIO})
    assert list(tools.schemas) == ["add", "fail", "die_once", "die", "sleep", "variables"]
    assert tools.schemas["add"]["parameters"]["required"] == ["amount"]
    session = await opened(tools)
    assert (await said(session, "add", amount=1)).text == "1"
    state = session.state
    assert (await said(session, "add", amount=2)).text == "3"
    failed = await said(session, "fail")
    assert (failed.kind, failed.text) == (ToolKind.ERROR, "Error executing tool fail")
    branch = await opened(tools, at=state)
    first = await said(branch, "add", amount=10)
    assert (first.text, first.restored_by) == ("11", "replay")
    assert (await said(session, "add", amount=1)).text == "4"
    # It dies in the middle of a call: a fault of the machines. The past is replayed, the call run.
    back = await said(session, "die_once", marker=str(tmp_path / "died"))
    assert (back.text, back.restored_by) == ("104", "replay")
    for each in (session, branch):
        await each.close()
    await tools.release("tree")


async def test_a_server_that_always_dies_is_no_failure_of_the_model() -> None:
    tools = agent({"mcp": STDIO, "tools": ["add", "die"]})
    session = await opened(tools)
    with pytest.raises(ToolsLost, match=r"tool die failed 3 times: MCP server python .*lost"):
        await said(session, "die")
    await session.close()
    await tools.release("tree")


async def test_a_call_over_its_time_limit_is_an_observation() -> None:
    tools = agent({"mcp": STDIO})
    session = await opened(tools)
    assert (await said(session, "add", amount=1)).text == "1"
    tools.stateful[0].timeout_s = 0.5  # type: ignore[attr-defined]
    late = await said(session, "sleep", seconds=30.0)
    assert late.kind is ToolKind.TIMEOUT
    assert late.text.startswith("Error: sleep did not return within 0.5 s")
    tools.stateful[0].timeout_s = 60.0  # type: ignore[attr-defined]
    assert (await said(session, "add", amount=1)).text == "2"
    await session.close()
    await tools.release("tree")


async def test_the_server_sees_only_the_variables_that_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SHOP_KEY", "k")
    monkeypatch.setenv("OTHER_SECRET", "s")
    tools = agent({"mcp": STDIO}, env=("SHOP_KEY",))
    session = await opened(tools)
    seen = (await said(session, "variables")).text
    assert "SHOP_KEY" in seen and "PATH" in seen
    assert "OTHER_SECRET" not in seen
    await session.close()
    await tools.release("tree")


async def test_a_server_over_http_and_a_session_that_all_share() -> None:
    with http_server() as url:
        tools = agent({"mcp": url, "tools": ["add"]})
        session = await opened(tools)
        assert (await said(session, "add", amount=2)).text == "2"
        await session.close()
        await tools.release("tree")
        shared = agent({"mcp": url, "tools": ["add"], "stateful": False})
        assert shared.stateful == []
        session = await opened(shared)
        assert (await said(session, "add", amount=1)).text == "3"
    with pytest.raises(ToolsLost, match="MCP server http"):
        await said(session, "add", amount=1)
    await session.close()
    with pytest.raises(ValueError, match=r"tools\[0\]=.*cannot be listed \(MCP server http.*start"):
        agent({"mcp": url})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"mcp": "no_such_program --serve"}, "no program no_such_program; install it or give"),
        ({"mcp": "python 'server.py"}, "no command that a shell would read"),
        (
            {"mcp": "python -c 'import nothing_here'"},
            r"its tools cannot be listed \(.*No module named",
        ),
        ({"mcp": STDIO, "tools": ["ad"]}, "it has no tool ad; its tools: add, fail"),
        ({"mcp": STDIO, "tool": ["add"]}, "no key tool; it has mcp, tools, stateful, headers"),
        ({"mcp": 3}, "mcp must be a text"),
        ({"mcp": "http://x/", "headers": {"A": "Bearer $SHOP_KEY"}}, "headers: 'SHOP_KEY' is no"),
    ],
)
def test_a_server_that_cannot_be_used_is_refused(entry: dict[str, Any], message: str) -> None:
    os.environ.pop("SHOP_KEY", None)
    with pytest.raises(ValueError, match=rf"task\.tools\[0\]=.*: {message}") as caught:
        agent(entry)
    assert "\n" not in str(caught.value)
