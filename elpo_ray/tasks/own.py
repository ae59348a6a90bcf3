"""A task of the user's, named by its dotted path: loaded, checked, made."""

from __future__ import annotations

import inspect

from elpo_ray.config.dotted import check_call, load_object
from elpo_ray.config.task import TaskConfig
from elpo_ray.interfaces import Task

KEY = "task.name"
OWN = ("train_problem", "eval_problems", "score")
"""What a task must define itself; the rest it may inherit from `interfaces.Task`."""
INHERITED = tuple(
    name
    for name, value in vars(Task).items()
    if inspect.isfunction(value) and name[0] != "_" and name not in OWN
)


def make_own(config: TaskConfig, seed: int) -> Task:
    """The task that `task.name` names: a class or a factory, called with (config, seed) and
    `task.options` as keywords. ValueError, in one line, for what is no task."""
    where = f"{KEY}={config.name!r}"
    factory = load_object(KEY, config.name)
    check_call(where, factory, ("config", "seed"), config.options)
    if isinstance(factory, type):
        _check_methods(where, factory)
    try:
        made = factory(config, seed, **config.options)
    except Exception as fault:  # the user's code is a boundary
        raise ValueError(f"{where}: raised {type(fault).__name__}: {fault}; mend it") from fault
    _check_methods(where, type(made))
    task: Task = made
    return task


def _check_methods(where: str, kind: type) -> None:
    missing = [name for name in OWN if getattr(kind, name, None) in (None, getattr(Task, name))]
    missing += [name for name in INHERITED if not callable(getattr(kind, name, None))]
    if missing:
        raise ValueError(
            f"{where}: {kind.__name__} has no {', '.join(missing)}; a task has the methods of "
            f"elpo_ray.interfaces.Task, and a subclass of it inherits {', '.join(INHERITED)}"
        )
