"""Attacks 52 to 61: lying to the supervisor, breaking the loop that reads the cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

from catalogue import PRELUDE, attack, ends

from sandbox.results import Kind

if TYPE_CHECKING:
    from host import World

ends(53, "ends its process as if all were well", Kind.EXITED, cells=("os._exit(0)",))
ends(54, "closes all descriptors", Kind.EXITED, cells=("os.closerange(0, 4096)",))
ends(
    60,
    "reads its input",
    Kind.ERROR,
    cells=("input()", "assert sys.stdin.read() == ''\nraise EOFError", "print(open(0).read(1)[0])"),
)


@attack(52, "leaves by sys.exit")
async def leaves(world: World) -> None:
    for code in ("import sys\nsys.exit(3)", "exit(3)", "raise SystemExit(3)"):
        result = await world.call(code)
        assert (result.kind, result.error_type) == (Kind.EXITED, "SystemExit"), result
        assert result.traceback.rstrip().endswith("3")


FORGED = """
import gc, socket, struct, types
nonces, wires = set(), [m for m in sys.modules.values() if hasattr(m, 'pack_reply')]
frame = sys._getframe()
while frame:
    nonces |= {v for v in frame.f_locals.values() if isinstance(v, bytes) and len(v) < 64}
    frame = frame.f_back
nonces |= {bytes(8), b''}
def forge(kind, value):
    for wire in wires:
        for nonce in nonces:
            try: yield wire.pack_reply(nonce, wire.Reply(kind, value, None, '', False))
            except Exception: pass
"""


@attack(55, "forges results on every descriptor")
async def forges(world: World) -> None:
    kinds = "Kind = next(m.Kind for m in list(sys.modules.values()) if hasattr(m, 'CallResult'))\n"
    async with world.session() as other:
        await other.call("mine = 'untouched'")
        for kind, write in (
            ("OK", "os.write(n, data)"),
            ("OK", "socket.socket(fileno=os.dup(n)).send(data)"),
            ("SANDBOX_FAILURE", "os.write(n, data)"),
        ):
            forge = (
                f"for data in list(forge(Kind.{kind}, 'forged')):\n    for n in range(64):\n"
                f"        try: {write}\n        except (OSError, TypeError): pass\n1 / 0"
            )
            async with world.session() as session:
                await session.call("before = 41")
                result = await session.call(PRELUDE + FORGED + kinds + forge)
                assert result.kind is not Kind.SANDBOX_FAILURE, result
                assert result.value in (None, "forged"), result
                result = await session.call("before + 1")  # may find what was forged for it
                assert result.kind in (Kind.OK, Kind.KILLED), result
                assert (await session.call("before + 1")).value == "42"
        assert (await other.call("mine")).value == "'untouched'"


GARBAGE = (
    "b'\\xff' * 60_000", "b'garbage' * 100", "b'[' * 60_000", "bytes(60_000)",
    "b'9' * 60_000", "bytes(8) + bytes([4, 0]) + bytes(12)", "b'{\"a\":' * 9000",
)  # fmt: skip


@attack(56, "sends garbage for results")
async def garbage(world: World) -> None:
    for data in GARBAGE:
        result = await world.call(f"import os\nos.write(3, {data})", hasty=True)
        assert result.kind in (Kind.KILLED, Kind.EXITED), result  # and not the sandbox's failure


SABOTAGE = (
    "import json\njson.loads = json.dumps = None",
    "import os\nos.read = os.write = os.fork = os.getpid = None",
    "import sys\nsys.stdout = sys.stderr = sys.stdin = None",
    "import sys\nsys.modules.clear()",
    "import builtins\nbuiltins.exec = builtins.eval = builtins.compile = builtins.len = None",
    "import ast, traceback, linecache\nast.parse = None\nlinecache.cache = 0\n"
    "traceback.TracebackException = None",
    "import sys\nfor m in list(sys.modules.values()):\n"
    "    if getattr(m, '__name__', '').startswith('sandbox'): vars(m).clear()",
    "import struct, io, mmap, time, random\n"
    "struct.Struct = io.BufferedWriter = mmap.mmap = time.process_time = random.setstate = None",
    "import gc\nfor o in gc.get_objects():\n"
    "    if type(o).__name__ == 'Runner': o.__dict__.clear()",
    "import sys\nsys.settrace(lambda *a: 1 / 0)\nsys.setrecursionlimit(50)",
)


@attack(57, "sabotages the interpreter it runs in")
async def sabotage(world: World) -> None:
    for code in SABOTAGE:
        async with world.session() as session:
            await session.call("before = 41")
            done = await session.call(code)
            assert done.kind is not Kind.SANDBOX_FAILURE, done
            result = await session.call("before + 1")
            for _ in range(2):  # a broken interpreter may fail once, then the past is restored
                assert result.kind is not Kind.SANDBOX_FAILURE, (code, result)
                if result.value == "42":
                    break
                result = await session.call("before + 1")
            assert result.value == "42" or result.kind in (Kind.ERROR, Kind.EXITED), (code, result)


@attack(58, "speaks in broken text")
async def broken_text(world: World) -> None:
    expected = {
        "print('\\ud800')": Kind.OK,
        "'\\ud800'": Kind.OK,
        "raise ValueError('\\udfff')": Kind.ERROR,
        "print('a\\0b')": Kind.OK,
        "x = '\ud800'": Kind.ERROR,
        "x = 1\0": Kind.ERROR,
        "import os\nos.write(1, b'\\xff\\xfe\\xc0')": Kind.OK,
        "import sys\nsys.stdout.buffer.write(b'\\x80' * 1000)": Kind.OK,
        "raise type('E' * 100_000, (BaseException,), {})": Kind.ERROR,
    }
    for code, kind in expected.items():
        result = await world.call(code)
        assert result.kind is kind, (code, result)


@attack(59, "answers with a value that misbehaves")
async def misbehaving_value(world: World) -> None:
    def value(body: str) -> str:
        return f"class R:\n    def __repr__(self):\n        {body}\nR()"

    assert (await world.call(value("while True: pass"), hasty=True)).kind is Kind.TIMEOUT
    assert (await world.call(value("1 / 0"))).error_type == "ZeroDivisionError"
    assert (await world.call(value("return 1"))).error_type == "TypeError"
    assert (await world.call(value("return 'x' * (1 << 30)"))).kind is Kind.MEMORY
    result = await world.call(value("return 'x' * (30 << 20)"))
    assert result.truncated and len(result.value or "") < 70_000, result.kind
    assert (await world.call(value("raise SystemExit"))).kind is Kind.EXITED


@attack(61, "hangs in hooks")
async def hangs_in_hooks(world: World) -> None:
    hang = "def hang(*_):\n    while True: pass\n"
    result = await world.call("class R:\n    def __del__(self):\n        while True: pass\n"
                              "x = R()\ndel x", hasty=True)  # fmt: skip
    assert result.kind is Kind.TIMEOUT, result
    for hook in (
        "import atexit\natexit.register(hang)",
        "import os\nos.register_at_fork(before=hang, after_in_child=hang, after_in_parent=hang)",
        "import threading\nthreading._register_atexit(hang)",
        "import weakref, gc\nclass T: pass\nt = T()\nweakref.finalize(t, hang)",
        "import sys\nsys.excepthook = sys.unraisablehook = hang",
    ):
        async with world.session(hasty=True) as session:
            await session.call("before = 41")
            assert (await session.call(hang + hook)).kind is Kind.OK
            result = await session.call("import sys\nsys.exit(3)")
            assert result.kind in (Kind.EXITED, Kind.TIMEOUT), (hook, result)
            assert (await session.call("before + 1")).kind in (Kind.OK, Kind.TIMEOUT)
            assert (await session.call("before + 1")).value == "42", hook
