"""Files in and out of sessions, and figures, over real processes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio

from sandbox.limits import MAX_FIGURES, Limits
from sandbox.png import cleaned, size_of
from sandbox.results import CallResult, FileRefused, Keep, Kind, SessionState
from sandbox.supervisor import Sandbox, Session

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="module")]

LIMITS = Limits(wall_s=60, cpu_s=60)
"""Generous in time: a busy machine fails no test."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sandbox() -> AsyncIterator[Sandbox]:
    async with Sandbox(LIMITS) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def session(sandbox: Sandbox) -> AsyncIterator[Session]:
    made = await sandbox.open()
    yield made
    await made.close()


def travelled(state: SessionState) -> SessionState:
    """The state as another host gets it: nothing there knows its tree."""
    return replace(state, tree="elsewhere", host="elsewhere")


def running() -> set[str]:
    """Descriptors of this process."""
    return set(os.listdir("/proc/self/fd"))


# --- files ----------------------------------------------------------------------------------------


async def test_files_go_in_and_out(session: Session) -> None:
    await session.put("data/in.bin", bytes(range(256)))
    result = await session.call(
        "data = open('data/in.bin', 'rb').read()\n"
        "open('out.bin', 'wb').write(data[::-1])\nopen('data/in.bin', 'ab').write(b'more')"
    )
    assert (result.kind, result.restored_by, result.snapshot) == (Kind.OK, "fresh", "kept")
    assert result.files == (("data/in.bin", 260), ("out.bin", 256))
    assert await session.get("out.bin") == bytes(range(256))[::-1]
    assert await session.get("data/in.bin") == bytes(range(256)) + b"more"
    assert (await session.call("1")).files == ()


async def test_a_put_is_a_state_that_branches(sandbox: Sandbox, session: Session) -> None:
    await session.call("x = 1")
    before = session.state
    await session.put("a", b"first")
    middle = session.state
    await session.put("a", b"second")
    assert before != middle != session.state
    for at, expected in ((before, None), (middle, b"first"), (session.state, b"second")):
        for seen, how in ((at, "fork"), (travelled(at), "replay")):
            branch = await sandbox.open(at=seen)
            if expected is None:
                with pytest.raises(FileRefused, match="No such file"):
                    await branch.get("a")
            else:
                assert await branch.get("a") == expected
            await branch.put("b", b"mine")
            result = await branch.call("import os\nx, sorted(os.listdir()), open('b').read()")
            names = "['b']" if expected is None else "['a', 'b']"
            assert (result.value, result.restored_by) == (f"(1, {names}, 'mine')", how)
            await branch.close()
    with pytest.raises(FileRefused, match="No such file"):
        await session.get("b")


@pytest.mark.parametrize("keep", [Keep.STATES, Keep.NEWEST])
async def test_files_reach_a_process_that_cannot_be_forked(sandbox: Sandbox, keep: Keep) -> None:
    session = await sandbox.open(keep=keep)
    await session.call(
        "import threading\nt = threading.Thread(target=threading.Event().wait, daemon=True)\n"
        "t.start()\nf = open('held', 'w+')"
    )
    await session.put("a", b"x")
    result = await session.call("open('a').read(), t.is_alive()")
    assert result.value == "('x', True)" and result.restored_by == "fresh"
    assert await session.get("a") == b"x" and await session.get("held") == b""
    await session.close()


async def test_a_session_that_keeps_nothing_takes_no_file(sandbox: Sandbox) -> None:
    session = await sandbox.open("open('a', 'w').write('x')", keep=Keep.NOTHING)
    with pytest.raises(FileRefused, match="keeps nothing"):
        await session.put("b", b"x")
    assert await session.get("a") == b"x"
    await session.close()
    with pytest.raises(ValueError, match="session is closed"):
        await session.get("a")
    with pytest.raises(ValueError, match="session is closed"):
        await (await closed(sandbox)).put("a", b"")


async def closed(sandbox: Sandbox) -> Session:
    session = await sandbox.open()
    await session.close()
    return session


async def test_a_refused_file_leaves_everything_as_it_was(session: Session) -> None:
    await session.call("import os\nos.mkdir('d')\nx = 1")
    for name, data in (("d", b"x"), ("../x", b"x"), ("big", bytes((16 << 20) + 1))):
        with pytest.raises(FileRefused):
            await session.put(name, data)
    await session.put("half", bytes(9 << 20))
    with pytest.raises(FileRefused, match="no room; a session may have 64 files"):
        await session.put("other", bytes(9 << 20))
    result = await session.call("x, sorted(os.listdir())")
    assert (result.value, result.restored_by) == ("(1, ['d', 'half'])", "fresh")


async def test_what_was_put_counts_for_the_code_too(session: Session) -> None:
    await session.put("a", bytes(12 << 20))
    result = await session.call("open('b', 'wb').write(bytes(8 << 20))")
    assert (result.kind, result.state_kept) == (Kind.OUTPUT, False)
    assert len(await session.get("a")) == 12 << 20


HOSTILE = """
import builtins, io, os
def no(*_, **__): raise SystemExit('no')
builtins.open = io.open = os.open = os.stat = os.rename = os.mkdir = os.scandir = no
"""


async def test_the_code_takes_no_part(sandbox: Sandbox, session: Session) -> None:
    await session.call("real = open\nreal('a', 'w').write('x')\n" + HOSTILE)
    assert await session.get("a") == b"x"
    await session.put("b", b"y")  # by replay: its process ended instead of being forked
    assert (await session.get("a"), await session.get("b")) == (b"x", b"y")
    assert (await session.call("real('b').read()")).replay_reason == "lost"


async def test_a_broken_session_refuses_files(sandbox: Sandbox) -> None:
    session = await sandbox.open()
    await session.call(
        "import os, sys, time\nprint(time.time_ns())\nopen('a', 'w').close()\n"
        "sys.modules['sandbox.branch'].fork = lambda: os._exit(3)"
    )
    assert await session.get("a") == b""
    with pytest.raises(FileRefused, match="broke the session's process"):
        await session.put("a", b"x")
    with pytest.raises(FileRefused, match="broke the session's process"):
        await session.get("a")
    await session.close()


async def test_odd_names_that_code_made_can_be_got(session: Session) -> None:
    result = await session.call(r"open(b'\xff\n', 'wb').write(b'1'); open('ä', 'wb').write(b'2')")
    assert [await session.get(file.name) for file in result.files] == [b"2", b"1"]


async def test_a_name_that_was_given_up_leaves_nothing(sandbox: Sandbox) -> None:
    session = await sandbox.open()
    await session.call("1")
    before = running()
    for _ in range(20):
        await session.put("a", b"x")
        with pytest.raises(FileRefused):
            await session.get("nothing")
        with pytest.raises(FileRefused):
            await session.put("a/b", b"x")
    given_up = asyncio.create_task(session.put("big", bytes(15 << 20)))
    await asyncio.sleep(0.01)
    given_up.cancel()
    await asyncio.wait({given_up})
    assert (await session.call("import os\nos.listdir()")).value in ("['a']", "['a', 'big']")
    await session.close()
    assert len(running()) <= len(before)


async def test_files_survive_a_process_that_is_killed_from_outside(sandbox: Sandbox) -> None:
    session = await sandbox.open()
    await session.put("a", b"x")
    for wanted in (session.get("a"), session.put("b", b"y")):
        for snapshot in list(sandbox._shelf._kept):
            os.kill(snapshot.process.pid, signal.SIGKILL)
        assert await wanted in (b"x", None)
    assert (await session.get("a"), await session.get("b")) == (b"x", b"y")
    assert (await session.call("1")).replay_reason == "lost"
    await session.close()


# --- figures --------------------------------------------------------------------------------------


def sizes(result: CallResult) -> list[tuple[int, int]]:
    assert result.kind in (Kind.OK, Kind.ERROR), result
    assert all(cleaned(image) == image for image in result.figures)
    return [size_of(image) for image in result.figures]


async def test_figures_are_shown_as_in_a_notebook(sandbox: Sandbox, session: Session) -> None:
    plot = await session.call("import matplotlib.pyplot as plt\nplt.plot([1, 2])")
    assert sizes(plot) == [(640, 480)] and plot.stderr == plot.stdout == ""
    assert plot.value is not None and plot.value.startswith("[<matplotlib.lines.Line2D")
    assert plot.snapshot == "kept" and plot.files == ()
    assert sizes(await session.call("1")) == [], "it is closed"
    two = await session.call("plt.plot([1])\nplt.show()\nplt.plot([2])\nplt.show()")
    assert len(two.figures) == 2 and two.figures[0] != two.figures[1]
    assert (two.value, two.stderr) == (None, "")
    code = "fig, ax = plt.subplots(2, figsize=(3, 2))\nplt.figure()\n1 / 0"
    failed = await session.call(code)
    assert (failed.error_type, sizes(failed)) == ("ZeroDivisionError", [(300, 200)])
    again = await session.call("fig")
    assert sizes(again) == [(300, 200)] and "2 Axes" in (again.value or "")
    saved = await session.call(
        "fig.savefig('a.png')\nplt.figure(2).add_subplot()\nplt.gcf().show()"
    )
    assert (saved.error_type, sizes(saved)) == (None, [(640, 480)])
    assert (await session.call("plt.get_fignums()")).value == "[]"
    assert size_of(await session.get("a.png")) == (300, 200)
    agg = await session.call("import matplotlib\nmatplotlib.use('Agg')\nplt.plot([3])\nplt.show()")
    assert sizes(agg) == [(640, 480)] and agg.stderr == ""
    assert (await session.call("matplotlib.get_backend().lower()")).value == "'agg'"
    branch = await sandbox.open(at=travelled(session.state))
    assert sizes(await branch.call("plt.plot([4]); None")) == [(640, 480)]
    await branch.close()


async def test_figures_work_where_matplotlib_was_imported_beforehand() -> None:
    async with Sandbox(LIMITS, preload=["matplotlib.pyplot"]) as made:
        session = await made.open()
        assert sizes(await session.call("import pylab\npylab.plot([1, 2])")) == [(640, 480)]
        result = await session.call("import tempfile\ntempfile.TemporaryFile().write(b'x')")
        assert result.value == "1", result


@pytest.mark.parametrize(
    ("code", "shown", "said"),
    [
        ("for i in range(12): plt.figure(); plt.plot([i])", MAX_FIGURES, "may show 8"),
        ("plt.figure(figsize=(300, 300)); plt.plot([1])", 0, "30000 x 30000 pixels are too many"),
        ("plt.figure(figsize=(200, 1)); plt.plot([1])", 0, "20000 x 100 pixels are too many"),
        ("plt.title('$\\\\nosuch$')", 0, "ValueError: \\nosuch"),
        (
            "from random import random\nplt.figure(figsize=(12, 12))\n"
            "plt.imshow([[random() for _ in range(1200)] for _ in range(1200)])",
            0,
            "the figures of a call may have 2 MiB",
        ),
    ],
)
async def test_a_figure_that_is_left_out_is_said(
    session: Session, code: str, shown: int, said: str
) -> None:
    result = await session.call(f"import matplotlib.pyplot as plt\n{code}\n1 + 1")
    assert (result.value, len(result.figures)) == ("2", shown)
    assert "[a figure is left out: " in result.stderr and said in result.stderr
    assert result.truncated == ("figures",) and result.stderr.count("\n") <= 4
    assert (await session.call("plt.get_fignums()")).value == "[]"


async def test_large_figures_arrive_whole() -> None:
    async with Sandbox(Limits(output_kib=1)) as made:
        session = await made.open()
        noise = "plt.imshow([[random() for _ in range(600)] for _ in range(600)])"
        result = await session.call(
            "import matplotlib.pyplot as plt\nfrom random import random\n"
            f"for _ in '123': plt.figure(figsize=(6, 6)); {noise}"
        )
        assert sizes(result) == [(600, 600)] * 3, result.stderr
        assert sum(map(len, result.figures)) > 1 << 20


FORGES = """
import os, struct
from sandbox import runner
write = runner.pack_reply
def forged(nonce, reply):
    return write(nonce, runner.replace(reply, figures=FIGURES))
runner.pack_reply = forged
"""


@pytest.mark.parametrize(
    ("figures", "kind"),
    [
        ("(b'GIF89a' * 9, b'x')", Kind.OK),
        ("(b'\\x89PNG\\r\\n\\x1a\\n' + bytes(100),)", Kind.OK),
        ("(bytes(3 << 20),)", Kind.KILLED),
        ("(b'x',) * 1000", Kind.KILLED),
    ],
)
async def test_forged_figures_are_no_figures(
    sandbox: Sandbox, session: Session, figures: str, kind: Kind
) -> None:
    await session.call("x = 41")
    before = session.state
    await session.call(FORGES.replace("FIGURES", figures))
    result = await session.call("1")
    assert (result.kind, result.figures) == (kind, ())
    assert result.truncated == (("figures",) if kind is Kind.OK else ())
    branch = await sandbox.open(at=before)
    assert (await branch.call("x + 1")).value == "42"
    await branch.close()


async def test_code_that_spoils_the_drawing_gets_its_result(session: Session) -> None:
    spoils = (
        "import matplotlib.pyplot as plt, matplotlib._pylab_helpers as h\nplt.plot([1])\n"
        "def no(*_): raise BaseException\nh.Gcf.get_all_fig_managers = no\n'got'"
    )
    assert (await session.call(spoils)).value == "'got'"
    slow = "import time\nh.Gcf.get_all_fig_managers = lambda: time.sleep(60)\n'slow'"
    async with Sandbox(Limits(wall_s=2, cpu_s=60)) as hasty:
        late = await (await hasty.open()).call(spoils + "\n" + slow)
        assert (late.kind, late.figures) == (Kind.TIMEOUT, ())
