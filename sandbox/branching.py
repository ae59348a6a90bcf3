"""A branch of a snapshot: in its turn, and without keeping a processor from others."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

from sandbox.endings import Refused
from sandbox.process import SessionProcess
from sandbox.snapshots import Snapshot

_PROMPT_S = 0.1
"""A fork that takes longer waits outside of the processors' queue."""
_REFUSED_S = (0.1, 0.4)
"""Waits before a fork is tried again for which something was short."""


async def branch_of(held: Snapshot, running: asyncio.Semaphore) -> SessionProcess:
    """A process in the state of `held`. The caller has a place among those that are `running`.

    Raises SandboxFailure."""
    return await _unhurried(_forked(held), running)


async def _forked(held: Snapshot) -> SessionProcess:
    async with held.forking:
        for patience_s in _REFUSED_S:
            try:
                return await held.lineage.fork(held.process)
            except Refused:
                if not held.process.alive:
                    raise
                await asyncio.sleep(patience_s)
        return await held.lineage.fork(held.process)


async def _unhurried(
    fork: Coroutine[None, None, SessionProcess], running: asyncio.Semaphore
) -> SessionProcess:
    """A fork, which takes no processor's place while it does not come to its end. It must not wait
    for one while it holds what other forks wait for."""
    forking = asyncio.ensure_future(fork)
    try:
        done, _ = await asyncio.wait({forking}, timeout=_PROMPT_S)
        if not done:
            running.release()
            try:
                await asyncio.wait({forking})
            finally:
                await running.acquire()
    except asyncio.CancelledError:
        forking.add_done_callback(_kill_unwanted)
        forking.cancel()
        raise
    return forking.result()


def _kill_unwanted(forking: asyncio.Future[SessionProcess]) -> None:
    """Nobody waits for this fork any longer."""
    if not forking.cancelled() and forking.exception() is None:
        forking.result().kill()
