"""Growing in turns with the learner, or ahead of it: the same inputs in the same order."""

import threading
import time

import pytest

from elpo_ray.config import Config
from elpo_ray.config.algorithm import LossConfig
from elpo_ray.config.schedule import ScheduleConfig
from elpo_ray.scheduling.dynamic_sampling import StepBatch
from elpo_ray.scheduling.pipeline import Pipeline


class Stream:
    """Grows batches that take `taken` inputs each."""

    def __init__(self, taken: int = 4) -> None:
        self.taken = taken
        self.begun: list[tuple[int, int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def grow(self, step: int, cursor: int) -> StepBatch:
        self.begun.append((step, cursor))
        assert self.gate.wait(10)
        return StepBatch([], [], self.taken, 0.0)


def silent() -> None: ...


def run(pipeline: Pipeline, steps: range, cursor: int = 0) -> int:
    for step in steps:
        cursor += pipeline.batch(step, cursor, silent).taken
    return cursor


def settled(stream: Stream, count: int) -> None:
    deadline = time.monotonic() + 5
    while len(stream.begun) < count and time.monotonic() < deadline:
        time.sleep(0.005)


@pytest.mark.parametrize("staleness", [0, 1])
def test_both_grow_the_same_inputs(staleness: int) -> None:
    stream = Stream()
    assert run(Pipeline(stream.grow, staleness=staleness, steps=5), range(5)) == 20
    settled(stream, 5)
    assert stream.begun == [(step, 4 * step) for step in range(5)]


def test_on_policy_nothing_grows_unasked() -> None:
    stream = Stream()
    run(Pipeline(stream.grow, staleness=0, steps=5), range(2))
    time.sleep(0.05)
    assert stream.begun == [(0, 0), (1, 4)]


def test_one_batch_is_grown_ahead_and_none_beyond_the_last_step() -> None:
    stream = Stream()
    pipeline = Pipeline(stream.grow, staleness=1, steps=3)
    pipeline.batch(0, 0, silent)
    settled(stream, 2)
    assert stream.begun == [(0, 0), (1, 4)]
    assert run(pipeline, range(1, 3), 4) == 12
    time.sleep(0.05)
    assert stream.begun == [(0, 0), (1, 4), (2, 8)]


def test_a_resumed_run_grows_again_what_was_only_grown_ahead() -> None:
    first, again = Stream(), Stream()
    cursor = run(Pipeline(first.grow, staleness=1, steps=9), range(3))
    settled(first, 4)
    run(Pipeline(again.grow, staleness=1, steps=9), range(3, 5), cursor)
    assert again.begun[0] == first.begun[3] == (3, 12)


def test_while_a_batch_grows_the_caller_is_called() -> None:
    stream, calls = Stream(), []
    stream.gate.clear()

    def on_wait() -> None:
        calls.append(1)
        stream.gate.set()

    Pipeline(stream.grow, staleness=0, steps=1).batch(0, 0, on_wait)
    assert calls


def test_what_growth_raises_comes_out_where_the_batch_is_asked_for() -> None:
    def grow(step: int, cursor: int) -> StepBatch:
        if step == 1:
            raise ValueError("prompt")
        return StepBatch([], [], 1, 0.0)

    pipeline = Pipeline(grow, staleness=1, steps=3)
    pipeline.batch(0, 0, silent)
    with pytest.raises(ValueError, match="prompt"):
        pipeline.batch(1, 1, silent)


def test_stale_tokens_are_corrected_and_the_algorithms_own_cap_stays() -> None:
    config = Config()
    assert config.loss.tis_cap is None
    config.schedule = ScheduleConfig(staleness=1, tis_cap=3.0)
    assert config.loss.tis_cap == 3.0
    config.algorithm.loss = LossConfig(tis_cap=5.0)
    assert config.loss.tis_cap == 5.0
    with pytest.raises(ValueError, match=r"schedule\.staleness=2"):
        ScheduleConfig(staleness=2)
