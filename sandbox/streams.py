"""What a session prints, kept within bounds."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from sandbox.limits import OUTPUT_KILL_BYTES

_CHUNK = 1 << 16


class HeadTail:
    """The first and the last bytes of a stream, at most `keep` in all."""

    def __init__(self, keep: int) -> None:
        self._half = keep // 2
        self._head = bytearray()
        self._tail = bytearray()
        self.total = 0
        """Bytes seen."""

    def add(self, data: bytes) -> None:
        self.total += len(data)
        room = self._half - len(self._head)
        self._head += data[:room]
        self._tail += data[room:]
        if len(self._tail) > 4 * self._half:
            del self._tail[: -self._half]

    @property
    def truncated(self) -> bool:
        return self.total > 2 * self._half

    def text(self) -> str:
        """The bytes as text, invalid UTF-8 replaced; a marker stands for what was left out."""
        if not self.truncated:
            return (self._head + self._tail).decode("utf-8", "replace")
        head = self._head.decode("utf-8", "replace")
        tail = self._tail[-self._half :].decode("utf-8", "replace")
        return f"{head}\n... [{self.total - 2 * self._half} bytes left out] ...\n{tail}"


class Output:
    """What one process prints, by two pipes that are read as it comes."""

    def __init__(self, pipes: list[int], on_flood: Callable[[], None]) -> None:
        """`pipes` are the reading ends, which do not block; `on_flood` is called once there is more
        than a call may print."""
        self._pipes, self._on_flood = pipes, on_flood
        self._streams = [HeadTail(0), HeadTail(0)]

    def listen(self, loop: asyncio.AbstractEventLoop) -> None:
        """Read whenever there is something, until `stop`."""
        for index, pipe in enumerate(self._pipes):
            loop.add_reader(pipe, self._on_print, loop, index)

    def stop(self, loop: asyncio.AbstractEventLoop) -> None:
        for pipe in self._pipes:
            loop.remove_reader(pipe)

    def begin(self, keep: int) -> None:
        """A call begins, of which `keep` bytes a stream are kept."""
        self._streams = [HeadTail(keep) for _ in self._pipes]

    def drain(self, loop: asyncio.AbstractEventLoop) -> None:
        """Read what is there."""
        for index in range(len(self._pipes)):
            while not self.floods and self._on_print(loop, index):
                pass

    @property
    def floods(self) -> bool:
        """Whether it is more than a call may print."""
        return sum(stream.total for stream in self._streams) > OUTPUT_KILL_BYTES

    @property
    def texts(self) -> tuple[str, str]:
        """Of stdout and stderr."""
        out, err = self._streams
        return out.text(), err.text()

    @property
    def truncated(self) -> list[str]:
        """Names of the streams of which something is left out."""
        named = zip(("stdout", "stderr"), self._streams, strict=True)
        return [name for name, stream in named if stream.truncated]

    def _on_print(self, loop: asyncio.AbstractEventLoop, index: int) -> bool:
        """Read what is there; whether there may be more."""
        try:
            data = os.read(self._pipes[index], _CHUNK)
        except BlockingIOError:
            return False
        if not data:
            loop.remove_reader(self._pipes[index])
            return False
        self._streams[index].add(data)
        if self.floods:
            self._on_flood()
        return True
