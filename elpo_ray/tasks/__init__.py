"""Task families, by name, and the user's own by dotted path. A task knows problems, tools, rewards;
nothing of models or rollouts."""

from __future__ import annotations

from elpo_ray.config.dotted import is_path
from elpo_ray.config.modules import use_modules
from elpo_ray.config.task import TaskConfig, TaskName
from elpo_ray.interfaces import Task
from elpo_ray.tasks import gpqa, jsonl, livecodebench, mathematics, open_agentrl
from elpo_ray.tasks.countdown import Countdown
from elpo_ray.tasks.own import make_own
from elpo_ray.tasks.problem_set import Family, ProblemSet
from elpo_ray.tasks.reasoning_gym import ReasoningGym

FAMILIES: dict[str, Family] = {
    **mathematics.FAMILIES,
    **gpqa.FAMILIES,
    **livecodebench.FAMILIES,
    **open_agentrl.FAMILIES,
    **jsonl.FAMILIES,
}


def make_task(config: TaskConfig, seed: int) -> Task:
    """The configured task; `seed` orders its training stream. ValueError if the configuration is
    unusable; files and data sets are looked at when problems are asked for. Modules of
    `task.modules` can be imported in this process from then on."""
    use_modules(config.modules)
    if is_path(config.name):
        return make_own(config, seed)
    if config.name == TaskName.countdown:
        return Countdown(config, seed)
    if config.name == TaskName.reasoning_gym:
        return ReasoningGym(config, seed)
    return ProblemSet(FAMILIES, config, seed)
