"""Attacks 101 to 106, 115 and 116: on the way of files and figures out of a session and into it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from catalogue import PRELUDE, attack

from sandbox.limits import MAX_FIGURES, MAX_FIGURES_BYTES
from sandbox.png import cleaned
from sandbox.results import FileRefused, Kind
from sandbox.supervisor import Session

if TYPE_CHECKING:
    from host import World


async def refuses(session: Session, name: str) -> None:
    """A file of this name can neither be put nor got."""
    for wanted in (session.get(name), session.put(name, b"x")):
        try:
            await wanted
        except FileRefused as refused:
            assert "\n" not in str(refused)
        else:
            raise AssertionError(f"{name!r} got through")


@attack(101, "spoils every function that opens and writes files")
async def spoils_functions(world: World) -> None:
    spoils = (
        "import builtins, io, os, shutil\nreal = open\nreal('mine', 'w').write('x')\n"
        "def no(*_, **__): raise SystemExit('no')\n"
        "builtins.open = io.open = os.open = os.rename = os.mkdir = os.stat = no"
    )
    async with world.session() as session:
        await session.call(spoils)
        await session.put("a/b", b"put")
        assert (await session.get("a/b"), await session.get("mine")) == (b"put", b"x")
        result = await session.call("real('a/b').read(), real('a/b', 'a').write('!')")
        assert result.value == "('put', 1)", result  # it is the code's own
        assert await session.get("a/b") == b"put!"


@attack(102, "names files of the host, and puts other things where files shall go")
async def other_things(world: World) -> None:
    async with world.session() as session:
        await session.call("import os\nos.mkdir('d')\nopen('f', 'w').write('x')\nos.chdir('d')")
        climbs = "../" * 9 + world.canary.lstrip("/")
        names = [world.canary, climbs, "/proc/self/environ", "d/../../x", "", ".", "d/..", "x\0"]
        for name in [*names, "d", "f/x"]:
            await refuses(session, name)
        await session.put("x", b"at the top, wherever the code stands")
        assert (await session.call("sorted(os.listdir('..'))")).value == "['d', 'f', 'x']"


@attack(103, "links to files of the host, through every call that could")
async def links(world: World) -> None:
    cell = PRELUDE + (
        "for make in (os.symlink, os.link):\n"
        "    try: make($CANARY, 'a')\n    except OSError: pass\n"
        "try: os.mkfifo('b')\nexcept OSError: pass\n"
        "try: os.mknod('c', 0o020666, os.makedev(1, 5))\nexcept OSError: pass"
    ).replace("$CANARY", repr(world.canary))
    async with world.session() as session:
        await session.call(cell)
        for name in "abc":
            try:
                found = await session.get(name)
            except FileRefused:
                found = b""
            assert world.secret.encode() not in found
            await session.put(name, b"mine")
            assert await session.get(name) == b"mine"


@attack(104, "locks the host out of its folders")
async def locks_out(world: World) -> None:
    async with world.session() as session:
        await session.call("import os\nos.umask(0o777)\nos.mkdir('d')\nopen('f', 'w').write('x')")
        for name in ("d/x", "f"):
            try:
                await session.put(name, b"put")
                assert await session.get(name) == b"put"
            except FileRefused as refused:
                assert "ermission" in str(refused), refused
        assert (await session.call("1 + 1")).value == "2"


@attack(105, "forges figures")
async def forges_figures(world: World) -> None:
    forge = (
        "import dataclasses, os\nrunner = sys.modules['sandbox.runner']\n"
        "take = runner.Runner._with_figures\n"
        "def forged(self, reply, value):\n"
        "    return dataclasses.replace(take(self, reply, value), figures=FIGURES)\n"
        "runner.Runner._with_figures = forged"
    )
    for figures in (
        "(b'<svg onload=alert(1)>',)",
        "(bytes(3 << 20),)",
        "(b'x',) * 9",
        "(b'\\x89PNG\\r\\n\\x1a\\n' + b'\\0\\0\\0\\rIHDR' + b'\\xff' * 100,)",
        "(os.urandom(1000),) * 8",
    ):
        async with world.session() as session:
            await session.call("x = 41")
            state = session.state
            await session.call(PRELUDE + forge.replace("FIGURES", figures))
            result = await session.call("1")
            assert result.kind in (Kind.OK, Kind.KILLED), result
            assert all(cleaned(image) for image in result.figures), result
            assert len(result.figures) <= MAX_FIGURES
            async with world.session(at=state) as sibling:
                assert (await sibling.call("x + 1")).value == "42"


@attack(106, "announces figures that never end")
async def endless_figures(world: World) -> None:
    for size in (MAX_FIGURES_BYTES, (1 << 32) - 1):
        cell = (
            "import os, struct\nframe = sys._getframe()\n"
            "while 'nonce' not in frame.f_locals: frame = frame.f_back\n"
            "head = struct.pack('!8sBBIIII', frame.f_locals['nonce'], 0, 0, 0, 0, 0, SIZE)\n"
            "os.write(3, head)\nwhile True: os.write(3, bytes(1 << 16))"
        ).replace("SIZE", str(size))
        result = await world.call(PRELUDE + cell)
        assert (result.kind, result.figures) == (Kind.KILLED, ()), result
        assert result.duration_s < 20


@attack(115, "makes folders and files that not even it may read")
async def unreadable(world: World) -> None:
    async with world.session() as session:
        await session.call("import os")
        for cell in (
            "os.mkdir('a', 0)",
            "os.umask(0o777)\nos.mkdir('b')\nopen('f', 'w').write('x')",
        ):
            result = await session.call(cell)
            assert (result.kind, result.snapshot) == (Kind.OK, "kept"), result
        for look in ("sorted(os.listdir())", "os.listdir('a'), os.listdir('b'), open('f').read()"):
            result = await session.call(look)
            assert (result.kind, result.replay_reason) == (Kind.OK, ""), result
        assert result.value == "([], [], 'x')"


@attack(116, "keeps files without a name while it runs")
async def nameless_while_running(world: World) -> None:
    hoard = (
        "import mmap, time\nkept = []\nfor _ in range(40):\n"
        "    fd = os.open('x', os.O_CREAT | os.O_RDWR)\n    os.posix_fallocate(fd, 0, 15 << 20)\n"
        "    os.unlink('x')\n    KEEP\n    time.sleep(0.02)\ntime.sleep(20)"
    )
    for keep in (
        "kept.append(fd)",
        "kept.append(mmap.mmap(fd, 4096, access=mmap.ACCESS_COPY)); os.close(fd)",
    ):
        result = await world.call(PRELUDE + hoard.replace("KEEP", keep))
        assert result.kind is Kind.OUTPUT and result.duration_s < 10, (keep, result)
    honest = "for _ in range(40):\n" + hoard.partition("range(40):\n")[2].replace(
        "KEEP", "os.close(fd)"
    )
    result = await world.call(PRELUDE + "import time\n" + honest.replace("sleep(20)", "sleep(0.6)"))
    assert result.kind is Kind.OK, result
