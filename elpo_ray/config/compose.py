"""What the commands over Hydra share: compose, check, run, and end with the right code."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, NoReturn, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from elpo_ray.config import CONF_DIR, Config
from elpo_ray.config.arguments import (
    EXIT_CONFIGURATION,
    EXIT_FAULT,
    EXIT_INTERRUPTED,
    VERSION,
    into_a_pipe,
    version,
)
from elpo_ray.config.errors import explain
from elpo_ray.config.files import RunFile, Values, file_word, is_file
from elpo_ray.config.measure import MeasureConfig
from elpo_ray.config.modules import check_modules
from elpo_ray.config.rules import require
from elpo_ray.config.task import TaskConfig
from elpo_ray.config.values import expanded, hydra_override, typed
from elpo_ray.config.words import check_named, check_words, switches_first
from elpo_ray.types import Fault

T = TypeVar("T")

FILE = "run_file"
"""The group under which Hydra finds a run's file."""
MEASURE = "measure"
"""The folder of the measuring commands' own roots: no group."""
MULTIRUN = ("-m", "--multirun")


class Command(Generic[T]):
    """`main()` of a module: composes `folder`/`config_name`.yaml, runs `run` on the checked result
    and ends the process with the exit code that it returns. The YAML's first default is the schema,
    under the name `config_name`_schema, or `config`, which has that of a run."""

    def __init__(
        self,
        schema: type[T],
        config_name: str,
        run: Callable[[T], int],
        folder: Path = CONF_DIR,
        groups: Sequence[str] = (),
        *,
        trains: bool = False,
    ) -> None:
        """`groups` of `CONF_DIR` that can be chosen too where `folder` is another: a command whose
        keys would clash with the other groups has a folder of its own. One that `trains` refuses
        an empty command line, since a run takes hours."""
        self._schema, self._config_name, self._run = schema, config_name, run
        self._folder = folder
        self._groups = [*_groups(folder), *groups]
        self._trains = trains
        store = ConfigStore.instance()
        store.store(name=f"{'config' if schema is Config else config_name}_schema", node=schema)
        for group in groups:
            for file in (CONF_DIR / group).glob("*.yaml"):
                store.store(group=group, name=file.stem, node=OmegaConf.load(file))

    def __call__(self) -> NoReturn:
        with into_a_pipe():
            if VERSION in sys.argv[1:]:
                print(version())
                sys.exit(0)
            self._answer()

    def _answer(self) -> NoReturn:
        os.environ["HYDRA_FULL_ERROR"] = "1"  # raise to `explain` instead of printing a traceback
        try:
            if self._trains:
                check_named(sys.argv[1:])
            check_words(sys.argv[1:], self._schema, self._groups)
            sys.argv[1:] = _with_file(sys.argv[1:], self._schema)
            composed = _compose(self._folder, self._config_name, self._schema)
            code = max((self._run(typed(self._schema, one)) for one in composed), default=0)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            message = explain(error, self._schema)
            if message is None:
                raise
            _end(message, EXIT_CONFIGURATION)
        except Fault as error:
            _end(str(error), EXIT_FAULT)
        except KeyboardInterrupt as stop:  # it says what is kept, if anything is
            _end(str(stop) or "interrupted before there was anything to keep", EXIT_INTERRUPTED)
        sys.exit(code)


def _groups(folder: Path) -> list[str]:
    """The groups whose options lie under a folder of configurations."""
    return [path.name for path in folder.iterdir() if path.is_dir() and path.name != MEASURE]


def _compose(folder: Path, config_name: str, schema: type) -> list[DictConfig]:
    """What Hydra makes of the command line: one configuration, several under --multirun, none
    after --help. Jobs run later, outside Hydra, which would report their errors in its own way."""
    composed: list[DictConfig] = []
    words = [hydra_override(word, schema) for word in switches_first(sys.argv[1:])]
    with tempfile.TemporaryDirectory() as scratch:  # for what Hydra writes of a --multirun
        several = any(word in MULTIRUN for word in words)
        sys.argv[1:] = [*words, f"hydra.sweep.dir={scratch}"] if several else words
        hydra.main(version_base="1.3", config_path=str(folder), config_name=config_name)(
            composed.append
        )()
    return composed


def _with_file(words: Sequence[str], schema: type) -> list[str]:
    """The words of a command line with the one that names a run's file, if any, replaced by the
    group that Hydra finds it under."""
    word = file_word(words)
    if word is None:
        return list(words)
    file = RunFile.read(Path(word))
    values = (
        file.measured(schema, word, words) if issubclass(schema, MeasureConfig) else file.run(words)
    )
    return [_offer(values) if each == word else each for each in words]


def _offer(values: Values) -> str:
    """Put the values of a run's file where Hydra finds them; the word that asks for them."""
    node = OmegaConf.create(values)
    ConfigStore.instance().store(group=FILE, name="given", package="_global_", node=node)
    return f"+{FILE}=given"


def composed(overrides: Sequence[str], file: RunFile | None = None) -> Config:
    """The checked configuration of a run with these overrides, as `elpo_ray.main` would have it; a
    run's file is one of them or given read. Raises ValueError, in one line, as `Command` prints
    it."""
    ConfigStore.instance().store(name="config_schema", node=Config)
    check_words(overrides, Config, _groups(CONF_DIR))
    words = [hydra_override(word, Config) for word in _with_file(overrides, Config)]
    if file is not None:
        words = [_offer(file.run(words)), *words]
    try:
        with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            return typed(Config, hydra.compose("config", words))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        message = explain(error)
        if message is None:
            raise
        raise ValueError(message) from None


def measured_tasks(config: MeasureConfig) -> dict[str, TaskConfig]:
    """The tasks that a command measures on, by name: each one's YAML, or the task of a run's file
    by that file's name, `data_dir` and `task` over it. ValueError if there is no such task or
    key."""
    folder = config.data_dir
    require(
        folder is None or Path(folder).is_dir(),
        "data_dir",
        folder,
        f"no such folder under {Path.cwd()}; name the one with the data sets (docs/tasks.md)",
    )
    tasks = {}
    ConfigStore.instance().store(name="config_schema", node=Config)
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        for name in config.tasks:
            options = sorted(path.stem for path in (CONF_DIR / "task").glob("*.yaml"))
            if is_file(name):
                word, name = _offer(RunFile.read(Path(name)).task()), Path(name).stem
            else:
                remedy = f"{name}: use some of {', '.join(options)}, or a run's file"
                require(name in options, "tasks", config.tasks, remedy)
                word = f"task={name}"
            require(name not in tasks, "tasks", config.tasks, f"name only one task {name}")
            # Groups that a measuring command has put into the store itself are left out.
            composed = hydra.compose("config", [word, "~cluster", "~algorithm"])
            if config.data_dir is not None:
                composed.task.data_dir = config.data_dir
            try:
                own = OmegaConf.create(expanded({"task": config.task}))
                composed.task = OmegaConf.merge(composed.task, own.task)
            except OmegaConfBaseException as error:
                raise ValueError(explain(error)) from None
            tasks[name] = typed(TaskConfig, composed.task)
            check_modules(tasks[name].modules)
    return tasks


def _end(message: str, code: int) -> NoReturn:
    print(f"elpo_ray: {message}", file=sys.stderr)
    sys.exit(code)
