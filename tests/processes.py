"""Processes of this machine, as tests look at them."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil


def _parents() -> dict[int, int]:
    """Parent of every process that is not a zombie."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            state, parent = Path(f"/proc/{name}/stat").read_text().rsplit(")", 1)[1].split()[:2]
        except OSError:  # gone in between
            continue
        if state != "Z":
            found[int(name)] = int(parent)
    return found


def state_of(pid: int) -> str:
    """The kernel's letter for what a process does; "Z" also if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


def family(pid: int) -> set[int]:
    """All descendants of a process, without zombies."""
    parents, found, size = _parents(), {pid}, 0
    while size < len(found):
        size = len(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return found - {pid}


def children(pid: int) -> set[int]:
    """Without zombies."""
    return {child for child, parent in _parents().items() if parent == pid}


def working_in(folder: Path) -> set[int]:
    """Processes with a working directory below `folder`, whoever their parent is."""
    found = set()
    for pid in _parents():
        try:
            if str(folder) in os.readlink(f"/proc/{pid}/cwd"):
                found.add(pid)
        except OSError:
            continue
    return found


async def eventually(condition: Callable[[], bool], what: str, within_s: float = 10.0) -> None:
    """Wait until the condition holds."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.01)


async def ended(pids: Iterable[int], within_s: float = 10.0) -> None:
    """Wait until all are gone, or zombies that init has yet to collect."""
    watched, deadline = set(pids), time.monotonic() + within_s
    while left := watched & set(_parents()):
        assert time.monotonic() < deadline, [psutil.Process(pid).cmdline() for pid in left]
        await asyncio.sleep(0.01)
