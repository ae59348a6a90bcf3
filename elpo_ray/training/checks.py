"""What must hold before any actor starts, beyond what the schema itself can check."""

from __future__ import annotations

from pathlib import Path

from elpo_ray import credit, growth
from elpo_ray.cluster.devices import (
    check_address,
    check_build,
    check_gpus,
    check_processors,
    gpus_here,
    processors_here,
)
from elpo_ray.config import Config
from elpo_ray.config.algorithm import AlgorithmConfig
from elpo_ray.config.dotted import is_path
from elpo_ray.config.learner import Packing
from elpo_ray.config.modules import check_modules, use_modules
from elpo_ray.config.rollout import Transfer
from elpo_ray.config.rules import require
from elpo_ray.config.schedule import BudgetScope
from elpo_ray.config.task import TaskName
from elpo_ray.interfaces import Task
from elpo_ray.models.folder import check_context, check_model_path, local_folder
from elpo_ray.runs.atomic import check_writable
from elpo_ray.runs.folder import RunFolder, run_of
from elpo_ray.runs.trackers import check_trackers
from elpo_ray.tasks import make_task
from elpo_ray.tools.caller import Caller
from elpo_ray.tools.catalog import joined, schemas, sources
from elpo_ray.tools.variables import named

PROMPTS_CHECKED = 64
"""Training problems, besides the held-out ones, whose prompts are measured against the context."""


def check(config: Config) -> None:
    """Raise ValueError for what the schema alone cannot see: files, packages, the model."""
    check_modules(config.task.modules)
    use_modules(config.task.modules)
    _check_files(config)
    check_trackers(config.logging)
    check_rules(config.algorithm, shared_budget=config.budget.scope is BudgetScope.batch)
    schemas(config.task, config.sandbox)
    named(config.task.env)
    make_task(config.task, config.trainer.seed)  # it checks the user's own task and reward
    if config.model.path is not None:
        check_model_path(config.model.path)
    require(
        config.engine.endpoint is None,
        "engine.endpoint",
        config.engine.endpoint,
        "an endpoint can be evaluated (python -m elpo_ray.evaluate), not trained",
    )


def check_rules(algorithm: AlgorithmConfig, *, shared_budget: bool = False) -> None:
    """Raise ValueError if a rule of the user's cannot be used as configured."""
    growth.check(algorithm.growth, shared_budget=shared_budget)
    credit.check(algorithm.credit)


def _check_files(config: Config) -> None:
    for key in ("train_file", "eval_file", "demonstrations_file"):
        name = getattr(config.task, key)
        require(
            name is None or Path(name).is_file(),
            f"task.{key}",
            name,
            f"no such file under {Path.cwd()}; name a JSON-lines or parquet file (docs/tasks.md)",
        )
    folder = config.task.data_dir
    require(
        folder is None or Path(folder).is_dir(),
        "task.data_dir",
        folder,
        f"no such folder under {Path.cwd()}; name the one with the data sets (docs/tasks.md)",
    )
    reward = config.task.reward.name
    require(
        config.task.name != TaskName.countdown or reward is None or not is_path(reward),
        "task.reward.name",
        reward,
        "task countdown has its own reward; leave it out or use task=jsonl",
    )
    if config.task.name == TaskName.jsonl:
        for key in ("train_file", "eval_file"):
            value = getattr(config.task, key)
            require(
                value is not None, f"task.{key}", value, "name a JSON-lines file (docs/tasks.md)"
            )


def check_machine(config: Config, *, engines: bool = True) -> None:
    """Raise ValueError for what this machine lacks: the run to resume, folders that can be written
    to, processors, GPUs. Those of a cluster that is joined are counted when it is
    (`cluster.Cluster`). `engines`: whether the run has any."""
    trainer, cache = config.trainer, config.cold_start.cache
    run = RunFolder.of(config)
    new = trainer.resume is None or trainer.fork is not None
    key, value = ("run_dir", trainer.run_dir) if new else ("resume", trainer.resume)
    check_writable(run.path, f"trainer.{key}", str(value))
    if config.model.path is None or config.cold_start.enabled:
        check_writable(Path(cache), "cold_start.cache", cache)
    if config.cluster.address is not None:
        check_address(config.cluster.address)
    elif config.cluster.gpus:
        check_gpus(config, gpus_here(), engines=engines)
        check_build(config)
    else:
        check_processors(config, processors_here(), engines=engines)


def check_rows(config: Config, task: Task, *, supervised: bool = False) -> None:
    """Raise ValueError for what rows and files show, before anything heavy is imported: a data set
    that cannot be read, too few held-out problems, no demonstration where the run begins with a
    cold start, a model that the hub does not have. `supervised`: the run is a cold start alone."""
    path, trainer = config.model.path, config.trainer
    if path is not None and run_of(Path(path)) is None:
        local_folder(path, weights=False)
    first = supervised or (config.cold_start.enabled and trainer.resume is None)
    if (first or path is None) and task.demonstration(0) is None:
        raise no_demonstration(config)
    if not supervised:
        task.train_problem(0)
        task.eval_problems(config.task.eval_problems)


def demonstration_room(config: Config) -> int:
    """The most tokens that a demonstration may have."""
    return config.cold_start.max_tokens or config.model.max_context


def no_demonstration(config: Config) -> ValueError:
    """What is raised where a model begins with demonstrations and there is none that fits."""
    return ValueError(
        f"task.name={config.task.name}: it has no demonstration within "
        f"cold_start.max_tokens={demonstration_room(config)}; name some with "
        "task.demonstrations_file, raise the limit or leave the cold start out "
        "(cold_start.enabled=false)"
    )


def check_model(config: Config, folder: Path) -> str | None:
    """Raise ValueError, saying why, if the learner cannot train the model in `folder` or the
    engines cannot take its weights. Returns a line for the user where shared prefixes are asked for
    and the model does not allow them, else None. A tiny model is known to be in order."""
    if config.model.path is None:
        return None
    from elpo_ray.models.architectures import causal_lm, check_trainable  # with torch
    from elpo_ray.models.layout import check_layout

    folder = local_folder(folder)
    verdict = check_trainable(folder, config.model.max_context)
    check_layout(folder, causal_lm(folder)[1], complete=config.transfer is Transfer.host)
    if config.learner.packing is verdict.packing or config.learner.packing is Packing.flat:
        return None
    return (
        f"learner.packing={config.learner.packing.value}: {folder.name} is trained on flat "
        f"sequences, since {verdict.reason}"
    )


def check_prompts(config: Config, task: Task, folder: Path) -> None:
    """Raise ValueError unless there are as many held-out problems as asked for, and chat template
    and context window fit the model and the task's prompts."""
    from elpo_ray.chat.template import Chat  # seconds to import, which `check` must not take

    room = config.model.max_context
    here = local_folder(folder, weights=False)
    check_context(here, "model.max_context", room)
    made = sources(config.task, Caller(config.task.tool_timeout_s))
    tools = joined(config.task, config.sandbox, made)
    chat = Chat.from_folder(str(here), tools, config.model)
    problems = [task.train_problem(index) for index in range(PROMPTS_CHECKED)]
    for problem in problems + task.eval_problems(config.task.eval_problems):
        for source in made:
            source.check(problem)
        length = len(chat.prompt_ids(problem.messages))
        require(
            length < room,
            "model.max_context",
            room,
            f"problem {problem.id} alone has {length} tokens of prompt; raise it",
        )
