"""The sandbox on this machine: results, limits and state, over real processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio

from sandbox.limits import Limits
from sandbox.results import Entry, Keep, Kind, ReplayDiverged, SandboxFailure, SessionState
from sandbox.supervisor import Sandbox, Session

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="module")]

LIMITS = Limits(wall_s=30, cpu_s=30, memory_mib=256)
"""Generous in time: a busy machine fails no test."""
HASTY = Limits(wall_s=1, cpu_s=1, memory_mib=256)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sandbox() -> AsyncIterator[Sandbox]:
    async with Sandbox(LIMITS, sessions=8) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hasty() -> AsyncIterator[Sandbox]:
    async with Sandbox(HASTY, sessions=8) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def session(sandbox: Sandbox) -> AsyncIterator[Session]:
    made = await sandbox.open()
    yield made
    await made.close()


def travelled(state: SessionState) -> SessionState:
    """The state as another host gets it: nothing there knows its tree."""
    return replace(state, tree="elsewhere", host="elsewhere")


# --- results --------------------------------------------------------------------------------------


async def test_names_live_on_and_the_last_expression_is_the_value(session: Session) -> None:
    assert (await session.call("x = 20\nprint('set')")).stdout == "set\n"
    result = await session.call("import math\nx + math.isqrt(484)")
    assert (result.kind, result.value, result.restored_by) == (Kind.OK, "42", "fresh")


async def test_classes_and_dataclasses_work_as_in_a_script(session: Session) -> None:
    await session.call("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int = 1")
    assert (await session.call("import pickle\npickle.loads(pickle.dumps(P(3)))")).value == "P(x=3)"


async def test_traceback_shows_the_callers_frames_only(session: Session) -> None:
    result = await session.call("import json\ndef f(text):\n    return json.loads(text)\nf('{')")
    assert (result.kind, result.error_type) == (Kind.ERROR, "JSONDecodeError")
    assert 'File "<cell 1>", line 3, in f' in result.traceback
    assert "return json.loads(text)" in result.traceback
    assert "runner" not in result.traceback and "decoder.py" not in result.traceback


@pytest.mark.parametrize(
    ("code", "kind", "error_type"),
    [
        ("", Kind.OK, None),
        ("# nothing", Kind.OK, None),
        ("a b", Kind.ERROR, "SyntaxError"),
        ("x = '\ud800'", Kind.ERROR, "UnicodeEncodeError"),
        ("print('\\ud800')", Kind.OK, None),
        ("'\\0' * 3", Kind.OK, None),
        ("import no_such_package", Kind.ERROR, "ModuleNotFoundError"),
        ("def f(): f()\nf()", Kind.ERROR, "RecursionError"),
        ("input()", Kind.ERROR, "EOFError"),
        ("raise type('E' * 100_000, (BaseException,), {})", Kind.ERROR, "E" * 200),
        ("import sys\nsys.exit(3)", Kind.EXITED, "SystemExit"),
        ("exit()", Kind.EXITED, "SystemExit"),
        ("bytearray(8 << 30)", Kind.MEMORY, "MemoryError"),
        ("kept = []\nwhile True:\n    kept.append(bytearray(1 << 20))", Kind.MEMORY, "MemoryError"),
        ("kept = []\nwhile True:\n    kept.append('x' * len(kept))", Kind.MEMORY, "MemoryError"),
        ("import sys\nsys.stdout.close()", Kind.OK, None),
        ("open('big', 'wb').write(b'x' * (32 << 20))", Kind.ERROR, "OSError"),
        ("class R:\n    def __repr__(self): 1 / 0\nR()", Kind.ERROR, "ZeroDivisionError"),
        ("import asyncio\nasyncio.run(asyncio.sleep(0, 7))", Kind.OK, None),
    ],
)
async def test_odd_code_ends_clearly_and_the_session_lives_on(
    session: Session, code: str, kind: Kind, error_type: str | None
) -> None:
    result = await session.call(code)
    assert (result.kind, result.error_type, result.state_kept) == (kind, error_type, True)
    after = await session.call("print(1 + 1)")
    assert (after.kind, after.stdout, after.restored_by) == (Kind.OK, "2\n", "fresh")


async def test_a_nul_byte_in_the_code_is_an_error(session: Session) -> None:
    assert (await session.call("x = 1\0")).kind is Kind.ERROR


async def test_a_megabyte_of_code_runs_and_too_much_is_refused(session: Session) -> None:
    result = await session.call("x = '" + "y" * (1 << 20) + "'\nlen(x)")
    assert (result.kind, result.value) == (Kind.OK, str(1 << 20))
    assert (await session.call("#" * (9 << 20))).error_type == "ValueError"


@pytest.mark.parametrize("keep", Keep)
async def test_refused_code_leaves_the_session_as_it_was(sandbox: Sandbox, keep: Keep) -> None:
    session = await sandbox.open("x = 1", tree=f"refused-{keep}", keep=keep)
    await session.call("x += 1")
    before = session.state
    refused = await session.call("x = '" + "é" * (4 << 20) + "'")
    assert (refused.kind, refused.refused) == (Kind.ERROR, True)
    assert "longer than 8 MiB" in refused.traceback
    assert session.state is before is before.after("…", refused)
    kept = "1" if keep is Keep.NOTHING else "2"
    after = await session.call("x")
    assert (after.value, after.restored_by) == (kept, "fresh")
    elsewhere = await sandbox.open(at=travelled(session.state))
    assert (await elsewhere.call("x")).value == kept
    await elsewhere.close()
    await session.close()
    await sandbox.release(f"refused-{keep}")


async def test_much_output_is_kept_head_and_tail_and_never_times_out(session: Session) -> None:
    result = await session.call("print('head' + 'x' * 150_000 + 'tail')")
    assert (result.kind, result.truncated) == (Kind.OK, ("stdout",))
    assert result.stdout.startswith("head") and result.stdout.endswith("tail\n")
    assert "bytes left out" in result.stdout and len(result.stdout) < 70_000
    assert (await session.call("'v' * 200_000")).truncated == ("value",)


@pytest.mark.parametrize(
    "code",
    [
        "import os\nos.close(1)\nos.close(2)",
        "with open(1, 'w') as out, open(2, 'w') as err: pass",
        "import sys\ndel sys.stdout",
        "import sys\ndel sys.stderr, sys.__stderr__, sys.__stdout__",
        "import sys\nsys.stdout.close()\nsys.stderr = None",
    ],
)
async def test_later_cells_print_whatever_became_of_the_streams(
    sandbox: Sandbox, code: str
) -> None:
    session = await sandbox.open()
    assert (await session.call(code)).kind is Kind.OK
    assert session.state.effective, "the state is kept"
    branch = await sandbox.open(at=session.state, tree=session.state.tree)
    for each in (session, branch):
        result = await each.call("import sys\nprint('out')\nprint('err', file=sys.stderr)")
        assert (result.kind, result.stdout, result.stderr) == (Kind.OK, "out\n", "err\n"), result
        await each.close()


async def test_what_is_printed_after_a_descriptor_was_closed_is_not_lost(session: Session) -> None:
    result = await session.call("import os\nos.close(1)\nprint('here')")
    assert (result.kind, result.stdout, result.snapshot) == (Kind.OK, "here\n", "kept")


async def test_pandas_leaves_no_thread_so_its_states_branch() -> None:
    pytest.importorskip("pandas")
    async with Sandbox(replace(LIMITS, memory_mib=2048)) as made:
        session = await made.open(tree="t")
        result = await session.call("import pandas, time\nbegan = time.time()")
        assert (result.kind, result.snapshot) == (Kind.OK, "kept"), result
        branches = [await made.open(at=session.state, tree="t") for _ in range(3)]
        found = [await each.call("pandas.Series([1, 2]).sum() + 0 * began") for each in branches]
        assert [(each.value, each.restored_by) for each in found] == [
            ("np.float64(3.0)", "fork")
        ] * 3


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("while True: pass", Kind.TIMEOUT),
        ("(9 ** 9) ** (9 ** 8)", Kind.TIMEOUT),
        ("import time\ntime.sleep(60)", Kind.TIMEOUT),
        (
            "import signal\nfor n in set(signal.Signals) - {9, 19}:\n"
            "    signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
            Kind.TIMEOUT,
        ),
        ("while True:\n  try:\n    while True: pass\n  except BaseException: pass", Kind.TIMEOUT),
        ("class R:\n    def __repr__(self):\n        while True: pass\nR()", Kind.TIMEOUT),
        ("while True: print('x' * 1000)", Kind.OUTPUT),
        ("import os\nwhile True: os.write(2, b'x' * 60_000)", Kind.OUTPUT),
        ("for i in range(200): open(f'f{i}', 'w').close()", Kind.OUTPUT),
        ("import ctypes\nctypes.string_at(0)", Kind.KILLED),
        ("import os\nos.abort()", Kind.KILLED),
        ("import os\nos._exit(0)", Kind.EXITED),
        ("import os\nos.closerange(0, 64)", Kind.EXITED),
        ("import os\nos.write(3, b'garbage' * 100)", Kind.KILLED),
        ("import os\nos.write(3, bytes(8) + bytes([4, 0]) + bytes(12))", Kind.KILLED),
        ("import os\nos.write(3, b'\\xff' * 60_000)", Kind.KILLED),
    ],
)
async def test_a_killed_call_leaves_the_session_where_it_was(
    hasty: Sandbox, code: str, kind: Kind
) -> None:
    session = await hasty.open()
    await session.call("x = 41")
    result = await session.call(code)
    assert (result.kind, result.state_kept) == (kind, False)
    assert result.traceback
    assert result.duration_s < HASTY.wall_s + 1
    after = await session.call("x + 1")
    assert (after.value, after.restored_by) == ("42", "fork")
    await session.close()


async def test_threads_may_not_burn_more_cpu_than_the_limit() -> None:
    code = (
        "import hashlib, threading\ndef burn():\n"
        "    while True: hashlib.pbkdf2_hmac('sha256', b'x', b'y', 200_000)\n"
        "for _ in range(8): threading.Thread(target=burn, daemon=True).start()\nburn()"
    )
    async with Sandbox(Limits(wall_s=20, cpu_s=1)) as made:
        result = await (await made.open()).call(code)
    assert result.kind is Kind.TIMEOUT and result.duration_s < 10
    assert 0.9 < result.cpu_s < 3


async def test_nothing_runs_between_calls(session: Session) -> None:
    await session.call(
        "import threading, time\nticks = []\ndef tick():\n"
        "    while True:\n        ticks.append(1)\n        time.sleep(0.01)\n"
        "threading.Thread(target=tick, daemon=True).start()"
    )
    before = int((await session.call("len(ticks)")).value or 0)
    await asyncio.sleep(0.5)
    assert int((await session.call("len(ticks)")).value or 0) < before + 10


async def test_queueing_is_no_part_of_the_time_limit() -> None:
    async with Sandbox(Limits(wall_s=2), running=1) as made:
        sessions = [await made.open() for _ in range(4)]
        results = await asyncio.gather(*(s.call("import time; time.sleep(0.8)") for s in sessions))
    assert [result.kind for result in results] == [Kind.OK] * 4
    assert max(result.queue_s for result in results) > 2.3
    assert max(result.duration_s for result in results) < 2


async def test_open_waits_for_a_free_place() -> None:
    async with Sandbox(LIMITS, sessions=1) as made:
        first = await made.open()
        second = asyncio.create_task(made.open())
        await asyncio.sleep(0.2)
        assert not second.done()
        await first.close()
        assert (await (await second).call("1")).queue_s > 0.1


# --- state ----------------------------------------------------------------------------------------


async def test_branches_continue_from_any_state(sandbox: Sandbox, session: Session) -> None:
    await session.call("x = [1]")
    early = session.state
    await session.call("x.append(2)")
    branch = await sandbox.open(at=early)
    result = await branch.call("x.append(3)\nx")
    assert (result.value, result.restored_by) == ("[1, 3]", "fork")
    assert (await session.call("x")).value == "[1, 2]"
    assert branch.state.entries[:1] == early.entries
    await branch.close()


async def test_setup_runs_first_and_again_in_every_branch(sandbox: Sandbox) -> None:
    first = await sandbox.open(setup="numbers = [3, 4]\nprint('not shown')")
    assert (await first.call("numbers.pop()")).stdout == ""
    second = await sandbox.open(at=first.state)
    assert (await second.call("numbers")).value == "[3]"
    await first.close()
    await second.close()
    with pytest.raises(SandboxFailure, match=r"setup code failed(.|\n)*ZeroDivisionError"):
        await sandbox.open(setup="1 / 0")
    with pytest.raises(ValueError, match="setup of its own"):
        await sandbox.open(setup="y = 1", at=SessionState("x = 1"))


async def test_chance_and_order_repeat_exactly(sandbox: Sandbox, session: Session) -> None:
    await session.call("import random\n[random.random() for _ in range(3)]")
    await session.call("list({'b', 'a', 'c', 'd', 'e'}), object(), __import__('os').getcwd()")
    state = session.state
    expected = (await session.call("random.random()")).value
    for at, how in ((state, "fork"), (travelled(state), "replay")):
        branch = await sandbox.open(at=at)
        result = await branch.call("random.random()")
        assert (result.value, result.restored_by) == (expected, how)
        await branch.close()


@pytest.mark.parametrize("code", ["import os\nos.urandom(8)", "import time\nprint(time.time())"])
async def test_a_replay_that_diverges_is_a_failure(
    sandbox: Sandbox, session: Session, code: str
) -> None:
    assert (await session.call(code)).kind is Kind.OK
    with pytest.raises(ReplayDiverged, match="replay diverged: call 1 of 1"):
        await sandbox.open(at=travelled(session.state))
    before = sandbox.gauges()["diverged"]
    branch = await sandbox.open(at=session.state)  # here its snapshot is kept
    assert (await branch.call("1")).kind is Kind.OK
    assert sandbox.gauges()["diverged"] == before
    await branch.close()


async def test_killed_calls_are_logged_but_not_repeated(sandbox: Sandbox, session: Session) -> None:
    await session.call("x = 1")
    await session.call("x = 2\nimport os\nos._exit(0)")
    assert [entry.lost for entry in session.state.entries] == [False, True]
    branch = await sandbox.open(at=session.state)
    assert (await branch.call("x")).value == "1"
    await branch.close()


async def test_a_tampered_state_is_not_believed(sandbox: Sandbox) -> None:
    with pytest.raises(SandboxFailure, match="diverged"):
        await sandbox.open(at=SessionState("", (Entry("1 + 1", "0" * 32, False),)))
