"""What actors need to load the user's own objects: modules, and objects given from Python.

On a cluster that the run joins, another node may not have the folders of `task.modules`. Ray brings
it a copy of them, without large files: data is read by the driver, or lies where all nodes see it.
"""

from __future__ import annotations

import pickle
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle
from ray.actor import ActorHandle
from ray.util import get_node_ip_address
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from elpo_ray.config import Config, dotted
from elpo_ray.config.modules import COPIES, use_modules
from elpo_ray.config.values import plain
from elpo_ray.tools.caller import RunningTools

LARGEST = 1 << 20
"""Bytes of a file that is still copied."""
MOST = 64 << 20
"""Bytes that are copied in all."""
LOOK_S = 20.0
"""Seconds to look on another node for what a lost worker was running."""
LEFT_OUT = {"__pycache__", "node_modules", "runs", "site-packages", "wandb"}
"""Folders that hold no modules of the user's, beside hidden ones and virtual environments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UserCode:
    """What an actor that runs code of the user's is given for it."""

    objects: bytes | None = None
    """Those that were given from Python, if any (`packed`)."""
    variables: dict[str, str] = field(default_factory=dict)
    """The environment variables of `task.env`."""
    tool_actors: dict[str, list[ActorHandle[Any]]] = field(default_factory=dict)
    """The actors that each entry of `task.tools` lives in."""

    def install(self, folders: Sequence[str]) -> None:
        """Make modules and objects loadable in this process."""
        install(folders, self.objects)


@contextmanager
def copies(folders: Sequence[str]) -> Iterator[list[str]]:
    """Copies of these folders for Ray's `py_modules`, removed at the end. Raises ValueError for a
    folder that is too large to be the home of some modules."""
    if not folders:
        yield []
        return
    with tempfile.TemporaryDirectory(prefix="elpo-modules-") as scratch:
        room = MOST
        for number, folder in enumerate(folders):
            target = Path(scratch, COPIES, str(number))
            target.mkdir(parents=True)
            for file in _files(Path(folder)):
                room -= file.stat().st_size
                if room < 0:
                    raise ValueError(
                        f"task.modules={folder!r}: it holds more than {MOST >> 20} MiB in files "
                        f"below {LARGEST >> 20} MiB, which go to every node; put the modules and "
                        "the run's file into a folder of their own"
                    )
                to = target / file.relative_to(folder)
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, to)
        yield [str(Path(scratch, COPIES))]


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or (path.is_symlink() and path.is_dir()):
            continue
        if path.is_dir():
            if path.name not in LEFT_OUT and not (path / "pyvenv.cfg").exists():
                yield from _files(path)
        elif path.is_file() and path.stat().st_size <= LARGEST:
            yield path


def packed(config: Config) -> bytes | None:
    """The objects given from Python that a configuration names, if any; those without a module of
    their own by value. Raises ValueError for one that cannot be sent."""
    parts = {}
    for name in sorted(set(_named(plain(config)))):
        value = dotted.load_object("object", f"{dotted.PYTHON}:{name}")
        try:
            parts[name] = cloudpickle.dumps(value)
        except Exception as error:  # whatever the user's own `__reduce__` raises
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{dotted.PYTHON}:{name}: it cannot be sent to another process "
                f"({type(error).__name__}: {reason}); make what it holds inside of it, when it is "
                "called"
            ) from error
    return pickle.dumps(parts) if parts else None


def _named(value: Any) -> Iterator[str]:
    """The names of objects in the values of a configuration."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _named(each)
    elif isinstance(value, str) and value.startswith(f"{dotted.PYTHON}:"):
        yield value.removeprefix(f"{dotted.PYTHON}:")


def install(folders: Sequence[str], objects: bytes | None) -> None:
    """Make modules and objects loadable in this process. Raises ValueError for an object that needs
    a module that is not here."""
    use_modules(folders)
    for name, part in pickle.loads(objects).items() if objects else ():
        try:
            dotted.adopt({name: cloudpickle.loads(part)})
        except Exception as error:  # whatever an import of the user's raises
            raise ValueError(
                f"{dotted.PYTHON}:{name}: it cannot be loaded ({type(error).__name__}: {error}); "
                "put the modules that it needs beside the run's file, or name their folder in "
                "task.modules"
            ) from None


@contextmanager
def on_worker(what: str = "a rollout worker") -> Iterator[None]:
    """A ValueError in the body says that it is about this node: the driver had none."""
    try:
        yield
    except ValueError as error:
        where = f"in {what} on {get_node_ip_address()}"
        raise ValueError(f"{error} ({where})") from None


def tools_that_ran(home: tuple[str, str] | None) -> str:
    """The end of a message about a lost worker: which tools of the user's it was running. Empty if
    none was, or if that cannot be known. `home`: its node, and the file that names them."""
    if home is None:
        return ""
    node, path = home
    read: Any = ray.remote(RunningTools.read)
    where = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    try:
        asked = read.options(num_cpus=0, scheduling_strategy=where).remote(Path(path))
        names = ray.get(asked, timeout=LOOK_S)
    except (ray.exceptions.RayError, TimeoutError):
        return ""  # the node is gone too
    return f"; it was running: {names}" if names else ""
