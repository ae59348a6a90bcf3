"""Ready-made tools: search over a corpus, text environments of gymnasium."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from elpo_ray.config.rollout import SandboxConfig
from elpo_ray.config.task import Branching, TaskConfig
from elpo_ray.tools import catalog
from elpo_ray.tools.agent import AgentSession, AgentTools
from elpo_ray.tools.caller import Caller
from elpo_ray.tools.gymnasium import TextEnvironment
from elpo_ray.tools.search import Corpus
from elpo_ray.types import Problem, ToolCall, ToolResult

ROWS: list[dict[str, Any]] = [
    {"title": "Fruit", "text": "Apples cost two euros."},
    {"text": "Pears cost three euros, and pears are sweet."},
    {"title": "Sky", "text": "The moon is far away " + "and farther " * 100},
]
LAKE = {"gymnasium": "FrozenLake-v1", "options": {"is_slippery": False}}


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS))
    return str(path)


def agent(*entries: dict[str, Any], **settings: Any) -> AgentTools:
    task = TaskConfig(name="jsonl", tools=list(entries), **settings)
    caller = Caller(task.tool_timeout_s)
    made = catalog.sources(task, caller)
    return AgentTools(catalog.joined(task, SandboxConfig(), made), None, made, caller)


async def opened(tools: AgentTools, at: Any = None, **row: Any) -> AgentSession:
    if at is None:
        problem = Problem("p", ({"role": "user", "content": "?"},), None, extra={"row": row})
        tools.opening = await tools.begin(problem, "tree")  # type: ignore[attr-defined]
    return await tools.open(tree="tree", at=at)


async def said(session: AgentSession, name: str, **arguments: Any) -> ToolResult:
    return await session.call(ToolCall(name, arguments))


async def test_search_returns_the_best_passages(file: str) -> None:
    session = await opened(agent({"search": file, "k": 2, "chars": 30}))
    found = await said(session, "search", query="What do pears cost?")
    assert found.text == (
        "[1] Pears cost three euros, and pe …\n\n[2] Fruit\nApples cost two euros."
    )
    assert (await said(session, "search", query="MOON")).text.startswith("[1] Sky\nThe moon is")
    assert (await said(session, "search", query="?!")).text == "No passage has any of these words."
    assert (await said(session, "search", query="zebra")).text.startswith("No passage")


def test_titles_count_and_equal_passages_keep_their_order() -> None:
    corpus = Corpus(["", "b", ""], ["a a", "a a", "c"])
    assert corpus.best("a", 3) == [0, 1] or corpus.best("a", 3) == [0]
    assert corpus.best("b", 3) == [1]
    same = Corpus([""] * 5, ["x", "y", "x", "x", "y"])
    assert same.best("x", 2) == [0, 2]


async def test_two_corpora_stand_side_by_side_under_their_names(file: str) -> None:
    other = {"search": file, "name": "look_up", "description": "Look up."}
    tools = agent({"search": file}, other)
    assert list(tools.schemas) == ["search", "look_up"]
    assert tools.schemas["look_up"]["description"] == "Look up."
    session = await opened(tools)
    names = ["search", "look_up"] * 20
    found = await asyncio.gather(*(said(session, name, query="apples") for name in names))
    assert len({result.text for result in found}) == 1
    with pytest.raises(ValueError, match="has a tool named search too; rename one"):
        agent({"search": file}, {"search": file})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no passages in it"),
        ("{nope", r"line 1: not JSON"),
        ('{"text": "a"}\n{"txt": "b"}', "line 2: no text; write"),
        ('{"text": " "}', "line 1: no text"),
        ("[1]", "line 1: no text"),
    ],
)
def test_a_corpus_that_cannot_be_read_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"task\.tools\[0\]=.*bad\.jsonl'}}: {message}"):
        agent({"search": str(path)})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"search": "gone.jsonl"}, "no such file; name JSON lines"),
        ({"search": 3}, "search must be a text"),
        ({"search": "gone.jsonl", "k": 0}, "k must be a whole number of 1 or more"),
        ({"search": "gone.jsonl", "kk": 3}, "no key kk; it has search, name, k, chars"),
        ({"search": "gone.jsonl", "name": "look up"}, "'look up' is no name of a tool"),
        ({"serch": "gone.jsonl"}, "no ready-made tool is called serch; there are search, mcp, gym"),
        ({"gymnasium": "FrozenLak-v1"}, "NameNotFound"),
        ({**LAKE, "options": {"map": "8x8"}}, "TypeError.*unexpected keyword"),
        ({**LAKE, "actions": ["left"]}, "actions must be 4 different names"),
        ({"gymnasium": "Pendulum-v1"}, "its actions are no list but Box"),
    ],
)
def test_an_entry_that_cannot_be_used_is_one_line(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"task\.tools\[0\]=.*: .*{message}"):
        agent(entry)


@pytest.mark.parametrize(
    ("package", "entry"),
    [
        ("bm25s", {"search": "c.jsonl"}),
        ("mcp", {"mcp": "python s.py"}),
        ("gymnasium", LAKE),
    ],
)
def test_a_package_that_is_missing_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, package: str, entry: dict[str, Any]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a)
    )
    with pytest.raises(ValueError, match=rf"package {package} is missing; pip install .*\[tools\]"):
        agent(entry)


async def test_frozen_lake_is_won_by_its_actions() -> None:
    tools = agent(LAKE)
    assert catalog.judged(TaskConfig(name="jsonl", tools=[LAKE]))
    session = await opened(tools, seed=3)
    assert tools.opening == "[S]FFF\nFHFH\nFFFH\nHFFG\n\nActions: left, down, right, up."  # type: ignore[attr-defined]
    schema = tools.schemas["act"]["parameters"]["properties"]["action"]
    assert schema["enum"] == ["left", "down", "right", "up"]
    path = ["down", "down", "right", "right", "down", "right"]
    for action in path[:-1]:
        assert "Reward: 0." in (await said(session, "act", action=action)).text
    before = session.state
    last = await said(session, "act", action=path[-1])
    assert last.text.endswith("Reward: 1. It is over.") and "[G]" in last.text
    assert (await session.reward()) == 1.0
    assert (await said(session, "act", action="up")).text.startswith("It is over")
    branch = await opened(tools, at=before)
    lost = await said(branch, "act", action="up")
    assert lost.restored_by == "fork" and "Reward: 0." in lost.text
    assert (await branch.reward()) == 0.0
    wrong = await said(branch, "act", action="jump")
    assert wrong.text.startswith("Error: ValueError: no action 'jump'; use one of left")
    await tools.release("tree")


@pytest.mark.parametrize("branching", [Branching.deepcopy, Branching.replay])
async def test_chances_are_part_of_the_state(branching: Branching) -> None:
    tools = agent({"gymnasium": "FrozenLake-v1"}, branching=branching)
    session = await opened(tools, seed=11)
    await said(session, "act", action="right")
    state = session.state
    on = [(await said(session, "act", action="right")).text for _ in range(4)]
    branch = await opened(tools, at=state)
    assert on == [(await said(branch, "act", action="right")).text for _ in range(4)]
    await tools.release("tree")


async def test_taxi_shows_in_marks_what_it_shows_in_colours() -> None:
    tools = agent({"gymnasium": "Taxi-v4"})
    await opened(tools, seed=3)
    text = tools.opening  # type: ignore[attr-defined]
    assert "(R)" in text and "<Y>" in text and "[ ]" in text and "\x1b" not in text
    assert text.endswith("Actions: south, north, east, west, pickup, dropoff.")


def test_rows_without_a_seed_differ_by_what_they_hold() -> None:
    class Taxi(TextEnvironment):
        id = "Taxi-v4"
        actions = ("south", "north", "east", "west", "pickup", "dropoff")

    assert len({Taxi().reset(number=number) for number in range(20)}) > 10
    assert Taxi().reset(number=1) == Taxi().reset(number=1)
