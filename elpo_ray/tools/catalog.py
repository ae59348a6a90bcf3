"""`task.tools` as sources and schemas: the same for the driver, which checks prompts, and for the
workers, which call them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from elpo_ray.config.dotted import is_path, load_object
from elpo_ray.config.modules import use_modules
from elpo_ray.config.rollout import SandboxConfig
from elpo_ray.config.task import CODE_INTERPRETER, TaskConfig
from elpo_ray.tools import code_interpreter
from elpo_ray.tools.caller import Caller
from elpo_ray.tools.environments import EnvironmentSource
from elpo_ray.tools.functions import FunctionSource
from elpo_ray.tools.sources import Schema, ToolSource

READY_MADE: dict[str, str] = {
    "search": "elpo_ray.tools.search:SearchSource",
    "mcp": "elpo_ray.tools.mcp:McpSource",
    "gymnasium": "elpo_ray.tools.gymnasium:GymnasiumSource",
}
"""By the first key of a mapping in `task.tools`, as `search` of `{search: corpus.jsonl}`: the class
that is made with `(where, entry, task, caller)`. Loaded when it is asked for."""


def sources(task: TaskConfig, caller: Caller) -> list[ToolSource]:
    """A source for every entry of `task.tools` but the code interpreter, in their order. Imports
    the user's modules. ValueError, in one line, for an entry that cannot be used."""
    use_modules(task.modules)
    made = [
        source_of(f"task.tools[{place}]={entry!r}", f"task.tools[{place}]", entry, task, caller)
        for place, entry in enumerate(task.tools)
        if entry != CODE_INTERPRETER
    ]
    judges = [source.name for source in made if source.rewards]
    if len(judges) > 1:
        raise ValueError(
            f"task.tools={task.tools!r}: {' and '.join(judges)} both have a reward(); keep one, "
            "and put what both decide into task.reward"
        )
    return made


def source_of(where: str, key: str, entry: Any, task: TaskConfig, caller: Caller) -> ToolSource:
    """The source of one entry, which stands under `key`; `where` begins every error."""
    if isinstance(entry, dict):
        kind = next(iter(entry))
        if kind not in READY_MADE:
            known = ", ".join(READY_MADE) or "none"
            raise ValueError(f"{where}: no ready-made tool is called {kind}; there are {known}")
        ready: ToolSource = load_object(key, READY_MADE[kind])(where, entry, task, caller)
        return ready
    if not is_path(entry):
        raise ValueError(f"{where}: use {CODE_INTERPRETER} or module:attribute, as in shop:search")
    found = load_object(key, entry)
    if inspect.isclass(found):
        return EnvironmentSource(where, entry, found, task.branching, caller)
    if not callable(found):
        raise ValueError(
            f"{where}: it is {type(found).__name__}; a tool is a function, or a class whose public "
            "methods are tools"
        )
    return FunctionSource(where, entry, found, caller)


def judged(task: TaskConfig) -> bool:
    """Whether a tool of the task is an environment with a reward of its own."""
    use_modules(task.modules)
    for entry in task.tools:
        if isinstance(entry, dict):
            found = load_object("task.tools", READY_MADE[next(iter(entry))])
            if found.rewards:
                return True
        elif is_path(entry):
            found = load_object("task.tools", entry)
            if inspect.isclass(found) and hasattr(found, "reward"):
                return True
    return False


def schemas(task: TaskConfig, sandbox: SandboxConfig) -> list[Schema]:
    """What the policy reads of its tools, in the order of `task.tools`. ValueError as `sources`,
    and for two tools of one name."""
    return joined(task, sandbox, sources(task, Caller(task.tool_timeout_s)))


def joined(task: TaskConfig, sandbox: SandboxConfig, made: Sequence[ToolSource]) -> list[Schema]:
    """The schemas of the interpreter, if there is one, and of `made`. ValueError for two tools of
    one name."""
    python = code_interpreter.STATELESS_SCHEMA if sandbox.stateless else code_interpreter.SCHEMA
    others = iter(made)
    owner: dict[str, str] = {}
    found: list[Schema] = []
    for place, entry in enumerate(task.tools):
        where = f"task.tools[{place}]={entry!r}"
        for schema in [python] if entry == CODE_INTERPRETER else next(others).schemas:
            name = schema["function"]["name"]
            if name in owner:
                raise ValueError(f"{where}: {owner[name]} has a tool named {name} too; rename one")
            owner[name] = where
            found.append(schema)
    return found
