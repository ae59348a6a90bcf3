"""The bytes between a session's process and its supervisor.

Cells go in and results come out on one stream socket, fixed headers before raw bytes, so that
nothing the child writes is ever parsed by more than a length check. Each cell carries a nonce that
its result must repeat: an answer written ahead of time is a breach. So does the order to fork; the
branch repeats it to the kernel, which has the supervisor decide, and the parent only to say that it
could not.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from sandbox.limits import MAX_FIGURES, MAX_FIGURES_BYTES
from sandbox.results import Kind

NONCE_BYTES = 8
_CELL = struct.Struct(f"!{NONCE_BYTES}sII")
_RESULT = struct.Struct(f"!{NONCE_BYTES}sBBIIII")
_WORDS = (Kind.OK, Kind.ERROR, Kind.MEMORY, Kind.EXITED, Kind.SANDBOX_FAILURE)
"""What a child may say of itself; its place is the byte on the wire."""

_CUTTABLE = ("value", "traceback", "figures")
_SIZE = struct.Struct("!I")
"""Comes before each figure."""
_MAX_FIGURE_PART = MAX_FIGURES_BYTES + MAX_FIGURES * _SIZE.size
MAX_REPLY_OVERHEAD = _RESULT.size + _MAX_FIGURE_PART
"""Bytes of a reply besides its texts, at most."""
CELL_HEADER_BYTES = _CELL.size
START_NONCE = b"\0" * NONCE_BYTES
"""Nonce of a process's first message: OK once it is confined, or SANDBOX_FAILURE and why in
`traceback`."""
UNCOVER, COVER, FORK = 0xFFFFFFFF, 0xFFFFFFFE, 0xFFFFFFFD
"""Indices of the orders to show and to hide what `/proc` says of the process, and to fork a branch,
for which the payload is its folder."""
LISTENER_MARKS = (b"L", b"K")
"""One comes before the first process's greeting, with the descriptor that decides about its forks;
the second if only SIGKILL disturbs who waits for the decision."""
STREAMS_MARK = b"S"
"""Comes first on a branch's control channel, with its stdin, stdout and stderr, and with its work
folder if it has none yet."""
CONTROL_FD, WORK_FD = 3, 4
"""A session's control socket and its open work folder; 0 to 2 are as usual."""

OUT_OF_MEMORY_STATUS = 72
"""Exit status of a child that has no memory left to write a reply."""


class Breach(Exception):
    """Bytes that no honest child writes."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the child says of a cell; untrusted."""

    kind: Kind
    value: str | None
    error_type: str | None
    traceback: str
    truncated: tuple[str, ...]
    """Names of the `_CUTTABLE` fields that were cut."""
    figures: tuple[bytes, ...] = ()


def pack_cell(nonce: bytes, index: int, code: bytes) -> bytes:
    """`index` numbers the cell in tracebacks (0 = the setup)."""
    return _CELL.pack(nonce, index, len(code)) + code


def pack_fork(nonce: bytes, folder: str) -> bytes:
    """The order to fork a branch that works in `folder`; answered only if that fails."""
    return pack_cell(nonce, FORK, os.fsencode(folder))


def ticket_of(nonce: bytes) -> int:
    """The nonce of an order to fork as the branch has to name it, in one register."""
    return int.from_bytes(nonce, "little")


def pack_uncover(nonce: bytes, visible: bool) -> bytes:
    """The order to let the owner look at the process, or to hide; answered as a cell is."""
    return pack_cell(nonce, UNCOVER if visible else COVER, b"")


def unpack_cell_header(header: bytes) -> tuple[bytes, int, int]:
    """Nonce, index, length of the code that follows."""
    nonce, index, length = _CELL.unpack(header)
    return nonce, index, length


def pack_reply(nonce: bytes, reply: Reply) -> bytes:
    """A reply as the bytes that travel; `nonce` shows who wrote it."""
    value, error_type, traceback = (
        (text or "").encode("utf-8", "backslashreplace")
        for text in (reply.value, reply.error_type, reply.traceback)
    )
    flags = (reply.value is not None) | (reply.error_type is not None) << 1
    flags |= sum(4 << at for at, name in enumerate(_CUTTABLE) if name in reply.truncated)
    figures = b"".join(_SIZE.pack(len(figure)) + figure for figure in reply.figures)
    sizes = len(value), len(error_type), len(traceback), len(figures)
    header = _RESULT.pack(nonce, _WORDS.index(reply.kind), flags, *sizes)
    return header + value + error_type + traceback + figures


def unpack_reply(data: bytes | bytearray, nonce: bytes, max_bytes: int) -> Reply | None:
    """The reply to `nonce`, or None while it is incomplete. `max_bytes` bounds its texts together.
    Raises Breach."""
    if len(data) < _RESULT.size:
        return None
    said_nonce, word, flags, *sizes = _RESULT.unpack_from(data)
    too_long = sum(sizes[:3]) > max_bytes or sizes[3] > _MAX_FIGURE_PART
    if said_nonce != nonce or word >= len(_WORDS) or too_long:
        raise Breach("bad header")
    if _WORDS[word] is Kind.SANDBOX_FAILURE and nonce != START_NONCE:
        raise Breach("code cannot speak for the sandbox")
    missing = _RESULT.size + sum(sizes) - len(data)
    if missing > 0:
        return None
    if missing < 0:
        raise Breach("more than one reply")
    texts, start = [], _RESULT.size
    for size in sizes[:3]:
        texts.append(bytes(data[start : start + size]).decode("utf-8", "replace"))
        start += size
    return Reply(
        kind=_WORDS[word],
        value=texts[0] if flags & 1 else None,
        error_type=texts[1] if flags & 2 else None,
        traceback=texts[2],
        truncated=tuple(name for at, name in enumerate(_CUTTABLE) if flags & 4 << at),
        figures=_figures(bytes(data[start:])),
    )


def _figures(part: bytes) -> tuple[bytes, ...]:
    """Raises Breach."""
    found, at = list[bytes](), 0
    while at < len(part) and len(found) < MAX_FIGURES:
        if len(part) < at + _SIZE.size:
            raise Breach("bad figures")
        at += _SIZE.size
        found.append(part[at : at + _SIZE.unpack_from(part, at - _SIZE.size)[0]])
        at += len(found[-1])
    if at != len(part) or not all(found):
        raise Breach("bad figures")
    return tuple(found)
