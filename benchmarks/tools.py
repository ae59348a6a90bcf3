"""Tools of the user's: what a branch costs, and how many calls a worker can have under way.

    python benchmarks/tools.py [branch] [sessions]

Prints one JSON object a line. `branch`: an environment whose calls take 0.05 s is brought into the
state after 16 of them by its fork(), by copy.deepcopy and by replay; seconds to the state, the
median of several branches. `sessions`: 500 sessions at once, each of which makes 20 calls of a
function that sleeps 50 ms in a thread; 1 s would be ideal.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # beside this file lies a `sandbox`

from elpo_ray.config.rollout import SandboxConfig  # noqa: E402
from elpo_ray.config.task import Branching, TaskConfig  # noqa: E402
from elpo_ray.tools import catalog  # noqa: E402
from elpo_ray.tools.agent import AgentTools  # noqa: E402
from elpo_ray.tools.caller import Caller  # noqa: E402
from elpo_ray.types import Problem, ToolCall, ToolKind  # noqa: E402

DEPTH, CALL_S = 16, 0.05
SESSIONS, CALLS = 500, 20
PROBLEM = Problem("p", ({"role": "user", "content": "go"},), None)


def nap() -> str:
    """Sleep for 50 ms."""
    time.sleep(CALL_S)
    return "awake"


class Slow:
    """A state of some thousand numbers, and calls that take their time."""

    def __init__(self) -> None:
        self.numbers = list(range(5000))

    def step(self) -> int:
        """Change the state."""
        time.sleep(CALL_S)
        self.numbers.append(len(self.numbers))
        return len(self.numbers)

    def look(self) -> int:
        """Say what the state is."""
        return len(self.numbers)

    def fork(self) -> Slow:
        made = Slow()
        made.numbers = list(self.numbers)
        return made


def agent(tool: str, branching: Branching = Branching.auto) -> AgentTools:
    task = TaskConfig(name="jsonl", tools=[f"__main__:{tool}"], branching=branching)
    caller = Caller(task.tool_timeout_s)
    made = catalog.sources(task, caller)
    return AgentTools(catalog.joined(task, SandboxConfig(), made), None, made, caller)


async def branch(how: Branching, branches: int) -> float:
    """Seconds from a state at depth 16 to the answer of a call there."""
    tools, seconds = agent("Slow", how), []
    await tools.begin(PROBLEM, "tree")
    trunk = await tools.open(tree="tree")
    for _ in range(DEPTH):
        await trunk.call(ToolCall("step", {}))
    for _ in range(branches):
        if how is Branching.replay:  # a state that was replayed once is told from its log again
            tools._trees["tree"].copies.clear()
        began = time.perf_counter()
        session = await tools.open(tree="tree", at=trunk.state)
        result = await session.call(ToolCall("look", {}))
        seconds.append(time.perf_counter() - began)
        assert result.text == str(5000 + DEPTH)
        await session.close()
    await tools.release("tree")
    return statistics.median(seconds)


async def sessions() -> float:
    """Seconds for all calls of all sessions."""
    tools = agent("nap")
    await tools.begin(PROBLEM, "tree")

    async def one() -> None:
        session = await tools.open(tree="tree")
        for _ in range(CALLS):
            result = await session.call(ToolCall("nap", {}))
            assert result.kind is ToolKind.OK

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(SESSIONS)))
    return time.perf_counter() - began


def main() -> None:
    chosen = sys.argv[1:] or ["branch", "sessions"]
    if "branch" in chosen:
        taken = {}
        for how, count in ((Branching.replay, 3), (Branching.fork, 50), (Branching.deepcopy, 50)):
            taken[how.value] = asyncio.run(branch(how, count))
        for how in ("fork", "deepcopy"):
            row = {
                "measure": "branch",
                "depth": DEPTH,
                "how": how,
                "seconds": round(taken[how], 5),
                "replay_seconds": round(taken["replay"], 3),
                "times_as_fast": round(taken["replay"] / taken[how], 1),
            }
            print(json.dumps(row), flush=True)
    if "sessions" in chosen:
        for attempt in range(3):
            row = {
                "measure": "sessions",
                "sessions": SESSIONS,
                "calls": SESSIONS * CALLS,
                "attempt": attempt,
                "ideal_seconds": CALLS * CALL_S,
                "seconds": round(asyncio.run(sessions()), 3),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
