"""Folders of the user's modules (`task.modules`) in every process of a run.

A folder stands first on the path for imports, as that of a script does. On a node that does not
have it, a copy serves that Ray brought (`cluster.user_code`).
"""

from __future__ import annotations

import importlib
import importlib.machinery
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from elpo_ray.config.rules import require

COPIES = "elpo_ray_modules"
"""Name of the folder that Ray brings: a numbered copy of each of `task.modules`."""
OURS = frozenset({"elpo_ray", "sandbox", "launch"})
TAKEN = (sys.stdlib_module_names - {"test"}) | OURS | {
    "datasets", "deepspeed", "hydra", "numpy", "omegaconf", "openai", "peft", "ray", "rich",
    "scipy", "tokenizers", "torch", "transformers", "vllm", "wandb",
}  # fmt: skip
"""Modules that the run itself needs: one of the same name in a user's folder would hide them."""
_CHECKOUT = Path(__file__).resolve().parents[2]
_PLACES = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})


_used: list[str] = []
"""The folders that stand on the path because of a run."""


def use_modules(folders: Sequence[str]) -> None:
    """Make the modules of these folders importable here, those of the first one first. Modules of
    an earlier run's other folders are forgotten: another run may have some of the same name."""
    wanted = [found for number, folder in enumerate(folders) if (found := _here(number, folder))]
    for folder in [folder for folder in _used if folder not in wanted]:
        _forget(folder)
    for folder in reversed(wanted):
        if folder not in sys.path:
            sys.path.insert(0, folder)
            _used.append(folder)
    importlib.invalidate_caches()


def use_working_folder() -> None:
    """Make the modules of the working folder importable in this process, as `python -m` does: in
    front of all others, or behind them where one has the name of a module that a run needs. Nothing
    is done in another checkout of this package, whose parts would mix with ours."""
    try:
        folder = Path.cwd()
        names = set(_names(folder))
    except OSError:  # removed, or not to be read
        return
    if str(folder) in sys.path or (names & OURS and folder.resolve() != _CHECKOUT):
        return
    try:
        check_modules([str(folder)])
    except ValueError:
        sys.path.append(str(folder))
    else:
        sys.path.insert(0, str(folder))


def _forget(folder: str) -> None:
    _used.remove(folder)
    if folder in sys.path:
        sys.path.remove(folder)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name != "__main__" and file is not None and Path(file).is_relative_to(folder):
            del sys.modules[name]


def check_modules(folders: Sequence[str]) -> None:
    """Raise ValueError for a folder that is not there, or that hides a module of the run."""
    for folder in folders:
        path = Path(folder)
        require(path.is_dir(), "task.modules", folder, "no such folder; name one with modules")
        for name in _names(path):
            ours = name in OURS and path.resolve() == _CHECKOUT
            require(
                ours or not (name in TAKEN or _required(name)),
                "task.modules",
                folder,
                f"{name} there would hide the module {name} that the run needs; rename it",
            )


def _required(name: str) -> bool:
    """Whether a module of this name is installed that those in `TAKEN` need, such as yaml."""
    if all(importlib.machinery.PathFinder.find_spec(name, [place]) is None for place in _PLACES):
        return False
    owners = metadata.packages_distributions().get(name, [])
    return any(_canonical(owner) in _requirements() for owner in owners)


@lru_cache(maxsize=1)
def _requirements() -> frozenset[str]:
    """Names of the installed distributions that those in `TAKEN` need, directly or not."""
    owners = metadata.packages_distributions()
    waiting = [owner for name in sorted(TAKEN - OURS) for owner in owners.get(name, [])]
    found: set[str] = set()
    while waiting:
        name = _canonical(waiting.pop())
        if name in found:
            continue
        found.add(name)
        with suppress(metadata.PackageNotFoundError):  # needed on another platform only
            lines = metadata.requires(name) or []
            waiting += [re.split(r"[^\w.-]", line)[0] for line in lines if "extra ==" not in line]
    return frozenset(found)


def _canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _here(number: int, folder: str) -> str | None:
    """The folder if it is on this node, else the copy of it."""
    if Path(folder).is_dir():
        return folder
    copies = (Path(entry, COPIES, str(number)) for entry in sys.path)
    return next((str(copy) for copy in copies if copy.is_dir()), None)


def _names(folder: Path) -> Iterator[str]:
    """Modules and packages in a folder."""
    for path in sorted(folder.iterdir()):
        if path.suffix == ".py" or (path / "__init__.py").is_file():
            yield path.stem
