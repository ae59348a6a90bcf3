"""Reading a run folder, whatever state it is in.

Invariant: nothing that a file holds raises. What cannot be read becomes a `Notice`, and the rest is
shown. Only a folder that holds no run at all is an error.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from elpo_ray.config.algorithm import AlgorithmConfig
from elpo_ray.config.values import typed
from elpo_ray.dump import MalformedTreeError, read_tree
from elpo_ray.runs.log import LOG, Notice, lines, parsed
from elpo_ray.tree import RolloutTree

SIGNS = ("config.yaml", LOG, "trees")
"""Any of these makes a folder a run."""


@dataclass(frozen=True)
class Dump:
    """One step's trees."""

    step: int
    trees: list[tuple[int, RolloutTree]]
    """Each tree comes with its line, from 1."""
    notices: list[Notice]


@dataclass
class Settings:
    """What the page needs of `config.yaml`."""

    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    text: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    """Interpolations are resolved; it is empty if the file cannot be read."""
    notices: list[Notice] = field(default_factory=list)

    def get(self, key: str) -> Any:
        """Return the value of a dotted key; None if there is none."""
        value: Any = self.values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def check_run(path: Path) -> Path:
    """Return the run folder itself. Raises ValueError if `path` holds no run."""
    if not path.exists():
        raise ValueError(f"{path}: no such folder; name one under runs/")
    if path.is_dir() and any((path / sign).exists() for sign in SIGNS):
        return path
    raise ValueError(
        f"{path}: not a run folder (none of {', '.join(SIGNS)} in it); name one under runs/"
    )


def read_settings(run: Path) -> Settings:
    """Return the run's configuration, or defaults with a notice where it cannot be had."""
    path = run / "config.yaml"
    fallback = "credit is computed with the defaults of ELPO"
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        reason = f"no configuration ({error.strerror}); {fallback}"
        return Settings(notices=[Notice(reason, path.name)])
    try:
        loaded = OmegaConf.create(text)
        assert isinstance(loaded, DictConfig), "YAML text is a mapping or OmegaConf refuses it"
        values: Any = OmegaConf.to_container(loaded, resolve=True)
        algorithm = typed(AlgorithmConfig, OmegaConf.create(values.get("algorithm") or {}))
    except (OmegaConfBaseException, YAMLError, ValueError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        notice = Notice(f"this version does not understand it ({reason}); {fallback}", path.name)
        return Settings(text=text, notices=[notice])
    return Settings(algorithm=algorithm, text=text, values=values)


def read_summary(run: Path) -> dict[str, Any] | None:
    """Return `summary.json`; None while the run has not ended, or if it is no object."""
    try:
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        return None
    return summary if isinstance(summary, dict) else None


def tree_files(run: Path) -> list[tuple[int, Path]]:
    """Return the dumps and their steps, ascending."""
    found = []
    for path in (run / "trees").glob("step_*.jsonl"):
        number = path.stem.removeprefix("step_")
        if number.isdecimal():
            found.append((int(number), path))
    return sorted(found)


def read_dump(step: int, path: Path) -> Dump:
    """Return every readable tree of one step."""
    dump = Dump(step, [], [])
    for number, line in lines(path):
        where = f"trees/{path.name}:{number}"
        record, problem = parsed(line)
        if not problem:
            try:
                dump.trees.append((number, read_tree(record)))
                continue
            except MalformedTreeError as error:
                problem = f"tree not shown: {error}"
        dump.notices.append(Notice(problem, where))
    return dump


def stamp(path: Path) -> tuple[int, int]:
    """Return what changes whenever the file does; (0, 0) if it is not there."""
    try:
        status = path.stat()
    except OSError:
        return (0, 0)
    return (status.st_size, status.st_mtime_ns)


def last_change(run: Path) -> float:
    """Return when a run last wrote a file of its steps, in seconds since the epoch."""
    paths = [run / LOG, run / "config.yaml", *(p for _, p in tree_files(run)[-1:])]
    return max((os.path.getmtime(path) for path in paths if path.exists()), default=0.0)
