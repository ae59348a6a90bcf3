"""Who is on shared devices, and when."""

import threading
from functools import partial

from elpo_ray.cluster.turns import Turns


def turns(log: list[str], *, shared: bool = True) -> Turns:
    made = Turns(shared=shared)
    for name, side in (("engines", made.engines), ("learner", made.learner)):
        side.enter = partial(log.append, f"{name} enter")
        side.leave = partial(log.append, f"{name} leave")
    return made


def test_one_leaves_before_the_other_enters() -> None:
    log: list[str] = []
    made = turns(log)
    for _ in range(2):
        made.of_engines()
        made.of_engines()
        with made.of_learner(), made.of_learner():
            pass
    there = ["learner leave", "engines enter", "engines leave", "learner enter"]
    assert log == there * 2


def test_engines_wait_for_the_end_of_the_learners_turn() -> None:
    log: list[str] = []
    made = turns(log)
    with made.of_learner():
        thread = threading.Thread(target=made.of_engines)
        thread.start()
        thread.join(0.05)
        log.append("still learning")
    thread.join()
    assert log == [
        "engines leave",
        "learner enter",
        "still learning",
        "learner leave",
        "engines enter",
    ]


def test_a_side_that_is_gone_has_nothing_to_leave() -> None:
    log: list[str] = []
    made = turns(log)
    with made.of_learner():
        log.clear()
    made.learner.is_gone()
    made.of_engines()
    assert log == ["engines enter"]


def test_devices_of_their_own_need_no_turns() -> None:
    log: list[str] = []
    made = turns(log, shared=False)
    made.of_engines()
    with made.of_learner():
        made.of_engines()
    assert log == []
