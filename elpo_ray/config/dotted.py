"""Objects of the user's own: named in a configuration as `module:attribute`, or given from Python.

Every key that takes such a path loads it here, so that a mistake reads the same everywhere: one
line with the key, the path and the remedy. An object without a module of its own, such as a
function of a notebook, is registered; its path, `python:NAME`, holds in every process whose table
has it (`registered`, `adopt`).
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

PYTHON = "python"
"""The module part of the paths of registered objects."""

_objects: dict[str, Any] = {}


def is_path(name: str) -> bool:
    """Whether a name has the form of a dotted path, rather than that of a built-in name."""
    return ":" in name


def load_object(key: str, path: str) -> Any:
    """The object that `module:attribute` names; `key` is where the path stands, as `task.tools[0]`.

    Raises ValueError, `key='path': remedy`, for a path of another form, a module that cannot be
    imported, and a module without the attribute.
    """
    where = f"{key}={path!r}"
    module_name, _, attribute = path.partition(":")
    if not (_is_dotted_name(module_name) and _is_dotted_name(attribute)):
        raise ValueError(f"{where}: write it as module:attribute, as in shop:search")
    if module_name.endswith(".py"):
        name = f"{module_name.removesuffix('.py')}:{attribute}"
        raise ValueError(f"{where}: a module is named without .py; write {name}")
    if module_name == PYTHON:
        if attribute not in _objects:
            raise ValueError(
                f"{where}: no object was given under this name; start the run from Python again "
                "with the same objects"
            )
        return _objects[attribute]
    found = _import(where, module_name)
    for name in attribute.split("."):
        if not hasattr(found, name):
            owner = getattr(found, "__name__", module_name)
            raise ValueError(f"{where}: {owner} has no {name}{_nearest(name, vars(found))}")
        found = getattr(found, name)
    return found


def register(name: str, obj: Any) -> str:
    """Keep an object under `name` in this process and return the path that loads it. A name that
    another object has already gets a number."""
    unique, number = name, 1
    while unique in _objects and _objects[unique] is not obj:
        number += 1
        unique = f"{name}_{number}"
    _objects[unique] = obj
    return f"{PYTHON}:{unique}"


def registered() -> dict[str, Any]:
    """All registered objects by name: what other processes have to `adopt`."""
    return dict(_objects)


def adopt(objects: Mapping[str, Any]) -> None:
    """Make the objects that another process registered loadable in this one."""
    _objects.update(objects)


def check_call(
    where: str, function: Callable[..., Any], given: Iterable[str], options: Mapping[str, Any]
) -> None:
    """Raise ValueError, in one line that starts with `where` (key and path), unless `function` can
    be called with the positional arguments `given` (their names) and `options` as keywords."""
    if not callable(function):
        raise ValueError(f"{where}: it is {type(function).__name__}, not something to call")
    names = list(given)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # a function of a C extension, which does not say what it takes
    keywords = [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ][len(names) if _takes(signature, len(names)) else 0 :]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    for option in options:
        if option not in keywords and not takes_any:
            known = f"it takes {', '.join(keywords)}" if keywords else "it takes no options"
            raise ValueError(f"{where}: no option {option}; {known}")
    try:
        signature.bind(*names, **options)
    except TypeError as error:
        takes = ", ".join([*names, *(f"{option}=…" for option in options)])
        raise ValueError(f"{where}: it must take ({takes}): {error}") from None


def _takes(signature: inspect.Signature, count: int) -> bool:
    """Whether the first `count` parameters may be given by position."""
    try:
        signature.bind_partial(*[None] * count)
    except TypeError:
        return False
    return True


def _is_dotted_name(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))


def _import(where: str, module_name: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _failed(where, module_name, error) from error
        raise ValueError(
            f"{where}: there is no module {error.name}; put its file beside the run's file, into "
            "the working directory, or on PYTHONPATH"
        ) from None
    except Exception as error:  # the user's module may fail in any way while it is imported
        raise _failed(where, module_name, error) from error
    except SystemExit as error:
        raise _failed(where, module_name, error) from error


def _failed(where: str, module_name: str, error: BaseException) -> ValueError:
    """A module that raised while it was imported: the last line of it that was running, if any."""
    line, frame = "", error.__traceback__
    path = getattr(sys.modules.get(module_name), "__file__", None)
    while frame is not None:
        file = frame.tb_frame.f_code.co_filename
        if file == path or file.endswith(f"{module_name.replace('.', '/')}.py"):
            line = f", line {frame.tb_lineno}"
        frame = frame.tb_next
    reason = " ".join(str(error).split())[:200]
    return ValueError(
        f"{where}: {module_name} cannot be imported ({type(error).__name__}: {reason}{line}); "
        "mend the module, or install what it needs"
    )


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, [n for n in names if not n.startswith("_")], n=3)
    return f"; did you mean {' or '.join(near)}?" if near else "; name something that it defines"
