"""The numbered attacks: what each does, and how it must end. They use the public interface only."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sandbox.results import CallResult, Kind

if TYPE_CHECKING:
    from host import World

Run = Callable[["World"], Awaitable[None]]


@dataclass(frozen=True)
class Attack:
    """One attack; `run` raises AssertionError if it did not end as it must."""

    number: int
    name: str
    run: Run


ATTACKS: dict[int, Attack] = {}


def attack(number: int, name: str) -> Callable[[Run], Run]:
    """Register a function as an attack."""

    def register(run: Run) -> Run:
        assert number not in ATTACKS
        ATTACKS[number] = Attack(number, name, run)
        return run

    return register


NO_WAY = (1, 2, 11, 13, 18, 30, 38)
"""Errno of a refusal: EPERM, ENOENT, EAGAIN, EACCES, EXDEV, EROFS, ENOSYS."""

PRELUDE = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def raw(name, *arguments):
    result = getattr(libc, name)(*arguments) if isinstance(name, str) else libc.syscall(
        name, *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if result >= 0:
        raise SystemExit(f"{name} got through: {result}")
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
def tried(*attempts):
    for number, attempt in enumerate(attempts):
        try: got = attempt()
        except OSError as error: last = error
        else: raise SystemExit(f"attempt {number} got through: {got!r}")
    raise last
"""
"""Helpers of attacking cells: raw calls that must fail, several attempts that must all fail."""


def refused(result: CallResult) -> None:
    """The code got an OSError that says no, from the kernel."""
    assert result.kind is Kind.ERROR, result
    assert any(f"[Errno {number}]" in result.traceback for number in NO_WAY), result


def denied(number: int, name: str, *cells: str) -> None:
    """Register an attack of which each cell is refused; $CANARY and $PORT are filled in."""

    async def run(world: World) -> None:
        for cell in cells:
            refused(await world.call(PRELUDE + cell.replace("$CANARY", repr(world.canary))
                                     .replace("$PORT", str(world.port))))  # fmt: skip

    attack(number, name)(run)


def ends(number: int, name: str, *kinds: Kind, cells: tuple[str, ...], hasty: bool = True) -> None:
    """Register an attack of which each cell ends as one of `kinds`, in time."""

    async def run(world: World) -> None:
        for cell in cells:
            result = await world.call(PRELUDE + cell, hasty)
            assert result.kind in kinds, (cell, result)
            assert not hasty or result.duration_s < 2.5, result

    attack(number, name)(run)


import against_births  # noqa: E402, F401
import against_branches  # noqa: E402, F401
import against_branches_again  # noqa: E402, F401
import against_exchange  # noqa: E402, F401
import against_files  # noqa: E402, F401
import against_kernel  # noqa: E402, F401
import against_limits  # noqa: E402, F401
import against_others  # noqa: E402, F401
import against_rest  # noqa: E402, F401
import against_supervisor  # noqa: E402, F401
