"""The loop inside a session's process: read a cell and run it, or fork a branch that will.

This code shares its process with hostile code and so guards nothing: it only tries to report well
when the code is honest. All enforcement is outside (kernel layers, supervisor).

A branch is forked by a bare system call, while this process is alone in itself (the supervisor saw
to that): no at-fork hook runs, so the state of `random` goes on in every branch and code cannot
hang a fork.
"""

from __future__ import annotations

import _sitebuiltins
import ast
import builtins
import errno
import inspect
import io
import linecache
import mmap
import os
import random
import resource
import signal
import sys
import traceback
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import CodeType
from typing import Any, cast

from sandbox import branch
from sandbox.figures import Gallery
from sandbox.programs import refuse_programs
from sandbox.results import FENCED, Kind
from sandbox.wire import (
    CELL_HEADER_BYTES,
    CONTROL_FD,
    COVER,
    FORK,
    OUT_OF_MEMORY_STATUS,
    START_NONCE,
    UNCOVER,
    Reply,
    pack_reply,
    ticket_of,
    unpack_cell_header,
)

_BROKEN_RUNNER_STATUS = 70
_NAME_CHARS = 200
_AWAITS = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
_BALLAST_BYTES = 4 << 20
"""Address space kept in hand (never touched) for reporting a MemoryError."""


def _cut(text: str, limit: int) -> tuple[str, bool]:
    """Head and tail of `text`, at most `limit` characters, and whether some are missing."""
    if len(text) <= limit:
        return text, False
    half = limit // 2
    return f"{text[:half]}\n... [{len(text) - 2 * half} left out] ...\n{text[-half:]}", True


def _unfenced(code: str) -> str:
    """What stands in a Markdown fence, if that is all there is."""
    found = FENCED.fullmatch(code) if "```" in code or "~~~" in code else None
    return code if found is None else found[2]


def _compiled(code: str, name: str) -> tuple[CodeType, CodeType | None]:
    """The statements of a cell, and its last expression if it ends in one. Both may await."""
    tree = ast.parse(code, name)
    last = None
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        final = tree.body.pop()
        assert isinstance(final, ast.Expr)
        last = compile(ast.Expression(final.value), name, "eval", _AWAITS, dont_inherit=True)
    return compile(tree, name, "exec", _AWAITS, dont_inherit=True), last


def _evaluated(code: CodeType, names: dict[str, Any]) -> Any:
    """What the code comes to; with an event loop for it alone if it awaits at its top level."""
    result = eval(code, names)
    if code.co_flags & inspect.CO_COROUTINE:
        import asyncio  # takes long, and few cells need it

        return asyncio.run(result)
    return result


def _tell_memory() -> None:
    """Have `os.sysconf` name the memory that a session may use: how much the machine has, and how
    much of it is free, the kernel does not tell."""
    asked, pages = os.sysconf, resource.getrlimit(resource.RLIMIT_AS)[0] // mmap.PAGESIZE
    names = ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES")
    memory = {*names, *(os.sysconf_names[name] for name in names)}
    vars(os)["sysconf"] = lambda name: pages if name in memory else asked(name)


def _disarm() -> None:
    """Clear the alarms that a cell has left: they would end or disturb another cell."""
    for which in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
        signal.setitimer(which, 0)


def _keep_own_frames(report: traceback.TracebackException) -> None:
    """Drop, here and in the chained exceptions, every frame but those of cells."""
    own = [frame for frame in report.stack if frame.filename.startswith("<cell ")]
    report.stack = traceback.StackSummary.from_list(own)
    for chained in (report.__cause__, report.__context__):
        if chained is not None:
            _keep_own_frames(chained)


def _describe(error: BaseException) -> str:
    """The traceback; of an exception whose class does not let itself be described, its name."""
    try:
        report = traceback.TracebackException(
            type(error), error, error.__traceback__, lookup_lines=False
        )
        _keep_own_frames(report)
        return "".join(report.format())
    except BaseException:  # code of the exception's class
        return f"{_name(error)}: <no description>\n"


def _name(error: BaseException) -> str:
    """The name of its class, whatever its metaclass says."""
    name = type.__dict__["__name__"].__get__(type(error))
    return str(name)[:_NAME_CHARS]


def _writable(stream: Any) -> bool:
    """Whether one can print to it: it is neither closed nor detached."""
    try:
        return stream is not None and not stream.closed and stream.writable()
    except BaseException:  # code of the stream's class
        return False


class Runner:
    """The interpreter of one session."""

    def __init__(self, keep_chars: int) -> None:
        """`keep_chars` bounds value and traceback."""
        self._keep = keep_chars
        self._ballast = mmap.mmap(-1, _BALLAST_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        module = types.ModuleType("__main__")
        module.__dict__["__builtins__"] = builtins
        sys.modules["__main__"] = module
        self._names: dict[str, Any] = module.__dict__
        vars(builtins).update(exit=sys.exit, quit=sys.exit, help=_sitebuiltins._Helper())
        refuse_programs()
        _tell_memory()
        # fork() reseeded it from the system; the same beginning everywhere makes replay exact
        random.seed(0)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(0)
        stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        vars(sys).update(stdin=stdin, __stdin__=stdin)
        self._gallery = Gallery()
        self._streams: dict[str, io.TextIOWrapper] = {}
        for name in ("stdout", "stderr"):
            setattr(sys, name, None)  # the spawner's
        self._open_streams()

    def _open_streams(self) -> None:
        """Standard streams over descriptors 1 and 2, in the place of those that are of no use any
        longer. What the code has put there itself stays, as long as it can be written to."""
        for number, name in ((1, "stdout"), (2, "stderr")):
            old = self._streams.get(name)
            if not _writable(old):
                raw = io.BufferedWriter(io.FileIO(number, "w", closefd=False), 1 << 16)
                self._streams[name] = io.TextIOWrapper(
                    raw, encoding="utf-8", errors="backslashreplace", line_buffering=True
                )
            for place in (name, f"__{name}__"):
                found = getattr(sys, place, None)
                if found is old or not _writable(found):
                    setattr(sys, place, self._streams[name])

    def _finish(self) -> None:
        """Print what the code left in buffers, and clear its alarms."""
        with suppress(BaseException):  # an alarm's handler
            _disarm()
        streams: list[Any] = [getattr(sys, name, None) for name in self._streams]  # if still there
        for stream in [*streams, *self._streams.values()]:
            with suppress(BaseException):  # an object of the code's own
                stream.flush()

    @contextmanager
    def room(self) -> Iterator[None]:
        """Some memory for the block, whatever the code has kept."""
        self._ballast.close()
        try:
            yield
        finally:
            self._take_ballast()

    def _take_ballast(self) -> None:
        with suppress(OSError):  # the code may have kept all there is
            self._ballast = mmap.mmap(-1, _BALLAST_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def run(self, code: str, index: int) -> Reply:
        """Run one cell to its end, whatever it raises."""
        name, value = f"<cell {index}>", cast(Any, None)
        try:
            self._open_streams()
            code = _unfenced(code)
            linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
            body, last = _compiled(code, name)
            _evaluated(body, self._names)
            value = None if last is None else _evaluated(last, self._names)
            shown = None if value is None else repr(value)
            if value is not None:
                vars(builtins)["_"] = value
            reply = self._reply(Kind.OK, value=shown)
        except SystemExit as error:
            reply = self._reply(Kind.EXITED, error=error)
        except MemoryError as error:
            self._ballast.close()  # first of all: until then any allocation may fail, for ever
            reply = self._reply(Kind.MEMORY, error=error)
            self._take_ballast()
        except BaseException as error:
            reply = self._reply(Kind.ERROR, error=error)
        reply = self._with_figures(reply, value)
        self._finish()
        return reply

    def _with_figures(self, reply: Reply, value: object) -> Reply:
        """The reply with the figures of the cell, `value` among them if it is one."""
        try:
            figures, notes = self._gallery.take(value)
            self._streams["stderr"].writelines(f"{note}\n" for note in notes)
        except BaseException:  # code of the cell's, drawing
            return reply
        if not figures and not notes:
            return reply
        cut = (*reply.truncated, *(["figures"] if notes else []))
        return replace(reply, figures=tuple(figures), truncated=cut)

    def _reply(
        self, kind: Kind, *, value: str | None = None, error: BaseException | None = None
    ) -> Reply:
        text, text_cut = _cut("" if error is None else _describe(error), self._keep)
        shown, value_cut = _cut(value or "", self._keep)
        cut = [name for name, is_cut in (("value", value_cut), ("traceback", text_cut)) if is_cut]
        return Reply(
            kind,
            value=None if value is None else shown,
            error_type=None if error is None else _name(error),
            traceback=text,
            truncated=tuple(cut),
        )


def _read(size: int) -> bytes:
    """Exactly `size` bytes of the supervisor's; ends the process when it hung up."""
    parts = []
    while size:
        part = os.read(CONTROL_FD, min(size, 1 << 20))
        if not part:
            os._exit(0)
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _write(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(CONTROL_FD, view) :]


def say_start(problem: str | None) -> None:
    """Report that this process is confined, or why it could not be."""
    kind = Kind.OK if problem is None else Kind.SANDBOX_FAILURE
    _write(pack_reply(START_NONCE, Reply(kind, None, None, problem or "", ())))


def _forked(place: branch.Place, folder: str, ticket: int, spawner: int) -> int:
    """Fork a branch: as `branch.fork`, 0 once the branch has taken over."""
    try:
        luggage = place.pack()
    except OSError as error:
        return -(error.errno or errno.EIO)
    made = branch.fork()
    if made == 0:
        branch.take_over(place, luggage, folder, ticket, spawner)
    return made


def serve(keep_chars: int) -> None:
    """Run cells and fork branches until the supervisor hangs up. Never returns."""
    try:
        runner, place, spawner = Runner(keep_chars), branch.Place(), os.getppid()
        say_start(None)
        while True:
            nonce, index, length = unpack_cell_header(_read(CELL_HEADER_BYTES))
            payload = _read(length)
            if index in (COVER, UNCOVER):
                branch.show_owner(index == UNCOVER)
                _write(pack_reply(nonce, Reply(Kind.OK, None, None, "", ())))
                continue
            if index != FORK:
                code = payload.decode("utf-8", "surrogatepass")
                _write(pack_reply(nonce, runner.run(code, index)))
                continue
            with runner.room():
                made = _forked(place, os.fsdecode(payload), ticket_of(nonce), spawner)
            if made < 0:
                why = f"a snapshot could not fork: {os.strerror(-made)}"
                _write(pack_reply(nonce, Reply(Kind.ERROR, None, None, why, ())))
    except MemoryError:  # none left, not even to say so
        os._exit(OUT_OF_MEMORY_STATUS)
    except BaseException:  # the code took the runner with it: it ended its own process
        os._exit(_BROKEN_RUNNER_STATUS)
