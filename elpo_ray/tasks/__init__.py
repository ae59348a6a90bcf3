"""Task families, by name. A task knows problems, tools, rewards; nothing of models or rollouts."""

from __future__ import annotations

from elpo_ray.config import TaskConfig, TaskName
from elpo_ray.interfaces import Task
from elpo_ray.tasks.countdown import Countdown
from elpo_ray.tasks.jsonl import Jsonl

TASKS: dict[TaskName, type[Countdown] | type[Jsonl]] = {
    TaskName.countdown: Countdown,
    TaskName.jsonl: Jsonl,
}


def make_task(config: TaskConfig, seed: int) -> Task:
    """The configured task; `seed` orders its training stream. ValueError on an unusable file."""
    return TASKS[config.name](config, seed)
