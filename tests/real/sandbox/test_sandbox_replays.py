"""Why a state was rebuilt by a replay: said by the result, and counted."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace

import pytest

from sandbox.limits import Limits
from sandbox.results import Keep, Kind, ReplayReason
from sandbox.supervisor import Sandbox, Session

pytestmark = pytest.mark.real

LIMITS = Limits(wall_s=60, cpu_s=60, memory_mib=512)
"""Generous in time: a busy machine fails no test."""
THREAD = (
    "import threading\nt = threading.Thread(target=threading.Event().wait, daemon=True)\nt.start()"
)
FILE = "f = open('f', 'w')"
DYING = "import os, sys\nsys.modules['sandbox.branch'].take_over = lambda *_: os._exit(3)"
REFUSING = "import sys\nsys.modules['sandbox.branch'].fork = lambda: -11"
IDLE = "import sys\nsys.modules['sandbox.branch'].fork = lambda: 1"
ENDING = "import os, sys\nsys.modules['sandbox.branch'].fork = lambda: os._exit(3)"


async def reason_of(sandbox: Sandbox, session: Session) -> str:
    """Why another session has the state of this one rebuilt, which is counted too."""
    before = sandbox.gauges()
    other = await sandbox.open(at=session.state)
    results = [await other.call("x"), await other.call("x")]
    assert {result.value for result in results} == {"1"}
    assert {result.restored_by for result in results} == {"replay"}
    reason = results[0].replay_reason
    assert reason == results[1].replay_reason
    after = sandbox.gauges()
    assert after[f"replays_{reason}"] > before[f"replays_{reason}"]
    await other.close()
    return reason


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (THREAD, "threads"),
        (FILE, "descriptors"),
        (DYING, "tampered"),
        (REFUSING, "tampered"),
        (IDLE, "tampered"),
        (ENDING, "lost"),
    ],
)
async def test_a_process_that_is_not_forked_says_why(code: str, reason: str) -> None:
    async with Sandbox(LIMITS) as sandbox:
        session = await sandbox.open(tree="t")
        first = await session.call(f"x = 1\n{code}\nNone")
        assert (first.restored_by, first.replay_reason) == ("fresh", "")
        mine = session.state
        if first.snapshot != "kept":
            assert first.snapshot == reason
            await session.call("x")  # its process goes on with it
        session._state = mine
        assert await reason_of(sandbox, session) == reason


@pytest.mark.parametrize("keep", [Keep.NEWEST, Keep.STATES])
async def test_states_that_are_not_kept_say_so(keep: Keep) -> None:
    async with Sandbox(LIMITS, replay_below_s=0.0 if keep is Keep.NEWEST else 30.0) as sandbox:
        session = await sandbox.open(tree="t", keep=keep)
        await session.call("x = 1")
        mine = session.state
        await session.call("x")
        session._state = mine
        expected = "newest" if keep is Keep.NEWEST else "cheap"
        assert await reason_of(sandbox, session) == expected


async def test_snapshots_that_are_gone_say_why() -> None:
    async with Sandbox(LIMITS, snapshots=2) as sandbox:
        session = await sandbox.open(tree="t")
        await session.call("x = 1")
        mine = session.state
        for _ in range(4):
            await session.call("x")
        session._state = mine
        assert await reason_of(sandbox, session) == "evicted"
    async with Sandbox(LIMITS) as sandbox:
        session = await sandbox.open(tree="t")
        await session.call("x = 1")
        for snapshot in list(sandbox._shelf._kept):
            os.kill(snapshot.process.pid, signal.SIGKILL)
        await asyncio.sleep(0.2)
        assert await reason_of(sandbox, session) == "lost"
        session._state = replace(session.state, tree="else", host="else")
        assert await reason_of(sandbox, session) == "elsewhere"


async def test_a_state_that_needs_no_replay_has_no_reason() -> None:
    async with Sandbox(LIMITS) as sandbox:
        session = await sandbox.open("x = 1", tree="t")
        assert (await session.call("x")).replay_reason == ""
        branch = await sandbox.open(at=session.state, tree="t")
        result = await branch.call("x")
        assert (result.restored_by, result.replay_reason) == ("fork", "")
        gauges = sandbox.gauges()
        assert sum(gauges[f"replays_{reason}"] for reason in ReplayReason) == gauges["replays"] == 0


async def test_a_deep_chain_is_counted_but_is_no_reason_of_a_result() -> None:
    async with Sandbox(LIMITS) as sandbox:
        session = await sandbox.open(tree="t")
        await session.call("x = 0")
        for _ in range(40):
            result = await session.call("x += 1\nx")
        assert (result.value, result.restored_by, result.replay_reason) == ("40", "fresh", "")
        assert sandbox.gauges()["replays_deep"] == sandbox.gauges()["rebased"] > 0


@pytest.mark.parametrize("tree", [None, "t"])
async def test_a_process_that_went_on_is_not_given_up_for_the_states_it_left(
    tree: str | None,
) -> None:
    """With room for few states, many calls of one process are still one state; and those of others
    do not disturb the one that runs."""
    async with Sandbox(LIMITS, snapshots=3) as sandbox:
        session = await sandbox.open(tree=tree, keep=Keep.NEWEST)
        for number in range(6):
            result = await session.call(f"x = {number}")
            assert result.kind is Kind.OK and result.restored_by != "replay", number
        slow = asyncio.create_task(session.call("import time\ntime.sleep(1.0)\nx"))
        await asyncio.sleep(0.2)
        for _ in range(4):
            other = await sandbox.open(keep=Keep.NEWEST)
            for number in range(3):
                assert (await other.call(f"y = {number}")).kind is Kind.OK
            await other.close()
        result = await slow
        assert (result.kind, result.value) == (Kind.OK, "5")
        seen = sandbox.gauges()
        assert (seen["evicted"], seen["replayed_calls"], seen["live_snapshots"]) == (0, 0, 1)
