"""A task of the user's: a class or a factory by its path, checked before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elpo_ray.config.task import TaskConfig
from elpo_ray.tasks import make_task
from elpo_ray.types import Problem

TASKS = """
from elpo_ray.interfaces import Task
from elpo_ray.types import Problem, Score

class Sums(Task):
    def __init__(self, config, seed, *, top=9):
        self.config, self.seed, self.top = config, seed, top
    def train_problem(self, index):
        asked = {"role": "user", "content": f"{index} + {self.top}"}
        return Problem(f"sum-{index}", (asked,), None)
    def eval_problems(self, count): return [self.train_problem(-1 - i) for i in range(count)]
    async def score(self, problem, steps, tools): return Score(1.0, True)

def factory(config, seed): return Sums(config, seed, top=3)
class Half(Task):
    def __init__(self, config, seed): ...
    def train_problem(self, index): ...
class Bare:
    def __init__(self, config, seed): ...
    train_problem = eval_problems = score = lambda self: None
class Broken(Sums):
    def __init__(self, config, seed): raise RuntimeError("no data")
def nothing(config, seed): return None
def narrow(config): ...
"""


@pytest.fixture(autouse=True)
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_tasks.py").write_text(TASKS)
    monkeypatch.syspath_prepend(str(tmp_path))


def make(name: str, **options: Any) -> Any:
    return make_task(TaskConfig(name=f"own_tasks:{name}", options=options), 7)


def test_a_class_and_a_factory_make_the_task() -> None:
    task = make("Sums", top=5)
    assert (task.seed, task.config.max_turns) == (7, TaskConfig().max_turns)
    assert task.train_problem(2).messages[0]["content"] == "2 + 5"
    assert make("factory").top == 3
    problem = Problem("p", (), None)
    assert task.answer(problem, []) is None
    assert task.recoverable(problem, []) is None
    assert task.demonstration(0) is None


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Suns", {}, "own_tasks has no Suns; did you mean Sums"),
        ("Half", {}, "Half has no eval_problems, score; a task has the methods"),
        ("Bare", {}, "Bare has no answer, recoverable, demonstration; a task"),
        ("Broken", {}, "raised RuntimeError: no data; mend it"),
        ("nothing", {}, "NoneType has no train_problem, eval_problems, score"),
        ("narrow", {}, r"it must take \(config, seed\)"),
        ("Sums", {"tpo": 1}, "no option tpo; it takes top"),
    ],
)
def test_what_is_no_task_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"task\.name='own_tasks:{name}': {message}"):
        make(name, **options)
