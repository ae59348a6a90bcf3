"""Trackers whose client fails: the run goes on, and what was missed is handed over later."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from elpo_ray.runs.guard import Guarded, UnusableTracker


class Service:
    """A client that refuses what `refuses` says, and writes down what it takes."""

    def __init__(self) -> None:
        self.refuses: Callable[[str, tuple[Any, ...]], BaseException | None] = lambda *_: None
        self.taken: list[tuple[Any, ...]] = []
        self.asked = 0

    def made(self) -> Service:
        self._take("start")
        return self

    def write(self, step: int, values: Any, at: float) -> None:
        self._take("write", step, at)

    def show(self, step: int, samples: Any) -> None:
        self._take("show", step)

    def close(self) -> None:
        self._take("close")

    def _take(self, name: str, *given: Any) -> None:
        self.asked += 1
        fault = self.refuses(name, given)
        if fault is not None:
            raise fault
        self.taken.append((name, *given[:1]))


FAULTS = [OSError("no network"), RuntimeError("a\nb"), KeyError("x"), SystemExit(3)]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("where", ["start", "write", "show", "close"])
def test_no_fault_of_a_client_gets_out(
    fault: BaseException, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    service = Service()
    service.refuses = lambda name, _: fault if name == where else None
    guarded = Guarded("logging.x=1", service.made)
    for step in (1, 2, 3):
        guarded.write(step, {})
        guarded.show(step, [])
    guarded.close()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("elpo_ray: logging.x=1: ")
    assert type(fault).__name__ in said and "the run goes on without this tracker" in said


@pytest.mark.parametrize("where", ["start", "write"])
def test_a_service_that_comes_back_gets_what_it_missed_in_order(
    where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    service = Service()
    service.refuses = lambda name, _: OSError("away") if name == where else None
    guarded = Guarded("logging.x=1", service.made)
    for step in range(1, 6):
        guarded.write(step, {})
    service.refuses = lambda *_: None
    for step in range(6, 12):
        guarded.write(step, {})
    assert [call[1] for call in service.taken if call[0] == "write"] == list(range(1, 12))
    guarded.close()
    assert service.taken[-1] == ("close",)
    assert capsys.readouterr().err.count("\n") == 2  # it failed, it answers again


def test_one_that_answers_only_at_the_end_gets_everything_then() -> None:
    service = Service()
    service.refuses = lambda *_: OSError("away")
    guarded = Guarded("logging.x=1", service.made)
    for step in range(40):
        guarded.write(step, {})
    service.refuses = lambda *_: None
    guarded.close()
    assert service.taken == [("start",), *(("write", step) for step in range(40)), ("close",)]


def test_a_service_that_is_away_is_asked_less_and_less() -> None:
    service = Service()
    service.refuses = lambda *_: OSError("away")
    guarded = Guarded("logging.x=1", service.made)
    for step in range(200):
        guarded.write(step, {})
    assert service.asked < 15


def test_a_call_that_the_service_never_takes_does_not_hold_up_the_others() -> None:
    service = Service()
    service.refuses = lambda name, given: ValueError("NaN") if given[:1] == (2,) else None
    guarded = Guarded("logging.x=1", service.made)
    for step in range(1, 8):
        guarded.write(step, {})
    guarded.close()
    assert [call[1] for call in service.taken if call[0] == "write"] == [1, 3, 4, 5, 6, 7]


def test_the_time_of_a_number_is_when_it_was_measured() -> None:
    service = Service()
    times = list[float]()

    def away(name: str, given: tuple[Any, ...]) -> BaseException | None:
        times.extend(given[1:])
        return OSError("away") if name == "write" and len(times) < 2 else None

    service.refuses = away
    guarded = Guarded("logging.x=1", service.made)
    before = time.time()
    guarded.write(1, {})
    after = time.time()
    time.sleep(0.05)
    guarded.close()
    assert len(times) == 2 and times[0] == times[1] and before <= times[0] <= after


def test_ctrl_c_is_no_fault_of_the_client() -> None:
    service = Service()
    service.refuses = lambda name, _: KeyboardInterrupt() if name == "write" else None
    guarded = Guarded("logging.x=1", service.made)
    with pytest.raises(KeyboardInterrupt):
        guarded.write(1, {})


def test_an_object_that_is_no_tracker_is_told_at_once() -> None:
    def made() -> Any:
        raise UnusableTracker("it has no close")

    with pytest.raises(ValueError, match="it has no close"):
        Guarded("logging.x=1", made)
