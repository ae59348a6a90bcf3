"""Training from Python: `elpo_ray.train`, and the run that comes back.

Tools, rewards and rules may be objects of the caller's: functions of a notebook or of `__main__`,
too. Each is registered under its name (`config.dotted`), and actors get it by value.
"""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from elpo_ray.config import Config
from elpo_ray.config.compose import composed
from elpo_ray.config.dotted import register
from elpo_ray.config.files import RunFile
from elpo_ray.dump import read_line
from elpo_ray.runs.log import LOG, HeldOut, held_out, read_columns
from elpo_ray.training.checks import check, check_machine
from elpo_ray.tree import RolloutTree

PLAIN = (str, bool, int, float, type(None))
"""Values that a configuration holds as they are."""


@dataclass(frozen=True)
class Run:
    """A run's folder, read when asked."""

    folder: Path
    interrupted: bool = False
    """Ctrl-C ended it; `train(…, trainer={"resume": run.folder})` goes on."""

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The numbers of each step, counted from 1 (docs/metrics.md)."""
        lines = (self.folder / LOG).read_text(encoding="utf-8").splitlines()
        return [row for row in map(json.loads, lines) if row["step"] > 0]

    @property
    def held_out(self) -> list[HeldOut]:
        """The learning curve: held-out pass@1 with its 95 % interval, step 0 before training."""
        return held_out(read_columns(self.folder)[0]).get("", [])

    @property
    def trees(self) -> dict[int, list[RolloutTree]]:
        """The trees of each step, counted from 1, as they were dumped: what a step said and what
        its tool answered are in a node's `extra` (docs/tree.schema.json)."""
        return {
            int(path.stem.removeprefix("step_")): [
                read_line(line) for line in path.read_text(encoding="utf-8").splitlines()
            ]
            for path in sorted((self.folder / "trees").glob("step_*.jsonl"))
        }

    @property
    def summary(self) -> dict[str, Any]:
        """What came of the whole run; empty before its end."""
        path = self.folder / "summary.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}

    def export(
        self, folder: str | Path | None = None, *, step: int | None = None, adapter: str = "merged"
    ) -> Path:
        """Write the weights as a plain Hugging Face folder, as `elpo export` does; returns it."""
        from elpo_ray.learner.saved import export_run  # with torch

        return export_run(self.folder, None if folder is None else Path(folder), step, adapter)


def train(
    file: str | Path | None = None,
    /,
    *,
    tools: Sequence[Any] | None = None,
    reward: Any = None,
    **settings: Any,
) -> Run:
    """Train as `elpo train FILE` does, and return the run.

    `tools` and `reward` stand for `task.tools` and `task.reward`; `settings` are further keys of a
    file, over it: `trainer={"steps": 100}`, `algorithm="grpo"`, `**{"learner.optimizer.lr": 1e-6}`.
    Wherever a file has `module:attribute`, the object itself may stand. Paths in `settings` are
    relative to the working directory. Raises ValueError for a mistake, before anything starts, and
    `elpo_ray.types.Fault` for a failure that leaves something to continue from.
    """
    config = configured(file, tools, reward, settings)
    check(config)
    check_machine(config)
    from elpo_ray.training.driver import train

    outcome = train(config)
    return Run(outcome.folder.absolute(), outcome.interrupted)


def configured(
    file: str | Path | None,
    tools: Sequence[Any] | None,
    reward: Any,
    settings: Mapping[str, Any],
) -> Config:
    """The checked configuration of such a run, its objects registered."""
    task: dict[str, Any] = {}
    if tools is not None:
        task["tools"] = list(tools)
    if reward is not None:
        task["reward"] = reward
    given = [dict(settings), {"task": task}] if task else [dict(settings)]
    folders: dict[str, None] = {}
    read = RunFile.read(Path(file)) if file is not None else RunFile("python", {}, {})
    for part in given:
        read = read.over(_named(part, "", folders))
    modules = [*read.modules, *(folder for folder in folders if folder not in read.modules)]
    return composed([], read.over({"task": {"modules": modules}}))


def _named(value: Any, name: str, folders: dict[str, None]) -> Any:
    """A value with the paths of its objects in their place. The folders of the modules that the
    objects need are added to `folders`."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: _named(each, str(key), folders) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_named(each, name, folders) for each in value]
    folder = _folder_of(getattr(value, "__module__", None))
    if folder is not None:
        folders[folder] = None
    own = getattr(value, "__name__", None) or type(value).__name__
    return register(own if own.isidentifier() else name.rpartition(".")[2], value)


def _folder_of(module: str | None) -> str | None:
    """The folder from which an object's module can be imported elsewhere: of `__main__`, that of
    the script or notebook; None for a module that is installed."""
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    if module == "__main__" and (file is None or _installed(file)):
        return os.getcwd()  # a notebook, whose program is installed, or an interpreter
    if file is None or _installed(file) or module is None:
        return None
    path = Path(file).resolve()
    depth = 0 if module == "__main__" else module.count(".") + (path.name == "__init__.py")
    return str(path.parents[depth])


def _installed(file: str) -> bool:
    """Whether a file belongs to the installation of Python, its packages and programs."""
    places = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib", "scripts")}
    own = Path(__file__).resolve().parents[1]
    path = Path(file).resolve()
    return any(path.is_relative_to(Path(place).resolve()) for place in places) or (
        path.is_relative_to(own)
    )
