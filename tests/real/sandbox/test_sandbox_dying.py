"""Processes that somebody killed and that take seconds to end, as on a busy machine.

Until then they look alive, and what does not come of them is not put down to their code.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress

import pytest
from processes import eventually, state_of

from sandbox.channels import Ends
from sandbox.endings import is_ending, patience_s, was_killed
from sandbox.limits import Limits
from sandbox.process import SessionProcess
from sandbox.results import Keep, Kind, SandboxFailure
from sandbox.states import node_of
from sandbox.supervisor import Sandbox, Session

pytestmark = pytest.mark.real

LARGE = "x = 1\ny = b'1' * (200 << 20)"
"""It takes a process some processor time to give this up."""
SLEEPS = "import time\nz = b'2' * (200 << 20)\ntime.sleep(99)"
SPIN = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"

Killer = Callable[[int], None]


@pytest.fixture
def slowly() -> Iterator[Killer]:
    """Kills a process on a processor that it hardly gets."""
    processor = max(os.sched_getaffinity(0))
    spinners = [subprocess.Popen([sys.executable, "-c", SPIN, str(processor)]) for _ in range(4)]

    def kill(pid: int) -> None:
        os.sched_setaffinity(pid, {processor})
        os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
        os.kill(pid, signal.SIGKILL)

    yield kill
    for spinner in spinners:
        spinner.kill()
        spinner.wait()


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    async with Sandbox(Limits(wall_s=2, cpu_s=30, memory_mib=512)) as made:
        yield made


def snapshots(sandbox: Sandbox) -> list[SessionProcess]:
    return [snapshot.process for snapshot in sandbox._shelf._kept]


def members(session: Session) -> list[SessionProcess]:
    return [each for lineage in session._tree._lineages for each in lineage._members.values()]


def is_blamed(session: Session) -> bool:
    return session._tree._states.is_broken(node_of(session.state))


def test_a_kill_shows_before_the_end_and_an_exit_is_no_kill(slowly: Killer) -> None:
    code = "import time\nx = bytearray(200 << 20)\nprint(1, flush=True)\ntime.sleep(99)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as sleeper:
        assert sleeper.stdout is not None
        sleeper.stdout.readline()
        assert not was_killed(sleeper.pid) and not is_ending(sleeper.pid)
        slowly(sleeper.pid)
        assert state_of(sleeper.pid) in "RS", "it ended at once: this test shows nothing"
        assert was_killed(sleeper.pid) and is_ending(sleeper.pid)
        sleeper.wait()
        assert not was_killed(sleeper.pid) and is_ending(sleeper.pid)  # nobody by that name
    with subprocess.Popen([sys.executable, "-c", "import os\nos._exit(9)"]) as leaver:
        while state_of(leaver.pid) != "Z":
            time.sleep(0.01)
        assert is_ending(leaver.pid) and not was_killed(leaver.pid)


async def test_a_call_whose_process_was_killed_has_not_overrun(
    sandbox: Sandbox, slowly: Killer
) -> None:
    session = await sandbox.open()
    await session.call(LARGE)
    calling = asyncio.create_task(session.call(SLEEPS))
    await asyncio.sleep(0.8)
    (running,) = [each for each in members(session) if each.running]
    slowly(running.pid)
    result = await calling
    assert result.kind is Kind.SANDBOX_FAILURE and "killed from outside" in result.traceback
    assert (await session.call("x")).value == "1"


async def test_a_snapshot_that_was_killed_did_not_tamper(sandbox: Sandbox, slowly: Killer) -> None:
    session = await sandbox.open(tree="t")
    await session.call(LARGE)
    for process in snapshots(sandbox):
        slowly(process.pid)
    branch = await sandbox.open(at=session.state, tree="t")
    result = await branch.call("x += 1\nx")
    assert (result.value, result.restored_by) == ("2", "replay"), result
    assert not is_blamed(session)


async def test_a_file_put_into_a_killed_process_finds_no_broken_code(
    sandbox: Sandbox, slowly: Killer
) -> None:
    session = await sandbox.open(keep=Keep.NEWEST)
    await session.call(LARGE)
    (process,) = members(session)
    slowly(process.pid)
    with suppress(SandboxFailure):
        await session.put("a", b"x")
    assert not is_blamed(session)
    assert (await session.call("x")).value == "1"


async def test_who_ends_with_a_killed_first_process_was_lost_from_outside(sandbox: Sandbox) -> None:
    session = await sandbox.open(tree="t")
    await session.call("x = 1")
    (member,) = snapshots(sandbox)
    (lineage,) = (each.lineage for each in sandbox._shelf._kept)
    assert not await lineage.lost(member)
    os.kill(lineage.first.pid, signal.SIGKILL)
    await eventually(lambda: not member.alive, "it does not end with the first one")
    assert await lineage.lost(member)


async def test_calls_that_are_given_up_while_they_branch_cost_no_state(sandbox: Sandbox) -> None:
    session = await sandbox.open(tree="t")
    value = (await session.call("import os\nx = os.urandom(8)\nx")).value
    branches = [await sandbox.open(at=session.state, tree="t") for _ in range(30)]
    for number, branch in enumerate(branches):
        calling = asyncio.create_task(branch.call("x"))
        await asyncio.sleep(0.0002 * number)
        calling.cancel()
        await asyncio.wait({calling})
        result = await branch.call("x")
        assert (result.value, result.restored_by) == (value, "fork"), (number, result)


async def test_a_branch_that_nobody_waits_for_does_not_spoil_the_next(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await sandbox.open(tree="t")
    await session.call("import os\nx = os.urandom(8)\nx")
    one, two = [await sandbox.open(at=session.state, tree="t") for _ in range(2)]
    with monkeypatch.context() as starved:
        starved.setattr(SessionProcess, "resume", lambda _: None)
        calling = asyncio.create_task(one.call("1"))
        await asyncio.sleep(0.05)
        calling.cancel()
        await asyncio.wait({calling})
    result = await two.call("1")  # the state cannot be repeated, which is not its code's doing
    assert result.kind is Kind.SANDBOX_FAILURE and not is_blamed(session), result


async def test_a_state_with_threads_that_was_killed_is_not_broken_by_its_code(
    sandbox: Sandbox,
) -> None:
    session = await sandbox.open()
    await session.call(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()\n"
        "time.time_ns()"
    )
    calling = asyncio.create_task(session.call("time.sleep(99)"))
    await eventually(lambda: any(each.running for each in members(session)), "it does not run")
    (running,) = [each for each in members(session) if each.running]
    os.kill(running.pid, signal.SIGKILL)
    assert (await calling).kind is Kind.SANDBOX_FAILURE
    assert not is_blamed(session)
    assert (await session.call("1")).kind is Kind.SANDBOX_FAILURE  # it cannot be repeated


@pytest.mark.parametrize(("load", "factor"), [(0.0, 1), (1.0, 1), (2.5, 2.5), (500.0, 3)])
def test_patience_grows_with_the_number_of_those_who_wait_for_a_processor(
    monkeypatch: pytest.MonkeyPatch, load: float, factor: float
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 3, 5, 7})
    monkeypatch.setattr(os, "getloadavg", lambda: (4 * load, 0.0, 0.0))
    assert patience_s(5.0) == 5.0 * factor


async def test_a_branch_that_is_born_after_its_spawner_died_has_ended(sandbox: Sandbox) -> None:
    session = await sandbox.open(tree="t")
    await session.call("x = 1")
    (lineage,) = (each.lineage for each in sandbox._shelf._kept)
    (member,) = snapshots(sandbox)
    client, branch = lineage._client, SessionProcess(Ends(), member.folder)
    del client._live[member.inner_pid]
    client._lose("it died")
    client.adopt(branch, member.pid, lineage.first)
    assert branch.end.done()
    await asyncio.sleep(0)
    assert await branch.killed_from_outside()
    member.end.set_result(branch.end.result())
    await asyncio.gather(branch.close(), member.close())
