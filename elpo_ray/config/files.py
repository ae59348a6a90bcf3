"""A run's file: `elpo train shop.yaml`, YAML with a run's keys and nothing else.

It stands where `+experiment=NAME` would: its values replace the defaults, and `key=value` on the
command line replaces its values. Where a group has options, a name chooses one (`algorithm: grpo`).
A path in the file is relative to the file's folder, and modules in that folder can be loaded
(`task.modules`), so that the run is the same from any folder.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from elpo_ray.config import CONF_DIR, Config
from elpo_ray.config.errors import explain, mismatch
from elpo_ray.config.values import expanded

Values = dict[str, Any]

SUFFIXES = (".yaml", ".yml")
GROUPS = ("model", "task", "algorithm", "cluster")
"""Groups of conf/ whose options a file can choose by name."""
PLACES = ("model", "cluster")
"""Groups of them whose options stand for a thing, so that one that is chosen over a file replaces
what the file says of another; an algorithm or a task keeps the file's settings."""
TASK = "jsonl"
"""The task of a file that names none."""
NAMED_MODEL = "named"
"""The option with the schema's own values: the base where `model.path` names the model."""
PATHS = (
    "task.train_file",
    "task.eval_file",
    "task.demonstrations_file",
    "task.data_dir",
    "trainer.run_dir",
    "trainer.resume",
    "cold_start.cache",
)
"""Keys whose values are paths."""


@dataclass(frozen=True)
class RunFile:
    """What a run's file sets."""

    name: str
    """The experiment's name unless the file gives one: the file's own, without suffix."""
    values: Values
    """Nested, under the schema's names, paths absolute."""
    choices: dict[str, str]
    """Options of groups: `{"algorithm": "grpo"}`."""

    @classmethod
    def read(cls, path: Path) -> RunFile:
        """Read a file and check its names and types. Raises ValueError, in one line that names
        the file and the key."""
        path = _absolute(path)
        try:
            file = cls.of(_load(path), path.stem, path.parent)
        except ValueError as error:
            raise ValueError(f"{_shown(path)}: {error}") from None
        return file.over({"task": {"modules": [str(path.parent), *file.modules]}})

    @classmethod
    def of(cls, values: Mapping[str, Any], name: str, folder: Path) -> RunFile:
        """What a file with these values in `folder` sets. Raises ValueError as `read`."""
        nested = dict(expanded(_nested(values)))
        choices = _choices(nested)
        _check_sections(nested, Config)
        try:
            OmegaConf.merge(OmegaConf.structured(Config), nested)
        except OmegaConfBaseException as error:
            raise ValueError(explain(error, values=nested)) from None
        _make_absolute(nested, folder)
        return cls(name, nested, choices)

    @property
    def modules(self) -> list[str]:
        return list(self.values.get("task", {}).get("modules", []))

    def over(self, values: Mapping[str, Any]) -> RunFile:
        """This file with other values in place of its own; paths in them are relative to the
        working directory. Raises ValueError as `read`."""
        other = RunFile.of(values, self.name, Path.cwd())
        merged = _merged(self._below(other.choices), other.values)
        return RunFile(self.name, merged, self.choices | other.choices)

    def _below(self, chosen: Mapping[str, str]) -> Values:
        """The file's values without those that options chosen over it set themselves."""
        values = dict(self.values)
        for group in PLACES:
            option = chosen.get(group, self.choices.get(group))
            file = CONF_DIR / group / f"{option}.yaml"
            if group in values and option != self.choices.get(group) and file.is_file():
                own = OmegaConf.load(file)
                values[group] = {k: v for k, v in values[group].items() if k not in own}
        return values

    def run(self, words: Sequence[str] = ()) -> Values:
        """The file as Hydra takes an experiment, for a run with these words on its command line:
        values with a `defaults` list."""
        choices = {"task": TASK} | self.choices
        named = [word for word in words if word.startswith("model.path=")]
        values = self._below(_chosen(words))
        path = named[-1].partition("=")[2] if named else values.get("model", {}).get("path")
        if path not in (None, "null", ""):
            choices.setdefault("model", NAMED_MODEL)
        return _experiment({"experiment": self.name} | values, choices)

    def task(self) -> Values:
        """The same with nothing but the task."""
        choices = {"task": self.choices.get("task", TASK)}
        return _experiment({"task": self.values.get("task", {})}, choices)

    def measured(self, schema: type, origin: str, words: Sequence[str] = ()) -> Values:
        """The same for a command that measures (`schema`), whose only task is the file `origin`:
        its sections of a run, and the model."""
        names = {field.name for field in fields(schema)} - {"task", "model", "sampling"}
        below = self._below(_chosen(words))
        values = {key: value for key, value in below.items() if key in names}
        model = self.values.get("model", {})
        values |= {key: model[key] for key in ("max_context", "precision") if key in model}
        if model.get("path"):
            values["model"] = model["path"]
        choices = {group: name for group, name in self.choices.items() if group in names}
        return _experiment({"tasks": [origin]} | values, choices)


def is_file(word: str) -> bool:
    """Whether a word of a command line names a run's file."""
    return word.endswith(SUFFIXES) and "=" not in word and not word.startswith(("+", "-", "~"))


def file_word(words: Sequence[str]) -> str | None:
    """The word that names a run's file. Raises ValueError for two of them."""
    found = [word for before, word in zip(["", *words], words, strict=False)
             if is_file(word) and not before.startswith("-")]  # fmt: skip
    if len(found) > 1:
        raise ValueError(f"{' '.join(found)}: a run has one file; put the keys of both into it")
    return found[0] if found else None


def _load(path: Path) -> Values:
    try:
        loaded: Any = OmegaConf.load(path)
    except FileNotFoundError:
        raise ValueError(f"no such file under {Path.cwd()}") from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text; save it as that") from None
    except OSError as error:  # a folder, no permission, a file that holds one word
        raise ValueError(f"cannot be read ({error}); write key: value lines") from None
    except YAMLError as error:
        raise ValueError(_yaml_mistake(error)) from None
    values = OmegaConf.to_container(loaded)
    if not isinstance(values, dict):
        raise ValueError("not keys with values; write key: value lines")
    if "defaults" in values:
        choose = "write algorithm: grpo to choose an option of a group"
        raise ValueError(f"defaults: a run's file has no such list; {choose}")
    return {str(key): value for key, value in values.items()}


def _yaml_mistake(error: YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}: " if mark is not None else ""
    problem = error.problem if isinstance(error, MarkedYAMLError) else None
    return f"{place}not YAML ({problem or ' '.join(str(error).split())}); mend it"


def _nested(values: Mapping[str, Any]) -> Values:
    """Values with their dotted keys (`trainer.steps: 3`) as nested ones. A name that chooses an
    option stays beside the values over it, under `GROUP/`."""
    nested: Values = {}
    for key, value in values.items():
        if key in GROUPS and isinstance(value, str):
            nested[f"{key}/"] = value
            continue
        first, dot, rest = key.partition(".")
        part = {first: _nested({rest: value})} if dot else {key: _copied(value)}
        nested = _merged(nested, part)
    return nested


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(each) for key, each in value.items()}
    return [_copied(each) for each in value] if isinstance(value, list | tuple) else value


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> Values:
    """Nested values; where both have one, that of `above`."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merged(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _choices(nested: Values) -> dict[str, str]:
    """Take the names that choose options out of the values: of a group, or as the `name` that a
    section gives itself (`task: {name: countdown}`). Raises ValueError for one that is none."""
    choices: dict[str, str] = {}
    for group in GROUPS:
        options = sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))
        chosen = nested.pop(f"{group}/", None)
        if chosen is not None and chosen not in options:
            raise ValueError(
                f"{group}={chosen}: no such option; choose one of {', '.join(options)}"
            )
        section = nested.get(group)
        own = section.get("name") if isinstance(section, dict) else None
        if (option := chosen or (own if own in options else None)) is not None:
            choices[group] = option
    return choices


def _check_sections(values: Values, schema: type, prefix: str = "") -> None:
    """Raise ValueError for a section that has a value instead of keys, and for a list or a mapping
    that is given as something else."""
    types = get_type_hints(schema)
    for key, value in values.items():
        section: Any = types.get(key)
        if not is_dataclass(section):
            form = mismatch(section, value)
            if form is not None:
                raise ValueError(f"{prefix}{key}={value}: give {form}")
            continue
        if not isinstance(value, dict):
            example = f"{prefix}{key}.{fields(section)[0].name}"
            raise ValueError(f"{prefix}{key}={value}: give its keys one by one, as in {example}: …")
        _check_sections(value, section, f"{prefix}{key}.")  # type: ignore[arg-type]


def _make_absolute(values: Values, folder: Path) -> None:
    """Replace every path in the values, in place."""
    for section, key in (name.split(".") for name in PATHS):
        part = values.get(section) or {}
        value = part.get(key)
        if isinstance(value, str) and not value.startswith("${"):  # of a variable, such as oc.env
            part[key] = str(_absolute(folder / value))
    task, model = values.get("task") or {}, values.get("model") or {}
    if "modules" in task:
        task["modules"] = [str(_absolute(folder / path)) for path in task["modules"]]
    if "tools" in task:
        task["tools"] = [_absolute_tool(entry, folder) for entry in task["tools"] or []]
    path = model.get("path")
    if isinstance(path, str) and (path.startswith((".", "~")) or (folder / path).exists()):
        model["path"] = str(_absolute(folder / Path(path).expanduser()))


def _absolute(path: Path) -> Path:
    """Absolute and without `..`, symbolic links as they are."""
    return Path(os.path.abspath(path))


def _absolute_tool(entry: Any, folder: Path) -> Any:
    """An entry of `task.tools` with the files that it names beside the run's file: a corpus, and
    words of the command that starts a server."""
    if not isinstance(entry, dict):
        return entry
    entry = dict(entry)
    if isinstance(entry.get("search"), str):
        entry["search"] = str(_absolute(folder / entry["search"]))
    command = entry.get("mcp")
    if isinstance(command, str) and "://" not in command:
        try:
            words = shlex.split(command)
        except ValueError as error:
            reason = f"{str(error).lower()}; close every quote"
            raise ValueError(f"task.tools: {entry}: {reason}") from None
        if here := [word for word in words if (folder / word).is_file()]:
            entry["mcp"] = shlex.join(
                str(folder / word) if word in here else word for word in words
            )
    return entry


def _chosen(words: Sequence[str]) -> dict[str, str]:
    """The options of groups that words of a command line choose."""
    pairs = (word.partition("=") for word in words)
    return {key: value for key, _, value in pairs if key in GROUPS}


def _experiment(values: Values, choices: Mapping[str, str]) -> Values:
    defaults = [{f"override /{group}": option} for group, option in choices.items()]
    return {"defaults": [*defaults, "_self_"]} | values


def _shown(path: Path) -> Path:
    """The path as a user in the working directory writes it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
