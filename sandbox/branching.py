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
    branch, aside = None, False

    def step_aside() -> None:
        nonlocal aside
        aside = True
        running.release()

    alarm = asyncio.get_running_loop().call_later(_PROMPT_S, step_aside)
    try:
        try:
            branch = await fork
        finally:
            alarm.cancel()
            if aside:
                await asyncio.shield(running.acquire())  # or the caller releases too many
    except BaseException:
        if branch is not None:  # nobody waits for it any longer
            branch.kill()
        raise
    return branch
