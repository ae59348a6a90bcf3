"""The conversation of rollout workers with sandbox hosts: the actor, and the handle to one."""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Awaitable
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle

from elpo_ray.cluster.garbage import freeze_gc
from elpo_ray.cluster.gauges import Gauges
from elpo_ray.config import Config
from elpo_ray.tools.sandbox_host import Opened, SandboxHost, sandbox_of
from sandbox.results import CallResult, Keep, SessionState

RESTART_S = 30.0
"""Seconds that a trajectory waits for a sandbox actor that Ray restarts before it tries another."""
GAUGES_S = 5.0
"""Seconds between two readings of a sandbox's gauges."""
T = TypeVar("T")


class SandboxActor(SandboxHost):
    """A sandbox host in a process of its own. Ray makes it anew, empty, when it dies."""

    def __init__(self, config: Config) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # each snapshot takes some
        self._needed = config.task.interpreter
        super().__init__(sandbox_of(config.sandbox, config.cluster))
        self._showing = asyncio.create_task(self._show())

    async def start(self) -> None:
        """Raises SandboxUnavailable where the machine cannot isolate, if the policy may run code:
        else only submitted programs would, and that shows when one does."""
        if self._needed:
            opened = await self.open()
            await self.close(opened.session)
        freeze_gc()

    async def _show(self) -> None:
        gauges = Gauges("elpo_sandbox_")
        while True:
            gauges.set(self.metrics())
            await asyncio.sleep(GAUGES_S)


class RemoteHost:
    """A sandbox actor as `tools.interpreter.HostHandle`: deadlines, and patience with a restart."""

    def __init__(self, actor: ActorHandle[Any], config: Config) -> None:
        self._actor = actor
        self._timeout_s = config.cluster.call_timeout_s
        """The deadline of everything that may wait for a free session."""
        self._call_s = config.sandbox.wall_s + config.cluster.stuck_s

    async def open(
        self, setup: str, at: SessionState | None, tree: str | None, keep: Keep
    ) -> Opened:
        """Waits for an actor that Ray restarts: until it is up, calls fail after two seconds."""
        patient_until = time.monotonic() + RESTART_S
        while True:
            try:
                return await self._within(self._actor.open.remote(setup, at, tree, keep))
            except ray.exceptions.ActorUnavailableError:
                if time.monotonic() > patient_until:
                    raise
                await asyncio.sleep(0.2)

    async def call(self, session_id: str, code: str) -> CallResult:
        result: Awaitable[CallResult] = self._actor.call.remote(session_id, code)
        return await asyncio.wait_for(result, self._call_s)

    async def close(self, session_id: str) -> None:
        await self._within(self._actor.close.remote(session_id))

    async def release(self, tree: str) -> None:
        await self._within(self._actor.release.remote(tree))

    async def _within(self, answer: Awaitable[T]) -> T:
        return await asyncio.wait_for(answer, self._timeout_s)
