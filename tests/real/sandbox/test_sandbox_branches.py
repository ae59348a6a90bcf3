"""States that branch: by fork and by replay alike, whatever happens to the snapshots."""

from __future__ import annotations

import asyncio
import os
import pickle
import random
import signal
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandbox.limits import Limits
from sandbox.listener import Question
from sandbox.results import KEPT, Keep, Kind, ReplayReason, SandboxFailure, SessionState
from sandbox.supervisor import Sandbox, Session

pytestmark = pytest.mark.real

LIMITS = Limits(wall_s=60, cpu_s=60, memory_mib=256)
"""Generous in time: a busy machine fails no test."""


@pytest_asyncio.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    async with Sandbox(LIMITS, sessions=64) as made:
        yield made


def travelled(state: SessionState) -> SessionState:
    """The state as another host gets it: nothing there knows its tree."""
    return replace(pickle.loads(pickle.dumps(state)), tree="elsewhere", host="elsewhere")


def processes(sandbox: Sandbox) -> list[int]:
    """Process ids of all kept snapshots."""
    return [snapshot.process.pid for snapshot in sandbox._shelf._kept]


# --- against a model ------------------------------------------------------------------------------

SEE = (
    "import os\n"
    "(x, random.getstate()[1][-1], open('f').read() if os.path.exists('f') else '', len(threads))"
)
CELLS = {
    "add": "x += 1",
    "write": "open('f', 'a').write(str(x))",
    "draw": "random.random()",
    "fail": "x += 10\n1 / 0",
    "die": "x += 100\nopen('f', 'a').write('!')\nimport os\nos._exit(3)",
    "thread": "t = threading.Thread(target=threading.Event().wait, daemon=True)\n"
    "t.start()\nthreads.append(t)",
}
SETUP = "import random, threading\nx = 0\nthreads = []"


@dataclass
class Model:
    """What a session's names and files should be."""

    x: int = 0
    draws: int = 0
    text: str = ""
    threads: int = 0

    def after(self, cell: str) -> Model:
        match cell:
            case "add":
                return replace(self, x=self.x + 1)
            case "write":
                return replace(self, text=self.text + str(self.x))
            case "draw":
                return replace(self, draws=self.draws + 1)
            case "fail":
                return replace(self, x=self.x + 10)
            case "thread":
                return replace(self, threads=self.threads + 1)
        return self

    def seen(self) -> str:
        source = random.Random(0)
        for _ in range(self.draws):
            source.random()
        return repr((self.x, source.getstate()[1][-1], self.text, self.threads))


@dataclass
class World:
    """One example: open sessions with their models, and all states that were ever reached."""

    sandbox: Sandbox
    sessions: list[tuple[Session, Model]] = field(default_factory=list)
    states: list[tuple[SessionState, Model]] = field(default_factory=list)

    async def open(self, at: SessionState | None, model: Model) -> None:
        setup = SETUP if at is None else ""
        self.sessions.append((await self.sandbox.open(setup, at, tree="world"), model))

    async def do(self, step: tuple[str, int]) -> None:
        name, number = step
        if name == "branch" and self.states:
            await self.open(*self.states[number % len(self.states)])
        elif name == "travel" and self.states:
            state, model = self.states[number % len(self.states)]
            await self.open(travelled(state), model)
        elif name == "evict" and (pids := processes(self.sandbox)):
            os.kill(pids[number % len(pids)], signal.SIGKILL)
            await asyncio.sleep(0.05)
        elif name == "close" and len(self.sessions) > 1:
            await self.sessions.pop(number % len(self.sessions))[0].close()
        elif name in CELLS:
            await self.call(number % len(self.sessions), name)

    async def call(self, index: int, cell: str) -> None:
        session, model = self.sessions[index]
        result = await session.call(CELLS[cell])
        kinds = {"fail": Kind.ERROR, "die": Kind.EXITED}
        assert result.kind is kinds.get(cell, Kind.OK), result
        model = model.after(cell)
        self.sessions[index] = (session, model)
        self.states.append((session.state, model))

    async def check(self) -> None:
        """Every open session, and some state by fork and by replay, is as the model says."""
        for session, model in self.sessions:
            assert (await session.call(SEE)).value == model.seen()
        for state, model in self.states[-1:]:
            for at in (state, travelled(state)):
                session = await self.sandbox.open(at=at, tree="world")
                assert (await session.call(SEE)).value == model.seen()
                await session.close()


steps = st.lists(
    st.tuples(
        st.sampled_from([*CELLS, "add", "write", "branch", "branch", "travel", "evict", "close"]),
        st.integers(0, 99),
    ),
    max_size=14,
)


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    yield made
    made.close()


@pytest.fixture(scope="module")
def shared(loop: asyncio.AbstractEventLoop) -> Iterator[Sandbox]:
    async def make() -> Sandbox:
        return Sandbox(LIMITS, sessions=64)

    made = loop.run_until_complete(make())
    yield made
    loop.run_until_complete(made.close())


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(program=steps)
def test_fork_and_replay_agree_with_the_model(
    loop: asyncio.AbstractEventLoop, shared: Sandbox, program: list[tuple[str, int]]
) -> None:
    async def example() -> None:
        world = World(shared)
        await world.open(None, Model())
        for step in program:
            await world.do(step)
        await world.check()
        for session, _ in world.sessions:
            await session.close()
        await shared.release("world")
        assert shared.gauges()["live_snapshots"] == 0

    loop.run_until_complete(example())


# --- snapshots ------------------------------------------------------------------------------------


async def test_branches_of_one_state_run_at_once_and_see_nothing_of_each_other(
    sandbox: Sandbox,
) -> None:
    trunk = await sandbox.open(tree="t")
    await trunk.call("import os\nx = [0]\nopen('a', 'w').write('a')\nwhere = os.path.abspath('a')")
    branches = [await sandbox.open(at=trunk.state, tree="t") for _ in range(12)]
    codes = [
        f"x.append({n})\nopen(where, 'a').write('{n}')\nopen('own{n}', 'w').close()\n"
        "x, sorted(os.listdir()), open('a').read()"
        for n in range(12)
    ]
    results = await asyncio.gather(
        *(branch.call(code) for branch, code in zip(branches, codes, strict=True))
    )
    for number, result in enumerate(results):
        expected = ([0, number], ["a", f"own{number}"], f"a{number}")
        assert (result.value, result.restored_by) == (repr(expected), "fork"), result
    assert (await trunk.call("x, os.listdir(), open('a').read()")).value == "([0], ['a'], 'a')"


async def test_folders_are_copied_whole_and_the_working_directory_goes_along(
    sandbox: Sandbox,
) -> None:
    trunk = await sandbox.open()
    await trunk.call(
        "import os, tempfile\nos.makedirs('d/e')\nopen('d/e/f', 'w').write('deep')\n"
        "os.umask(0o077)\nos.chdir('d')\nnote = tempfile.NamedTemporaryFile(delete=False).name"
    )
    branch = await sandbox.open(at=trunk.state)
    result = await branch.call("open('e/f').read(), os.path.exists(note), os.umask(0)")
    assert result.value == "('deep', True, 63)"
    assert (await branch.call("import shutil\nshutil.rmtree('e')\nos.listdir()")).value == "[]"
    assert (await trunk.call("open('e/f').read()")).value == "'deep'"


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import threading\nthreading.Thread(target=threading.Event().wait).start()", "threads"),
        ("f = open('f', 'w')", "descriptors"),
        ("import os\nr, w = os.pipe()", "descriptors"),
        ("import mmap\nopen('g', 'wb').write(b'x' * 4096)", KEPT),
        ("f = open('f', 'w')\nf.close()", KEPT),
    ],
)
async def test_a_process_that_cannot_be_forked_goes_on_and_is_replayed_for_others(
    sandbox: Sandbox, code: str, why: str
) -> None:
    trunk = await sandbox.open()
    await trunk.call("x = 1")
    assert (await trunk.call(code)).snapshot == why
    state = trunk.state
    assert (await trunk.call("x += 1\nx")).value == "2"
    branch = await sandbox.open(at=state)
    result = await branch.call("x += 1\nx")
    assert (result.value, result.restored_by) == ("2", "fork" if why == KEPT else "replay")
    assert (await trunk.call("x")).restored_by == "fresh"


async def test_a_file_position_is_not_shared(sandbox: Sandbox) -> None:
    trunk = await sandbox.open()
    await trunk.call("open('f', 'w').write('abcdef')\nf = open('f')\nf.read(2)")
    one, two = [await sandbox.open(at=trunk.state) for _ in range(2)]
    assert [(await session.call("f.read()")).value for session in (one, two, trunk)] == [
        "'cdef'"
    ] * 3


async def test_what_is_evicted_is_replayed_from_the_nearest_kept_state() -> None:
    async with Sandbox(LIMITS, snapshots=3) as sandbox:
        trunk = await sandbox.open(tree="t")
        states = []
        for number in range(8):
            await trunk.call(f"x = {number}")
            states.append(trunk.state)
        seen = sandbox.gauges()
        assert (seen["live_snapshots"], seen["evicted"]) == (3, 5)
        for number, how, replayed in ((7, "fork", 0), (4, "replay", 5), (5, "replay", 6)):
            branch = await sandbox.open(at=states[number], tree="t")
            result = await branch.call("x")
            assert (result.value, result.restored_by) == (str(number), how), number
            assert sandbox.gauges()["replayed_calls"] == replayed
            await branch.close()


async def test_short_calls_are_repeated_and_long_ones_kept() -> None:
    async with Sandbox(LIMITS, replay_below_s=0.2) as sandbox:
        trunk = await sandbox.open(tree="t")
        states, seen = [trunk.state], []
        for cell in ("x = [1]", "x.append(2)", "import time\ntime.sleep(0.25)", "x.append(3)"):
            seen.append((await trunk.call(cell)).snapshot)
            states.append(trunk.state)
        cheap = ReplayReason.CHEAP
        assert seen == [cheap, cheap, KEPT, cheap]
        assert sandbox.gauges()["forks"] == 2  # of the start, and of the kept state
        for number, expected, how, replayed in (
            (2, "[1, 2]", "replay", 2),
            (2, "[1, 2]", "fork", 2),  # what somebody branched from is kept
            (3, "[1, 2]", "fork", 2),
            (4, "[1, 2, 3]", "fork", 2),  # goes on where the trunk stands
            (4, "[1, 2, 3]", "replay", 3),
        ):
            branch = await sandbox.open(at=states[number], tree="t")
            result = await branch.call("x.append(9)\nx[:-1]")
            assert (result.value, result.restored_by) == (expected, how), number
            assert sandbox.gauges()["replayed_calls"] == replayed
            await branch.close()
        assert (await trunk.call("x")).value == "[1, 2, 3]"


async def test_a_short_call_that_is_lost_leaves_the_state_before_it() -> None:
    async with Sandbox(LIMITS, replay_below_s=0.2) as sandbox:
        session = await sandbox.open(tree="t")
        await session.call("x = 1")
        assert not (await session.call("x = 2\nimport os\nos._exit(3)")).state_kept
        assert (await session.call("x")).value == "1"


async def test_large_states_are_evicted_by_their_memory() -> None:
    async with Sandbox(LIMITS, snapshot_mib=100) as sandbox:
        session = await sandbox.open()
        for _ in range(4):
            await session.call("x = bytearray(b'1' * (40 << 20))")
        seen = sandbox.gauges()
        assert 1 <= seen["live_snapshots"] <= 2 and seen["snapshot_bytes"] <= 100 << 20
        assert (await session.call("len(x)")).value == str(40 << 20)


async def test_a_deep_chain_is_rebased_and_goes_on(sandbox: Sandbox) -> None:
    session = await sandbox.open(setup="x = 0")
    for number in range(1, 70):
        assert (await session.call("x += 1\nx")).value == str(number)
    seen = sandbox.gauges()
    assert seen["rebased"] >= 1 and seen["diverged"] == 0
    generations = [snapshot.generation for snapshot in sandbox._shelf._kept]
    assert max(generations) <= 31


async def test_a_deep_chain_that_cannot_be_repeated_goes_on_too(sandbox: Sandbox) -> None:
    session = await sandbox.open()
    first = (await session.call("import os\nx = os.urandom(4)\nx")).value
    for _ in range(35):
        await session.call("y = 1")
    assert (await session.call("x")).value == first
    assert sandbox.gauges()["rebased"] == 0


@pytest.mark.parametrize("who", ["snapshots", "first"])
async def test_killed_snapshots_are_replayed(sandbox: Sandbox, who: str) -> None:
    trunk = await sandbox.open()
    await trunk.call("x = 1")
    await trunk.call("x += 1")
    kept = list(sandbox._shelf._kept)
    victims = [each.process if who == "snapshots" else each.lineage.first for each in kept]
    for pid in {victim.pid for victim in victims if victim.alive}:
        os.kill(pid, signal.SIGKILL)
    await asyncio.sleep(0.3)
    result = await trunk.call("x")
    assert (result.value, result.restored_by) == ("2", "replay")


@pytest.mark.parametrize(
    "code",
    [
        "import socket\nsocket.recv_fds = None",
        "import sandbox.branch as b\nb.fork = lambda: 0",
        "import sandbox.branch as b\nb.fork = lambda: -1",
        "import sandbox.branch as b\nb.take_over = None",
        "import sandbox.branch as b\nb.Place.move = lambda *_: 1 / 0",
        "import os\nos.close(4)",
    ],
)
async def test_a_snapshot_that_was_tampered_with_is_replaced(sandbox: Sandbox, code: str) -> None:
    other = await sandbox.open()
    session = await sandbox.open()
    await session.call("x = 41")
    assert (await session.call(code)).kind is Kind.OK
    for _ in range(2):
        result = await session.call("x + 1")
        if result.kind is Kind.OK:
            assert result.value == "42" and result.restored_by in ("replay", "fresh")
        else:  # its own doing, not the sandbox's, and so neither retried nor masked
            assert result.kind in (Kind.EXITED, Kind.KILLED) and not result.state_kept, result
    assert (await other.call("1")).restored_by == "fresh"


CHANGED = "import os, types\nimport sandbox.branch as b\n"
ELSEWHERE = "b.os = types.SimpleNamespace(**{**vars(os), 'chdir': lambda *_: None})"


@pytest.mark.parametrize(
    ("code", "honest"),
    [("", True), (f"{CHANGED}b._close = lambda *_: None", False), (CHANGED + ELSEWHERE, False)],
)
async def test_a_branch_that_is_seen_to_have_nothing_is_given_its_channel_with_the_answer(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, code: str, honest: bool
) -> None:
    session = await sandbox.open()
    await session.call("x = 1")
    await session.call(code)
    furnished, furnish = list[int](), Question.furnish

    def noted(question: Question, *arguments: Any) -> None:
        furnished.append(question.task)
        furnish(question, *arguments)

    monkeypatch.setattr(Question, "furnish", noted)
    result = await session.call("import os\nx, os.path.samestat(os.stat('.'), os.fstat(4))")
    assert (result.value, result.restored_by) == ("(1, True)", "fresh")
    (lineage,) = session._tree._lineages
    shown = not lineage.covered and os.stat("/proc/self/fd").st_size > 0
    assert bool(furnished) == (not honest or not shown)


async def test_nobody_forks_without_being_asked(sandbox: Sandbox) -> None:
    session = await sandbox.open()
    await session.call("x = 1")
    result = await session.call("import sandbox.branch as b\nb.fork()")
    assert (result.kind, result.state_kept) == (Kind.KILLED, False)
    assert "start a process" in result.traceback
    assert (await session.call("x")).value == "1"


# --- trees ----------------------------------------------------------------------------------------


async def test_the_setup_runs_once_a_tree(sandbox: Sandbox) -> None:
    setup = "import os\nnumbers = [1]\nstamp = os.urandom(8).hex()"
    stamps = set()
    for _ in range(3):
        session = await sandbox.open(setup, tree="t")
        stamps.add((await session.call("numbers.append(2)\n(stamp, numbers)")).value)
        await session.close()
    assert len(stamps) == 1
    with pytest.raises(SandboxFailure, match="setup code failed"):
        await sandbox.open("1 / 0", tree="t")


async def test_a_tree_lasts_until_it_is_released(sandbox: Sandbox) -> None:
    session = await sandbox.open(tree="t")
    await session.call("x = 1")
    state = session.state
    await session.close()
    assert sandbox.gauges()["live_snapshots"] == 1
    branch = await sandbox.open(at=state)  # the state knows its tree
    assert (await branch.call("x")).restored_by == "fork"
    await sandbox.release("t")
    assert sandbox.gauges()["live_trees"] == 1  # a session is still open
    await branch.close()
    seen = sandbox.gauges()
    assert (seen["live_trees"], seen["live_snapshots"]) == (0, 0)
    await sandbox.release("t")
    late = await sandbox.open(at=state)
    assert (await late.call("x")).restored_by == "replay"


async def test_a_state_of_an_earlier_run_is_replayed(sandbox: Sandbox) -> None:
    async with Sandbox(LIMITS) as earlier:
        session = await earlier.open("y = 1", tree="run")
        await session.call("import random\ny += 1\nrandom.random()")
        stored = pickle.dumps(session.state)
    late = await sandbox.open(at=pickle.loads(stored))
    result = await late.call("y")
    assert (result.value, result.restored_by) == ("2", "replay")


async def test_without_branches_no_process_is_forked(sandbox: Sandbox) -> None:
    session = await sandbox.open(keep=Keep.NEWEST)
    for _ in range(5):
        await session.call("x = globals().get('x', 0) + 1")
    assert (await session.call("x")).value == "5"
    assert sandbox.gauges()["forks"] <= 1


async def test_a_call_whose_family_is_lost_is_told_at_once(sandbox: Sandbox) -> None:
    """Not at its time limit: its caller can begin again elsewhere."""
    trunk = await sandbox.open(tree="family")
    await trunk.call("import time")
    branch = await sandbox.open(at=trunk.state)
    await trunk.close()
    running = asyncio.create_task(branch.call("time.sleep(8)"))
    await asyncio.sleep(0.5)
    started = time.monotonic()
    (lineage,) = sandbox._trees["family"]._lineages
    lineage.close()
    result = await running
    assert result.kind is Kind.SANDBOX_FAILURE and not result.state_kept
    assert time.monotonic() - started < 4
    assert (await branch.call("time.time() > 0")).value == "True"
    await branch.close()
    await sandbox.release("family")
