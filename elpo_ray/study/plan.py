"""A study's file: which runs it asks for.

    experiment: quickstart               # or file: shop.yaml, as `elpo train` takes it
    set: {trainer.eval_every: 4}         # for all runs
    arms: [grpo, elpo]                   # algorithms, or names with overrides
    grid: {learner.optimizer.lr: [1.0e-4, 2.0e-4]}   # every arm with every value
    tasks: {easy: {}, hard: {task.countdown.numbers: 6}}
    seeds: 3
    baseline: grpo
    samples: {n: 16, ks: [4, 16], problems: 100}     # of every trained model, for Pass@K

A run is an arm on a task with a seed. Nothing starts before all configurations are sound.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from elpo_ray.config import CONF_DIR, Config
from elpo_ray.config.compose import composed
from elpo_ray.config.measure import DEFAULT_KS
from elpo_ray.config.values import flattened, hydra_value, plain

Overrides = dict[str, Any]

KEYS = ("experiment", "file", "set", "arms", "grid", "tasks", "seeds", "baseline", "samples")
BASES = ("experiment", "file")
"""Keys that say what a run begins with; a task may have its own."""
OURS = ("trainer.seed", "trainer.run_name", "trainer.run_dir", "trainer.resume", "check_only")
"""What the study sets itself."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,=+-]*")
NO_MATTER = ("trainer.run_", "trainer.resume", "trainer.checkpoint_every", "trainer.keep_",
             "trainer.background_", "cold_start.cache", "logging.", "check_only", "experiment",
             "cluster.dashboard", "task.modules")  # fmt: skip
"""Beginnings of keys that say nothing about a result."""


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    task: str
    arm: str
    seed: int
    words: tuple[str, ...]
    """Its command line, but for what is the study's own."""
    config: Config

    @property
    def name(self) -> str:
        """Its task, arm and seed; also the name of its record."""
        return f"{self.task}-{self.arm}-{self.seed}"

    @property
    def settings(self) -> Overrides:
        """The values that a result depends on, of those that are not the schema's defaults."""
        defaults = flattened(plain(Config()))
        values = flattened(plain(self.config))
        return {
            key: value
            for key, value in sorted(values.items())
            if value != defaults.get(key) and not key.startswith(NO_MATTER)
        }

    @property
    def digest(self) -> str:
        """A short name for `settings`."""
        text = json.dumps(self.settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Samples:
    """Samples of held-out problems, from which Pass@K and Major@K follow."""

    n: int
    """Samples of each problem."""
    ks: tuple[int, ...]
    problems: int | None
    """None: as many as the task's evaluation has."""


@dataclass(frozen=True)
class Study:
    """All runs that a file asks for."""

    name: str
    cells: tuple[Cell, ...]
    baseline: str | None
    """The arm that the others are compared with."""
    samples: Samples | None = None
    """What is sampled of every trained model."""

    @classmethod
    def read(cls, path: Path) -> Study:
        """Raises ValueError, in one line that names the file and the key."""
        try:
            values = _load(path)
            _known(values, KEYS, "")
            return _study(values, path)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def only(self, patterns: Sequence[str]) -> Study:
        """The runs whose names match one of the patterns of a shell. Raises ValueError if a pattern
        matches none."""
        for pattern in patterns:
            if not any(fnmatchcase(cell.name, pattern) for cell in self.cells):
                raise ValueError(
                    f"--only {pattern}: no run has such a name; write it like "
                    f"{self.cells[0].name}, with * for any part"
                )
        chosen = (c for c in self.cells if any(fnmatchcase(c.name, each) for each in patterns))
        return replace(self, cells=tuple(chosen))


def _study(values: Mapping[str, Any], path: Path) -> Study:
    shared = _base(values, path) | _overrides(values.get("set"), "set")
    arms = dict(_crossed(_arms(values), _grid(values)))
    alone = Path(str(shared.get("file", shared.get("experiment", "task")))).stem
    tasks = _entries(values.get("tasks", [alone]), "tasks")
    seeds = _seeds(values.get("seeds", 1), "seeds")
    baseline = values.get("baseline")
    if baseline is not None and baseline not in arms:
        raise ValueError(f"baseline={baseline}: no such arm; use one of {', '.join(arms)}")
    cells: list[Cell] = []
    for task, entry in tasks.items():
        where = f"tasks.{task}"
        own = {key: entry.pop(key) for key in ("seeds", "arms") if key in entry}
        of_task = shared | _base(entry, path) | _overrides(entry, where, BASES)
        if "file" in entry:
            of_task.pop("experiment", None)
        wanted = _wanted(own.get("arms", list(arms)), arms, f"{where}.arms")
        here = _seeds(own["seeds"], f"{where}.seeds") if "seeds" in own else None
        for arm in wanted:
            allowed = arms[arm].get("seeds")
            chosen = seeds if here is None else here
            if allowed is not None:
                chosen = [s for s in allowed if here is None or s in here]
            settings = of_task | {k: v for k, v in arms[arm].items() if k != "seeds"}
            cells += _cells(task, arm, chosen, settings)
    if not cells:
        raise ValueError("seeds: no arm has a seed in common with a task; give some")
    # All arms with a task's first seed come first: what is there early can be compared.
    order = {(cell.task, cell.arm): 0 for cell in cells}
    ranks = []
    for cell in cells:
        ranks.append(order[cell.task, cell.arm])
        order[cell.task, cell.arm] += 1
    ranked = sorted(zip(ranks, cells, strict=True), key=itemgetter(0))
    samples = _samples(values["samples"]) if values.get("samples") is not None else None
    return Study(path.stem, tuple(cell for _, cell in ranked), baseline, samples)


def _samples(given: Any) -> Samples:
    keys = ("n", "ks", "problems")
    if not isinstance(given, Mapping):
        raise ValueError(f"samples={given}: give keys with values, as in {{n: 16}}")
    _known(given, keys, "samples.")
    n, ks, problems = given.get("n", 16), given.get("ks"), given.get("problems")
    for key, value in (("n", n), ("problems", 1 if problems is None else problems)):
        if type(value) is not int or value < 1:
            raise ValueError(f"samples.{key}={value}: give a whole number above 0")
    chosen = [k for k in DEFAULT_KS if k <= n] if ks is None else ks
    if not isinstance(chosen, list) or not all(type(k) is int and 1 <= k <= n for k in chosen):
        raise ValueError(f"samples.ks={ks}: give a list of whole numbers from 1 to n={n}")
    return Samples(n, tuple(chosen), problems)


def _cells(task: str, arm: str, seeds: list[int], settings: Overrides) -> Iterator[Cell]:
    """The runs of one arm on one task, composed once."""
    words = _words(settings)
    try:
        config = composed(list(words))
    except ValueError as error:
        raise ValueError(f"arm {arm} on {task}: {error}") from None
    for seed in seeds:
        seeded = replace(config, trainer=replace(config.trainer, seed=seed))
        yield Cell(task, arm, seed, words, seeded)


def _arms(values: Mapping[str, Any]) -> dict[str, Overrides]:
    """The overrides of every arm, with its own `seeds` where it has some."""
    given = values.get("arms")
    if not given:
        raise ValueError("arms: name at least one algorithm, as in [grpo, elpo]")
    algorithms = {path.stem for path in (CONF_DIR / "algorithm").glob("*.yaml")}
    arms = {}
    for name, entry in _entries(given, "arms").items():
        seeds = (
            {"seeds": _seeds(entry.pop("seeds"), f"arms.{name}.seeds")} if "seeds" in entry else {}
        )
        own = _overrides(entry, f"arms.{name}")
        if "algorithm" not in own and name in algorithms:
            own = {"algorithm": name} | own
        if not own and name not in algorithms:
            near = difflib.get_close_matches(name, algorithms, n=2)
            meant = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"arms.{name}: no algorithm of that name, and no overrides{meant}")
        arms[name] = own | seeds
    return arms


def _grid(values: Mapping[str, Any]) -> dict[str, list[Any]]:
    grid = _overrides(values.get("grid"), "grid")
    for key, choices in grid.items():
        if not isinstance(choices, list) or not choices:
            raise ValueError(f"grid.{key}={choices}: give a list of values, as in [1, 2]")
    return grid


def _crossed(
    arms: Mapping[str, Overrides], grid: Mapping[str, list[Any]]
) -> Iterator[tuple[str, Overrides]]:
    """Every arm with every combination of the grid's values, which stand in its name."""
    for name, own in arms.items():
        for values in product(*grid.values()):
            chosen = dict(zip(grid, values, strict=True))
            ends = [f",{key.rpartition('.')[2]}={_short(value)}" for key, value in chosen.items()]
            yield name + "".join(ends), own | chosen


def _short(value: Any) -> str:
    """A value as a part of a name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "+", str(value)).strip("+") or "none"


def _wanted(names: Any, arms: Mapping[str, Any], where: str) -> list[str]:
    """The arms of one task; a name without the grid's values means all of its combinations."""
    if not isinstance(names, list):
        raise ValueError(f"{where}={names}: give a list of arms")
    found: list[str] = []
    for name in names:
        mine = [arm for arm in arms if arm == name or arm.startswith(f"{name},")]
        if not mine:
            raise ValueError(f"{where}: no arm {name}; use some of {', '.join(arms)}")
        found += mine
    return found


def _base(values: Mapping[str, Any], path: Path) -> Overrides:
    """What a run begins with: an experiment's name, or the file of a run."""
    both = [key for key in BASES if key in values]
    if len(both) == 2:
        raise ValueError("file: leave it out, or leave out experiment")
    base: Overrides = {key: str(values[key]) for key in both}
    if "file" in base:
        base["file"] = str((path.parent / base["file"]).resolve())
    return base


def _overrides(given: Any, where: str, besides: tuple[str, ...] = ()) -> Overrides:
    """A mapping of dotted keys to values."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}={given}: give keys with values, as in {{trainer.steps: 20}}")
    found = {str(key): value for key, value in given.items() if key not in besides}
    for key in found:
        if key in OURS:
            raise ValueError(f"{where}.{key}: the study sets it; leave it out")
    return found


def _entries(given: Any, where: str) -> dict[str, Overrides]:
    """A list of names, or names with a mapping each."""
    named = dict.fromkeys(given) if isinstance(given, list) else given
    if not isinstance(named, Mapping) or not named:
        raise ValueError(f"{where}={given}: give a list of names, or names with overrides")
    entries = {}
    for name, entry in named.items():
        if entry is not None and not isinstance(entry, Mapping):
            raise ValueError(f"{where}.{name}={entry}: give keys with values")
        entries[_checked_name(str(name), where)] = dict(entry or {})
    return entries


def _checked_name(name: str, where: str) -> str:
    if not NAME.fullmatch(name):
        raise ValueError(f"{where}: {name!r} names files; use letters, digits and _ . , = + -")
    return name


def _seeds(given: Any, where: str) -> list[int]:
    """0 to N - 1 of a number N, or the numbers of a list."""
    numbers = list(range(given)) if type(given) is int else given
    sound = isinstance(numbers, list) and numbers and len(set(map(str, numbers))) == len(numbers)
    if not sound or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{where}={given}: give how many, or a list of different whole numbers")
    return numbers


def _words(settings: Overrides) -> tuple[str, ...]:
    """Overrides as a command line."""
    words = []
    for key, value in settings.items():
        if key == "file":
            words.append(str(value))
        elif key == "experiment":
            words.append(f"+experiment={value}")
        else:
            words.append(f"{key}={_word(value)}")
    return tuple(sorted(words, key=lambda word: "=" in word and not word.startswith("+")))


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_word(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_word, value)) + "]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return hydra_value(value) if isinstance(value, str) and value else repr(value)


def _known(values: Mapping[str, Any], keys: tuple[str, ...], prefix: str) -> None:
    for key in values:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"use some of {', '.join(keys)}"
            raise ValueError(f"{prefix}{key}: unknown key; {remedy}")


def _load(path: Path) -> dict[str, Any]:
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError:
        raise ValueError(f"no such file under {Path.cwd()}") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark is not None else ""
        problem = error.problem if isinstance(error, MarkedYAMLError) else "unreadable"
        raise ValueError(f"{place}not YAML ({problem}); mend it") from None
    except (OSError, UnicodeDecodeError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot be read ({reason}); write key: value lines") from None
    if not isinstance(values, dict):
        raise ValueError("not keys with values; write key: value lines")
    return {str(key): value for key, value in values.items()}
