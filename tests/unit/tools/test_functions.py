"""Functions and environment classes of a user's as tools."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import pytest

from elpo_ray.config.rollout import SandboxConfig
from elpo_ray.config.task import Branching, TaskConfig
from elpo_ray.tools import catalog
from elpo_ray.tools.agent import AgentSession, AgentTools
from elpo_ray.tools.caller import Caller, RunningTools
from elpo_ray.types import InfrastructureError, Problem, ToolCall, ToolKind, ToolResult, ToolsLost
from tests.unit.tools import shop

PROBLEM = Problem("p1", ({"role": "user", "content": "buy"},), None, extra={"row": {"budget": 9}})


def agent(*tools: str, timeout_s: float = 5.0, **settings: Any) -> AgentTools:
    """The tools of a task without the code interpreter; names are those of `shop`."""
    entries = [f"tests.unit.tools.shop:{name}" for name in tools]
    task = TaskConfig(name="jsonl", tools=entries, tool_timeout_s=timeout_s, **settings)
    caller = Caller(timeout_s)
    made = catalog.sources(task, caller)
    return AgentTools(catalog.joined(task, SandboxConfig(), made), None, made, caller)


async def opened(tools: AgentTools, *, branches: bool = True, at: Any = None) -> AgentSession:
    if at is None:
        await tools.begin(PROBLEM, "tree")
    return await tools.open(tree="tree", branches=branches, at=at)


async def said(session: AgentSession, name: str, **arguments: Any) -> ToolResult:
    return await session.call(ToolCall(name, arguments))


@pytest.mark.parametrize(
    ("name", "arguments", "kind", "text"),
    [
        ("search", {"query": "ea"}, "ok", "tea 3"),
        ("slowly", {"seconds": 0.0}, "ok", '{"waited": 0.0}'),
        ("misbehave", {"how": "raise"}, "error", "Error: KeyError: 'no such item'"),
        ("misbehave", {"how": "exit"}, "error", "Error: SystemExit: 3"),
        ("misbehave", {"how": "interrupt"}, "error", "Error: KeyboardInterrupt"),
        ("misbehave", {"how": "empty"}, "error", "Error: RuntimeError"),
        ("misbehave", {"how": "print"}, "ok", "print"),
        ("misbehave", {"how": "fork"}, "ok", "the parent of 0"),
        ("misbehave", {"how": "child exits"}, "ok", "the parent of 4"),
        ("leave", {}, "error", "Error: SystemExit: 3"),
        ("flaky", {}, "ok", "null"),
        ("flaky", {"value": "\ud800é"}, "ok", "\\ud800é"),
        ("flaky", {"value": {"a": [1, None]}}, "ok", '{"a": [1, null]}'),
        ("add", {}, "malformed", "Malformed tool call: unknown tool add; use search, slowly"),
    ],
)
async def test_what_a_call_comes_to(
    name: str, arguments: dict[str, Any], kind: str, text: str
) -> None:
    session = await opened(agent("search", "slowly", "misbehave", "leave", "flaky"))
    result = await said(session, name, **arguments)
    assert (result.kind.value, result.text[: len(text)]) == (kind, text)


async def test_ten_megabytes_are_cut_at_once() -> None:
    session = await opened(agent("big"))
    result = await said(session, "big", size=1_500_000)
    assert result.kind is ToolKind.OK and len(result.text) < 70_000
    assert result.text.startswith("[0, 1,") and result.text.endswith("1499999]")
    assert "characters left out" in result.text


@pytest.mark.parametrize(("tool", "calls"), [("sleep", 20), ("slowly", 20), ("spin", 2)])
async def test_a_call_that_blocks_costs_its_time_limit_and_no_other_waits(
    tool: str, calls: int
) -> None:
    tools = agent(tool, "search", timeout_s=0.3)
    session = await opened(tools)
    arguments = {} if tool == "spin" else {"seconds": 1.5}
    began = time.perf_counter()
    blocked = asyncio.gather(*(said(session, tool, **arguments) for _ in range(calls)))
    await asyncio.sleep(0.05)
    assert (await said(session, "search", query="tea")).text == "tea 3"
    for result in await blocked:
        assert result.kind is ToolKind.TIMEOUT
        assert result.text == f"Error: {tool} did not return within 0.3 s"
    assert time.perf_counter() - began < 1.4
    assert tools.caller.timeouts == calls
    if tool == "sleep":
        assert tools.caller.abandoned == calls
    for _ in range(100):
        await asyncio.sleep(0.05)
        if not tools.caller.abandoned:
            break
    assert tools.caller.abandoned == 0, "threads end, also one that spins"
    assert (await said(session, "search", query="tea")).text == "tea 3"


async def test_threads_grow_with_the_calls_under_way_and_serve_again() -> None:
    session = await opened(agent("sleep"))
    before, began = threading.active_count(), time.perf_counter()
    for _ in range(3):
        await asyncio.gather(*(said(session, "sleep", seconds=0.05) for _ in range(100)))
    assert time.perf_counter() - began < 2
    assert threading.active_count() - before <= 100


async def test_infrastructure_errors_are_retried_and_never_scored() -> None:
    tools = agent("flaky")
    session = await opened(tools)
    shop.failures[:] = ["busy", "busy"]
    assert (await said(session, "flaky", value="7")).text == "7"
    shop.failures[:] = ["busy"] * 3
    with pytest.raises(ToolsLost, match="tool flaky failed 3 times: busy"):
        await said(session, "flaky")
    assert (tools.calls, tools.lost) == (2, 1)


async def test_too_many_lost_calls_end_the_run_and_name_the_tool() -> None:
    tools = agent("flaky")
    tools.calls, tools.lost = 99, 1
    session = await opened(tools)
    shop.failures[:] = ["busy"] * 3
    with pytest.raises(ToolsLost):
        await said(session, "flaky")
    with pytest.raises(InfrastructureError, match=r"2 of 100 tool calls .*tool flaky failed 3"):
        tools.check()


async def test_names_of_running_tools_outlive_the_process(tmp_path: Path) -> None:
    file = tmp_path / "running"
    child = os.fork()
    if child == 0:

        async def run() -> None:
            caller = Caller(5.0, RunningTools(file))
            waiting = asyncio.ensure_future(caller.call("wait", time.sleep, {}))
            await asyncio.sleep(0)
            await caller.call("boom", lambda: os._exit(9), {})
            await waiting

        try:
            asyncio.run(run())
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 9
    assert RunningTools.read(file).startswith("boom")
    assert RunningTools.read(tmp_path / "none") == ""


# --- environments ---------------------------------------------------------------------------------


async def test_the_object_is_the_state_and_its_reset_ends_the_prompt() -> None:
    tools = agent("Cart", "search")
    assert await tools.begin(PROBLEM, "tree") == "You have 9."
    session = await tools.open(tree="tree")
    assert (await said(session, "add", item="tea", count=2)).text == "2 items, 3 left"
    assert (await said(session, "add", item="rat")).text == "Error: ValueError: no rat"
    assert await session.reward() == 2.0
    assert await (await tools.open(tree="tree")).reward() == 0.0
    await session.close()
    await tools.release("tree")


COPIES = [("ForkedCart", "auto"), ("ForkedCart", "fork"), ("ForkedCart", "deepcopy"),
          ("Cart", "auto"), ("LockedCart", "auto"), ("Cart", "replay")]  # fmt: skip


@pytest.mark.parametrize(("name", "branching"), COPIES)
async def test_branches_start_where_their_prefix_ends(name: str, branching: str) -> None:
    tools = agent(name, branching=Branching(branching))
    copied = branching != "replay" and name != "LockedCart"
    trunk = await opened(tools)
    await said(trunk, "add", item="tea")
    middle = trunk.state
    await said(trunk, "add", item="milk")
    branch = await opened(tools, at=middle)
    result = await said(branch, "add", item="cake")
    assert result.text == "2 items, 1 left"
    assert result.restored_by == ("fork" if copied else "replay")
    again = await opened(tools, at=branch.state)
    assert (await said(again, "look")).text == '{"items": ["tea", "cake"], "spoilt": false}'
    assert (await said(trunk, "look")).text == '{"items": ["tea", "milk"], "spoilt": false}'
    for session in (trunk, branch, again):
        await session.close()
    await tools.release("tree")


async def test_what_cannot_be_copied_is_said_once_and_replayed() -> None:
    tools = agent("LockedCart")
    session = await opened(tools)
    for _ in range(3):
        await said(session, "add", item="tea")
    (note,) = tools.caller.take_notes()
    assert "LockedCart" in note and "cannot be copied" in note and "lock" in note


async def test_copies_are_made_only_where_trajectories_branch_and_all_are_closed() -> None:
    shop.ForkedCart.forks = shop.ForkedCart.made = shop.ForkedCart.closed = 0
    tools = agent("ForkedCart")
    session = await opened(tools, branches=False)
    for _ in range(3):
        await said(session, "add", item="tea")
    assert (shop.ForkedCart.forks, shop.ForkedCart.made) == (0, 1)
    await session.close()
    await tools.release("tree")
    session = await opened(tools)
    for _ in range(3):
        await said(session, "add", item="tea")
    assert shop.ForkedCart.forks == 4, "the reset object, and one after each call"
    await session.close()
    await tools.release("tree")
    assert shop.ForkedCart.closed == shop.ForkedCart.made


@pytest.mark.parametrize("branches", [True, False])
async def test_an_object_whose_call_was_lost_is_not_used_again(branches: bool) -> None:
    tools = agent("Cart", timeout_s=0.3)
    session = await opened(tools, branches=branches)
    await said(session, "add", item="tea")
    result = await said(session, "wait", seconds=0.6)
    assert result.kind is ToolKind.TIMEOUT and "the state is the one before" in result.text
    assert (await said(session, "look")).text == '{"items": ["tea"], "spoilt": false}'
    assert len(session.state.sources[0].log) == 2


async def test_a_replay_that_comes_to_another_result_is_a_fault_of_the_tool() -> None:
    tools = agent("Dice")
    session = await opened(tools)
    await said(session, "roll")
    branch = await opened(tools, at=session.state)
    with pytest.raises(ToolsLost, match=r"roll of .*Dice is not deterministic"):
        await said(branch, "roll")
    assert tools.lost == 1


async def test_a_state_is_small_and_good_on_another_worker() -> None:
    import pickle

    session = await opened(agent("Cart"))
    for _ in range(16):
        await said(session, "add", item="tea")
    packed = pickle.dumps(session.state)
    assert len(packed) < 2500
    elsewhere = agent("Cart")
    await elsewhere.begin(PROBLEM, "tree")
    branch = await elsewhere.open(tree="tree", at=pickle.loads(packed))
    result = await said(branch, "add", item="tea")
    assert result.text.startswith("17 items") and result.restored_by == "replay"
    again = await elsewhere.open(tree="tree", at=pickle.loads(packed))
    assert (await said(again, "add", item="tea")).restored_by == "fork", "the replay is kept"


async def test_rewards_that_fail_are_delivered_as_exceptions() -> None:
    tools = agent("Cart")
    shop_reward = shop.Cart.reward
    try:
        shop.Cart.reward = lambda self: 1 / 0  # type: ignore[method-assign, assignment]
        session = await opened(tools)
        assert isinstance(await session.reward(), ZeroDivisionError)
    finally:
        shop.Cart.reward = shop_reward  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("Picky", {"level": -1}, "Picky'.*reset raised OSError: no such level on problem p1"),
        ("Picky", {"a": 1}, "Picky'.*reset wants level, which problem p1 does not have"),
        ("Broken", {}, "Broken'.*reset raised RuntimeError: SystemExit: 1"),
    ],
)
async def test_a_reset_that_fails_is_the_users_mistake(
    name: str, row: dict[str, Any], message: str
) -> None:
    problem = Problem("p1", PROBLEM.messages, None, extra={"row": row})
    with pytest.raises(ValueError, match=message):
        await agent(name).begin(problem, "tree")


# --- what is refused ------------------------------------------------------------------------------


class Item: ...


def no_docstring(query: str) -> str:
    return query


def no_args(query: str) -> str:
    """Search."""
    return query


def no_type(query) -> str:  # type: ignore[no-untyped-def]
    """Search.

    Args:
        query: words
    """
    return str(query)


def own_type(item: Item) -> str:
    """Search.

    Args:
        item: what
    """
    return str(item)


def hidden_type(items: list[Item | None]) -> str:
    """Search.

    Args:
        items: what
    """
    return str(items)


def bytes_type(data: dict[int, str]) -> str:
    """Search.

    Args:
        data: what
    """
    return str(data)


def variadic(*words: str) -> str:
    """Search.

    Args:
        words: what
    """
    return str(words)


def positional(word: str, /) -> str:
    """Search.

    Args:
        word: what
    """
    return word


def unknown_type(word: Nowhere) -> str:  # type: ignore[name-defined]  # noqa: F821
    """Search.

    Args:
        word: what
    """
    return str(word)


def search(query: str) -> str:
    """Another one.

    Args:
        query: words
    """
    return query


class Empty:
    def reset(self) -> None: ...


class Wants:
    def __init__(self, path: str) -> None: ...

    def go(self) -> None:
        """Go on."""


class Undocumented:
    def go(self) -> None: ...


def several() -> Iterator[str]:
    """Say several things."""
    yield "one"


async def later() -> AsyncIterator[str]:
    """Say it later."""
    yield "one"


def typed_line(word: str) -> str:
    """Repeat a word.

    Args:
        word (str): what to repeat
    """
    return word


class Tools:
    """Methods of every kind, and attributes that are none."""

    number = 3
    length = len

    @property
    def now(self) -> int:
        return 1

    @cached_property
    def once(self) -> int:
        return 1

    def go(self) -> None:
        """Go on."""

    @lru_cache  # noqa: B019
    def remembered(self) -> None:
        """Go on."""

    @classmethod
    def made_by_class(cls) -> None:
        """Go on."""

    @staticmethod
    def made_by_nobody() -> None:
        """Go on."""

    def _hidden(self, what) -> None: ...  # type: ignore[no-untyped-def]


class Selfless:
    def go() -> None:  # type: ignore[misc]
        """Go on."""


class ResetValue(Tools):
    reset = 3


class ResetSelfless(Tools):
    def reset() -> None: ...  # type: ignore[misc]


class ResetByPlace(Tools):
    def reset(self, budget: int, /) -> None: ...


class RewardValue(Tools):
    @property
    def reward(self) -> float:
        return 1.0


class RewardAsks(Tools):
    def reward(self, problem: Problem) -> float:
        return 1.0


class ForkAsks(Tools):
    def fork(self, depth: int) -> None: ...


class CloseAsks(Tools):
    def close(self, why: str) -> None: ...


whole = int
part = partial(typed_line, word="a")
nothing = 7
anonymous: Callable[[str], str] = lambda query: query  # noqa: E731


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("no_docstring", "no_docstring': tool no_docstring has no docstring"),
        ("no_args", "no_args': tool no_args: its docstring has no line for query"),
        ("no_type", "parameter query has no type"),
        ("own_type", "parameter item has type Item, which JSON does not have"),
        ("hidden_type", "parameter items has type Item"),
        ("bytes_type", r"parameter data has type dict\[int, str\]"),
        ("variadic", r"takes \*words"),
        ("positional", "parameter word cannot be given by name"),
        ("unknown_type", "type hints cannot be read"),
        ("anonymous", "has no usable name"),
        ("Empty", "class Empty has no tool"),
        ("Wants", r"Wants\(\) asks for arguments"),
        ("Undocumented", "tool go has no docstring"),
        ("part", "tool partial has no usable name; use a function defined with def"),
        ("several", "tool several yields; collect what it yields"),
        ("later", "tool later yields"),
        (
            "typed_line",
            "has no line for word; add `word: what it is` under Args:, without the type",
        ),
        ("Tools.go", "tool go is a method; name its class"),
        ("whole", "tool conjugate: its parameters cannot be read"),
        ("Selfless", "tool go: its parameters cannot be read .*a method with self first"),
        ("ResetValue", "ResetValue.reset is int; write a method"),
        ("ResetSelfless", "ResetSelfless.reset: its parameters cannot be read"),
        ("ResetByPlace", "ResetByPlace.reset: budget cannot be given by name"),
        ("RewardValue", "RewardValue.reward is property; write a method"),
        ("RewardAsks", "RewardAsks.reward asks for problem, but is called without arguments"),
        ("ForkAsks", "ForkAsks.fork asks for depth"),
        ("CloseAsks", "CloseAsks.close asks for why"),
        ("nothing", "it is int; a tool is a function, or a class"),
        ("nowhere", "has no nowhere"),
    ],
)
def test_what_makes_no_tool_is_refused_in_one_line(tools: str, message: str) -> None:
    task = TaskConfig(name="jsonl", tools=[f"tests.unit.tools.test_functions:{tools}"])
    with pytest.raises(ValueError, match=message) as raised:
        catalog.schemas(task, SandboxConfig())
    assert "\n" not in str(raised.value) and str(raised.value).startswith("task.tools[0]=")


def test_only_methods_are_tools() -> None:
    task = TaskConfig(name="jsonl", tools=["tests.unit.tools.test_functions:Tools"])
    names = [schema["function"]["name"] for schema in catalog.schemas(task, SandboxConfig())]
    assert names == ["go", "made_by_class", "made_by_nobody", "remembered"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["tests.unit.tools.shop:search", "tests.unit.tools.test_functions:search"],
         r"task.tools\[1\].*has a tool named search too"),
        (["tests.unit.tools.shop:Cart", "tests.unit.tools.shop:ForkedCart"], "both have a reward"),
        (["interpreter"], "use code_interpreter or module:attribute"),
        ([{"telephone": "x"}], "no ready-made tool is called telephone"),
        (["no_such_module_at_all:x"], "there is no module no_such_module_at_all"),
    ],
)  # fmt: skip
def test_lists_that_make_no_tools_are_refused(entries: list[Any], message: str) -> None:
    task = TaskConfig(name="jsonl", tools=entries)
    with pytest.raises(ValueError, match=message):
        catalog.schemas(task, SandboxConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tools": [3]}, r"task.tools=\[3\]"),
        ({"tool_actors": {"shop:Search": 2}}, "shop:Search is not in task.tools"),
        ({"tools": ["a:b"], "tool_actors": {"a:b": 0}}, "a:b needs 1 actor"),
        ({"env": ["KEY=1"]}, "give names of environment variables"),
        ({"name": "countdown", "tools": []}, "task countdown is played with code_interpreter"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskConfig(**{"name": "jsonl"} | settings)


def test_fork_is_asked_of_every_environment() -> None:
    task = TaskConfig(name="jsonl", tools=["tests.unit.tools.shop:Cart"], branching=Branching.fork)
    with pytest.raises(ValueError, match=r"Cart has no fork\(\); add one, or use auto"):
        catalog.schemas(task, SandboxConfig())


def test_schemas_are_those_of_the_configuration_in_its_order() -> None:
    entries = ["tests.unit.tools.shop:Cart", "code_interpreter", "tests.unit.tools.shop:search"]
    task = TaskConfig(name="jsonl", tools=entries)
    made = catalog.schemas(task, SandboxConfig())
    names = [schema["function"]["name"] for schema in made]
    assert names == ["add", "look", "wait", "code_interpreter", "search"]
    assert made[0]["function"] == {
        "name": "add",
        "description": "Put something into the cart.",
        "parameters": {
            "type": "object",
            "properties": {
                "item": {"type": "string", "description": "its name"},
                "count": {"type": "integer", "description": "how many"},
            },
            "required": ["item"],
        },
    }
    told = catalog.schemas(task, SandboxConfig(stateless=True))[3]["function"]["description"]
    assert "starts anew" in told and "starts anew" not in made[3]["function"]["description"]
    assert catalog.schemas(TaskConfig(name="jsonl", tools=[]), SandboxConfig()) == []
