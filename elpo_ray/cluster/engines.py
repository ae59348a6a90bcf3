"""The engines of rollout workers, as the learner's ranks and the driver call them."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle

from elpo_ray.types import InfrastructureError
from elpo_ray.weights.protocol import Part

if TYPE_CHECKING:
    from elpo_ray.rollout.engine import Engine

    Act = Callable[[Engine], Awaitable[None]]


class RemoteEngines:
    """`weights.protocol.EngineHandles`, and sleep and wake, over `RolloutActor.on_engine`.

    A worker that is lost is left out from then on: it gets the weights when it is back.
    """

    def __init__(self, workers: Sequence[ActorHandle[Any]], timeout_s: float) -> None:
        self._workers = list(workers)
        self._timeout_s = timeout_s
        self.lost: list[ActorHandle[Any]] = []

    def join_transfer(self, init_infos: Sequence[dict[str, Any]]) -> None:
        def join(info: dict[str, Any]) -> Act:
            return lambda engine: engine.join_transfer(info)

        self._begin([join(info) for info in init_infos])()

    def begin_update(self) -> None:
        self._call(lambda engine: engine.begin_update())

    def receive(self, part: Part) -> Callable[[], None]:
        shared: Any = ray.put(part)

        async def receive(engine: Engine) -> None:
            await engine.receive(await shared)

        return self._begin([receive] * len(self._workers))

    def finish_update(self, version: int) -> None:
        self._call(lambda engine: engine.finish_update(version))

    def abandon_update(self) -> None:
        self._call(lambda engine: engine.abandon_update())

    def sleep(self) -> None:
        self._call(lambda engine: engine.sleep())

    def wake(self) -> None:
        self._call(lambda engine: engine.wake())

    def _call(self, act: Act) -> None:
        """Have every engine do it, and wait."""
        self._begin([act] * len(self._workers))()

    def _begin(self, acts: Sequence[Act]) -> Callable[[], None]:
        """Have engine i begin acts[i]; what is returned waits for all of them."""
        pairs = zip(self._workers, acts, strict=True)
        asked = [(worker, worker.on_engine.remote(act)) for worker, act in pairs]
        return partial(self._wait, asked, time.monotonic() + self._timeout_s)

    def _wait(self, asked: list[tuple[ActorHandle[Any], Any]], deadline: float) -> None:
        for worker, ref in asked:
            if worker in self.lost:
                continue
            try:
                ray.get(ref, timeout=max(0.0, deadline - time.monotonic()))
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
                self.lost.append(worker)
            except ray.exceptions.RayTaskError as error:
                if not isinstance(error.cause, InfrastructureError):
                    raise (error.cause if error.cause is not None else error) from error
                self.lost.append(worker)
        self._workers = [worker for worker in self._workers if worker not in self.lost]
