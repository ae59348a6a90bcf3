"""When an engine counts as idle."""

from elpo_ray.rollout.counters import RolloutCounters


def test_idle_is_work_without_a_turn() -> None:
    now = [0.0]
    counters = RolloutCounters(clock=lambda: now[0])

    def after(seconds: float, *changes: tuple[str, int]) -> None:
        now[0] += seconds
        for name, change in changes:
            getattr(counters, name)(change)

    after(10, ("episode", 1), ("turn", 1))  # nothing to do: not counted
    after(3, ("turn", -1))
    after(2, ("turn", 1), ("turn", 1))  # idle for 2
    after(1, ("episode", 1), ("turn", -1))
    after(4, ("turn", -1))
    after(5, ("episode", -1), ("episode", -1))  # idle for 5
    after(7)
    values = counters.values()
    assert (values["busy_s"], values["idle_s"]) == (15.0, 7.0)
    assert (values["episodes"], values["turns"]) == (0, 0)
