"""When growth and learning happen: one after the other, or at the same time.

`schedule.staleness: 0`: a step's batch is grown when it is asked for. `1`: the next step's batch
begins to grow as soon as this one is handed over, hence while the learner updates on it. Either way
a batch is grown by a thread of its own, and the inputs of a step follow those of the step before in
the training stream. What was grown ahead and not asked for is lost: a resumed run grows it again.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread

from elpo_ray.scheduling.dynamic_sampling import StepBatch

POLL_S = 0.25
Grow = Callable[[int, int], StepBatch]
"""(step, first input of the stream) -> the step's batch."""


class Pipeline:
    """Hands out batches in the order of steps."""

    def __init__(self, grow: Grow, *, staleness: int, steps: int) -> None:
        self._grow = grow
        self._staleness = staleness
        self._steps = steps
        self._growing: dict[int, Future[StepBatch]] = {}

    def batch(self, step: int, cursor: int, on_wait: Callable[[], None]) -> StepBatch:
        """The batch of `step`, whose inputs begin at `cursor`; `on_wait` is called while it grows.

        Steps are asked for one after the other; `cursor` follows the batch before.
        """
        growing = self._growing.pop(step, None) or self._begin(step, cursor)
        while not wait([growing], timeout=POLL_S).done:
            on_wait()
        batch = growing.result()
        if self._staleness and step + 1 < self._steps:
            self._growing[step + 1] = self._begin(step + 1, cursor + batch.taken)
        return batch

    def _begin(self, step: int, cursor: int) -> Future[StepBatch]:
        """Grow in a daemon thread: an interrupted run does not wait for what it grew ahead."""
        future: Future[StepBatch] = Future()

        def run() -> None:
            try:
                future.set_result(self._grow(step, cursor))
            except BaseException as error:  # raised again where the batch is asked for
                future.set_exception(error)

        Thread(target=run, name=f"grow-{step}", daemon=True).start()
        return future
