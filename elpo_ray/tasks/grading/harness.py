"""What runs a submitted program on one test. Shipped as source into a session of the sandbox.

It shares its process with the program, which may be hostile: what it reports is the program's own
claim. Builtins and standard library only. The program gets the names that LiveCodeBench gives it,
its file descriptors 0 to 2 are its own for its run, so that `open(0)`, `sys.stdin.buffer`,
`os.write` and `print` all work, and it ends as an interpreter does: what is printed by threads,
by `atexit`, by destructors, by files that were never closed or before `os._exit(0)` counts.
"""

from __future__ import annotations

import atexit
import base64
import builtins
import gc
import hashlib
import json
import numbers
import os
import posix
import resource
import sys
import threading
import types
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

MARK = "verdict:"
"""Comes before what the harness says, in what a cell prints."""
PIECE_BYTES = 12 << 10
"""An output is reported in pieces of so many packed bytes: what a session may say is bounded."""
RECURSION_LIMIT = 50_000
STACK_BYTES = 512 << 20
"""The stack that recursion through compiled functions (`lru_cache`) of that depth may take."""
STARRED = """string re datetime collections heapq bisect copy math random statistics itertools
functools operator io sys json"""
"""LiveCodeBench's environment: all names of these modules, later ones first, then the builtins and
`typing`; and the modules themselves."""
DEVICES = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
"""Names that the sandbox does not have."""

packed_output = b""
"""The last output, compressed, for `piece`."""


def run_test(program: str, test: dict[str, Any]) -> dict[str, Any]:
    """What `program` (source) makes of `test`: `status` ("ok", "syntax", "error") and, if ok, what
    `report` says of its output."""
    prepare_interpreter()
    try:
        code = compile(program, "<program>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {"status": "syntax"}
    try:
        return report(output_of(code, test))
    except Exception:
        return {"status": "error"}


def output_of(code: types.CodeType, test: dict[str, Any]) -> bytes:
    """What the program prints, or what its function returns as JSON. Raises what it raises."""
    encode = json.dumps  # before the program may change it
    with Streams(test["input"]) as streams:
        if test["check"] is not None:
            exec(test["check"], run_module(code, "__program__").__dict__)
            return b""
        if test["call"] is not None:
            value = run_call(code, test["call"], test["arguments"], test["keywords"])
            return encode(plain(value)).encode()
        with leaving(lambda: streams.say(report(streams.printed()))):
            finish(run_module(code, "__main__"))
    return streams.printed()


def report(output: bytes) -> dict[str, Any]:
    """What is said of an output at once: its digest, its size and its first piece."""
    global packed_output
    packed_output = zlib.compress(output, 1)
    text = output.decode("utf-8", "backslashreplace")
    return {"status": "ok", "digest": digest(text), "size": len(output), "head": piece(0)}


def piece(number: int) -> str:
    """A part of the compressed output, as base64."""
    start = number * PIECE_BYTES
    return base64.b64encode(packed_output[start : start + PIECE_BYTES]).decode("ascii")


def digest(output: str) -> str:
    """Fingerprint of the lines of `output`, spaces at their ends aside."""
    lines = [line.strip() for line in output.strip().split("\n")]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def plain(value: Any) -> Any:
    """A result as JSON data: numpy's numbers and arrays, tuples, fractions as what they equal.
    What has no such form is left to `json`, which refuses it."""
    if isinstance(value, dict):
        return {plain(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if hasattr(value, "tolist") and not isinstance(value, type):
        return plain(value.tolist())
    if isinstance(value, numbers.Number) and not isinstance(value, int | float | complex):
        whole = int(value)  # type: ignore[call-overload]
        return whole if whole == value else float(value)  # type: ignore[arg-type]
    return value


# --- the program's surroundings -------------------------------------------------------------------


def prepare_interpreter() -> None:
    """Recursion and long integers as LiveCodeBench allows them."""
    sys.setrecursionlimit(RECURSION_LIMIT)
    if hasattr(sys, "set_int_max_str_digits"):  # not before Python 3.11
        sys.set_int_max_str_digits(0)
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    with suppress(OSError, ValueError):
        size = STACK_BYTES if hard == resource.RLIM_INFINITY else min(STACK_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_STACK, (size, hard))


def surroundings() -> dict[str, Any]:
    """The names that a program finds without importing them, as its builtins: so they are told from
    those that it defines."""
    names: dict[str, Any] = {}
    for module in STARRED.split():
        exec(f"from {module} import *", names)
    names |= vars(builtins)
    exec(f"from typing import *\nimport {', '.join(STARRED.split())}", names)
    return names | {"open": open_device}


def open_device(file: Any, *rest: Any, **named: Any) -> Any:
    """`open`, which knows the standard streams by their paths too."""
    number = DEVICES.get(file) if isinstance(file, str) else None
    return open(file if number is None else os.dup(number), *rest, **named)


def run_module(code: types.CodeType, name: str) -> types.ModuleType:
    """The module after its code ran to the end, its threads included."""
    module = types.ModuleType(name)
    module.__dict__["__builtins__"] = surroundings()
    sys.modules[name] = module
    before = threading.enumerate()
    try:
        exec(code, module.__dict__)
    except SystemExit as end:
        if end.code not in (None, 0):
            raise RuntimeError("exit status") from None
    for end_pool in reversed(getattr(threading, "_threading_atexits", ())):
        end_pool()
    for thread in threading.enumerate():
        if thread not in before and not thread.daemon:
            thread.join()
    return module


def run_call(
    code: types.CodeType, name: str, arguments: list[Any], keywords: dict[str, Any]
) -> Any:
    """What the method `name` of `Solution` returns, or the function of that name."""
    defined = run_module(code, "__program__").__dict__
    name = name.rpartition(".")[2]
    if hasattr(defined.get("Solution"), name):
        return getattr(defined["Solution"](), name)(*arguments, **keywords)
    return defined[name](*arguments, **keywords)


def finish(module: types.ModuleType) -> None:
    """End a program as the interpreter ends: its last functions run, its objects go."""
    with suppress(Exception):
        atexit._run_exitfuncs()
    for private in (True, False):
        for name in [each for each in vars(module) if each.startswith("_") is private]:
            if name != "__builtins__":
                module.__dict__[name] = None
    flush(sys.stdout)
    gc.collect()


def flush(stream: Any) -> None:
    """Flush what a program left in place of a stream, closed and detached ones aside."""
    with suppress(Exception):
        stream.flush()


@contextmanager
def leaving(report_now: Callable[[], None]) -> Iterator[None]:
    """Within it `os._exit(0)` reports what was printed so far, before it ends the process."""
    end_process = os._exit

    def leave(status: int) -> None:
        if status == 0:
            report_now()
        end_process(status)

    os._exit = posix._exit = leave  # type: ignore[assignment]
    try:
        yield
    finally:
        os._exit = posix._exit = end_process


class Streams:
    """Standard input with a text, standard output into a file, standard error to nowhere.

    The files have no names, so they count neither as the program's nor among what it sees.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._stdout = os.open("stdout", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.unlink("stdout")

    def __enter__(self) -> Streams:
        flush(sys.stdout)
        self._saved = [os.dup(number) for number in range(3)]
        self._objects = sys.stdin, sys.stdout
        put_in_place(open_input(self._text.encode("utf-8", "surrogatepass")), 0)
        put_in_place(os.dup(self._stdout), 1)
        with suppress(OSError):
            put_in_place(os.open(os.devnull, os.O_WRONLY), 2)
        sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)  # type: ignore[misc]
        self._out = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        sys.stdout = sys.__stdout__ = self._out  # type: ignore[misc]
        return self

    def __exit__(self, *_: object) -> None:
        flush(sys.stdout)
        flush(self._out)
        flush(sys.stderr)
        for number, descriptor in enumerate(self._saved):
            put_in_place(descriptor, number)
        sys.stdin, sys.stdout = self._objects
        sys.__stdin__, sys.__stdout__ = self._objects  # type: ignore[misc, assignment]

    def printed(self) -> bytes:
        """What has reached the file."""
        size = os.fstat(self._stdout).st_size
        return os.pread(self._stdout, size, 0)

    def say(self, told: dict[str, Any]) -> None:
        """Report from within the program's run."""
        os.write(self._saved[1], f"\n{MARK}{json.dumps(told)}\n".encode())


def put_in_place(descriptor: int, number: int) -> None:
    """Have `number` be what `descriptor` is, which is closed."""
    os.dup2(descriptor, number)
    os.close(descriptor)


def open_input(data: bytes) -> int:
    """A descriptor to read `data` from: a file, which can be sought in, or a pipe for more than a
    file of the session may hold."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit == resource.RLIM_INFINITY or len(data) <= limit:
        descriptor = os.open("stdin", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.unlink("stdin")
        with open(descriptor, "wb", closefd=False) as file:
            file.write(data)
        os.lseek(descriptor, 0, os.SEEK_SET)
        return descriptor
    reading, writing = os.pipe()
    threading.Thread(target=feed, args=(writing, data), daemon=True).start()
    return reading


def feed(descriptor: int, data: bytes) -> None:
    """Write `data` until nobody reads on."""
    with suppress(OSError), open(descriptor, "wb") as pipe:
        pipe.write(data)
