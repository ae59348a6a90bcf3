"""Who is on shared devices, and when."""

import threading
from functools import partial

from elpo_ray.cluster.sharing import DeviceSharing


def sharing(log: list[str], *, shared: bool = True) -> DeviceSharing:
    made = DeviceSharing(shared=shared)
    for name, side in (("engines", made.engines), ("learner", made.learner)):
        side.onload = partial(log.append, f"{name} onload")
        side.offload = partial(log.append, f"{name} offload")
    return made


def test_one_is_offloaded_before_the_other_is_onloaded() -> None:
    log: list[str] = []
    made = sharing(log)
    for _ in range(2):
        made.for_engines()
        made.for_engines()
        with made.for_learner(), made.for_learner():
            pass
    there = ["learner offload", "engines onload", "engines offload", "learner onload"]
    assert log == there * 2


def test_engines_wait_until_the_learner_is_done() -> None:
    log: list[str] = []
    made = sharing(log)
    with made.for_learner():
        thread = threading.Thread(target=made.for_engines)
        thread.start()
        thread.join(0.05)
        log.append("still learning")
    thread.join()
    assert log == [
        "engines offload",
        "learner onload",
        "still learning",
        "learner offload",
        "engines onload",
    ]


def test_a_side_that_is_gone_has_nothing_to_offload() -> None:
    log: list[str] = []
    made = sharing(log)
    with made.for_learner():
        log.clear()
    made.learner.is_gone()
    made.for_engines()
    assert log == ["engines onload"]


def test_on_devices_of_their_own_nobody_waits() -> None:
    log: list[str] = []
    made = sharing(log, shared=False)
    made.for_engines()
    with made.for_learner():
        made.for_engines()
    assert log == []
