"""One host of code interpreters: a sandbox's sessions by name. It knows no Ray, but what it takes
and gives back can be pickled, so that an actor can be made of it (`cluster.sandboxes`)."""

from __future__ import annotations

import importlib.util
import os
import uuid
from dataclasses import dataclass

from elpo_ray.config.rollout import SandboxConfig
from elpo_ray.config.run import ClusterConfig
from sandbox.fusion import FusionSandbox, FusionSession
from sandbox.limits import Limits
from sandbox.results import CallResult, Keep, SandboxFailure, SessionState
from sandbox.supervisor import PRELOADS, Sandbox, Session

_MEMORY_SHARE = 4
"""Kept states may take 1 / _MEMORY_SHARE of a host's memory."""


def limits_of(config: SandboxConfig) -> Limits:
    """The sandbox's limits, from the configuration."""
    return Limits(
        wall_s=config.wall_s,
        cpu_s=config.cpu_s,
        memory_mib=config.memory_mib,
        output_kib=config.output_kib,
    )


def sandbox_of(config: SandboxConfig, cluster: ClusterConfig) -> Sandbox | FusionSandbox:
    """The sandbox of one actor."""
    if config.endpoint is not None:
        sessions = cluster.sandbox_sessions
        return FusionSandbox(config.endpoint, limits_of(config), sessions=sessions)
    wanted = PRELOADS[config.preload.value]
    memory_mib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    share = memory_mib // (_MEMORY_SHARE * cluster.sandbox_actors)  # they may all be on one node
    return Sandbox(
        limits_of(config),
        sessions=cluster.sandbox_sessions,
        snapshot_mib=config.snapshot_mib or max(1, share),
        replay_below_s=config.replay_below_ms / 1000,
        preload=[name for name in wanted if importlib.util.find_spec(name) is not None],
        isolation=config.isolation.value,
        allow_degraded=config.allow_degraded,
        bubblewrap=config.bubblewrap,
    )


@dataclass(frozen=True, slots=True)
class Opened:
    """A session, and where to find the states that it leaves behind."""

    session: str
    tree: str
    host: str


class SandboxHost:
    """Sessions by name, on a sandbox of this process."""

    def __init__(self, sandbox: Sandbox | FusionSandbox) -> None:
        self._sandbox = sandbox
        self._sessions: dict[str, Session | FusionSession] = {}

    async def open(
        self,
        setup: str = "",
        at: SessionState | None = None,
        tree: str | None = None,
        keep: Keep = Keep.STATES,
    ) -> Opened:
        """See `Sandbox.open`. Raises SandboxFailure, SandboxUnavailable."""
        session = await self._sandbox.open(setup, at, tree=tree, keep=keep)
        name = uuid.uuid4().hex
        self._sessions[name] = session
        return Opened(name, session.state.tree, session.state.host)

    async def call(self, session_id: str, code: str) -> CallResult:
        """Run one cell. Raises SandboxFailure for a session of an earlier life of this host."""
        session = self._sessions.get(session_id)
        if session is None:
            raise SandboxFailure(f"no session {session_id}: the host was restarted")
        return await session.call(code)

    async def close(self, session_id: str) -> None:
        """End a session; unknown ones have ended already."""
        session = self._sessions.pop(session_id, None)
        if session is not None:
            await session.close()

    async def release(self, tree: str) -> None:
        """See `Sandbox.release`."""
        await self._sandbox.release(tree)

    def metrics(self) -> dict[str, float]:
        """See `sandbox.supervisor.Sandbox.gauges`."""
        return self._sandbox.gauges()
