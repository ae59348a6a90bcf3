"""Classes as tools: an object for each trajectory, whose public methods are tools and which is the
state that branches.

`reset(**columns)` begins a trajectory, `reward()` judges it, `fork()` copies it and `close()` gives
it up; each of them is optional. An object without `fork()` is copied by `copy.deepcopy`. Where that
fails, the source says so once, and calls are run again instead.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import logging
from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType
from typing import Any

from elpo_ray.config.task import Branching
from elpo_ray.tools.caller import Caller
from elpo_ray.tools.results import as_text
from elpo_ray.tools.schemas import parameters_of, schema_of
from elpo_ray.tools.sources import Schema
from elpo_ray.types import InfrastructureError, Problem, Score, ToolResult

RESERVED = ("reset", "reward", "fork", "close")
"""Public methods that are no tools."""
ROW = "row"
"""Key of `Problem.extra`: the problem's row of data, whose columns `reset` gets by name."""
log = logging.getLogger(__name__)


class EnvironmentSource:
    """A class of the user's."""

    stateful = True

    def __init__(
        self, where: str, name: str, kind: type[Any], branching: Branching, caller: Caller
    ) -> None:
        """ValueError, which begins with `where`, if the class cannot be used."""
        self.name = name
        self.kind = kind
        self.caller = caller
        self._where = where
        names = [n for n in dir(kind) if not n.startswith("_") and n not in RESERVED]
        methods = {n: _bound(kind, n) for n in names if _is_method(kind, n)}
        if not methods:
            raise ValueError(
                f"{where}: class {kind.__name__} has no tool; its public methods are the tools, "
                f"but for {', '.join(RESERVED)}"
            )
        self.schemas: Sequence[Schema] = [schema_of(where, methods[n]) for n in methods]
        self.rewards = hasattr(kind, "reward")
        self.copier = self._copier(branching)
        """How a copy is made; None: it cannot be."""
        if not _can_be_made(kind):
            raise ValueError(
                f"{where}: {kind.__name__}() asks for arguments; give them defaults, and read what "
                "depends on the problem in reset"
            )
        self._columns = _parameters(where, kind, "reset")
        for name in ("reward", "fork", "close"):
            self._check_takes_nothing(name)

    def check(self, problem: Problem) -> None:
        """ValueError if the problem's row lacks a column that `reset` wants."""
        row = problem.extra.get(ROW, {})
        for column in self._columns or ():
            optional = (column.VAR_KEYWORD, column.VAR_POSITIONAL)
            wanted = column.default is column.empty and column.kind not in optional
            if wanted and column.name not in row:
                raise ValueError(
                    f"{self._where}: reset wants {column.name}, which problem {problem.id} does "
                    f"not have (it has {', '.join(map(str, row)) or 'no columns'}); add the column "
                    "to the data, or give the parameter a default"
                )

    async def open(self, problem: Problem) -> EnvironmentInstance:
        """Make an object and reset it. Whatever goes wrong, but an InfrastructureError, is a
        mistake in the user's code: ValueError."""
        self.check(problem)
        name = f"{self.kind.__name__}.reset"
        try:
            environment = await self.caller.value(name, self.kind)
            said = None
            if self._columns is not None:
                arguments = self._arguments(problem)
                said = await self.caller.value(name, partial(environment.reset, **arguments))
        except InfrastructureError:
            raise
        except TimeoutError as error:
            raise InfrastructureError(f"{self.name}: {error}") from error
        except Exception as error:  # the user's code is a boundary
            raise ValueError(
                f"{self._where}: reset raised {type(error).__name__}: {error} on problem "
                f"{problem.id}; mend it, or raise InfrastructureError for what another try may cure"
            ) from error
        return EnvironmentInstance(self, environment, None if said is None else as_text(said))

    async def close(self) -> None: ...

    def cannot_copy(self, why: str) -> None:
        """Have calls run again from now on."""
        if self.copier is not None:
            self.copier = None
            self.caller.note(
                f"{self._where}: its state cannot be copied ({why}); where trajectories branch, "
                "its calls are run again and their results compared; give it a fork() to avoid that"
            )

    def _check_takes_nothing(self, name: str) -> None:
        for parameter in _parameters(self._where, self.kind, name) or ():
            optional = (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            if parameter.default is parameter.empty and parameter.kind not in optional:
                raise ValueError(
                    f"{self._where}: {self.kind.__name__}.{name} asks for {parameter.name}, but is "
                    "called without arguments; read what it needs in reset, and keep it in self"
                )

    def _copier(self, branching: Branching) -> Callable[[Any], Any] | None:
        own = getattr(self.kind, "fork", None)
        match branching:
            case Branching.replay:
                return None
            case Branching.deepcopy:
                return copy.deepcopy
            case Branching.fork if own is None:
                raise ValueError(
                    f"{self._where}: task.branching='fork' but {self.kind.__name__} has no fork(); "
                    "add one, or use auto"
                )
        return own if own is not None else copy.deepcopy

    def _arguments(self, problem: Problem) -> dict[str, Any]:
        """The columns for `reset`, copied: the object may keep and change them."""
        row, columns = problem.extra.get(ROW, {}), self._columns or []
        if not any(column.kind is column.VAR_KEYWORD for column in columns):
            row = {column.name: row[column.name] for column in columns if column.name in row}
        return copy.deepcopy(row)


class EnvironmentInstance:
    """One trajectory's object."""

    def __init__(self, source: EnvironmentSource, environment: Any, opening: str | None) -> None:
        self._source = source
        self._environment = environment
        self._opening = opening
        self._copying = asyncio.Lock()
        self._closed = False

    @property
    def opening(self) -> str | None:
        return self._opening

    async def call(self, name: str, arguments: dict[str, Any]) -> ToolResult:
        method = getattr(self._environment, name)
        return await self._source.caller.call(name, method, copy.deepcopy(arguments))

    async def fork(self) -> EnvironmentInstance | None:
        source = self._source
        async with self._copying:
            if source.copier is None:
                return None
            name = f"{source.kind.__name__}.fork"
            try:
                made = await source.caller.value(name, partial(source.copier, self._environment))
            except InfrastructureError:
                raise
            except Exception as error:  # the user's code is a boundary
                source.cannot_copy(f"{type(error).__name__}: {error}")
                return None
        if made is None or made is self._environment:
            source.cannot_copy("fork() returned no other object")
            return None
        return EnvironmentInstance(source, made, self._opening)

    async def reward(self) -> float | bool | Score | None:
        name = f"{self._source.kind.__name__}.reward"
        given: float | bool | Score | None
        given = await self._source.caller.value(name, self._environment.reward)
        return given

    async def close(self) -> None:
        """Call the object's own `close()`, once. What it raises is only logged."""
        if self._closed or not hasattr(self._environment, "close"):
            return
        self._closed = True
        name = f"{self._source.kind.__name__}.close"
        try:
            await self._source.caller.value(name, self._environment.close)
        except Exception as error:  # the user's code is a boundary, and the object is done with
            log.warning("%s raised %s: %s", name, type(error).__name__, error)


def _is_method(kind: type[Any], name: str) -> bool:
    """Whether it is a method of any kind; a property, also a cached one, is none, and neither is a
    built-in function, which gets no `self`."""
    static = inspect.getattr_static(kind, name)
    if inspect.isbuiltin(static):
        return False
    wrapped = isinstance(static, staticmethod | classmethod)
    return inspect.isroutine(static) and (wrapped or callable(static))


def _bound(kind: type[Any], name: str) -> Callable[..., Any]:
    """A method without an object of the class, as the schema needs it: without `self`."""
    static = inspect.getattr_static(kind, name)
    if isinstance(static, staticmethod | classmethod):
        bound: Callable[..., Any] = getattr(kind, name)
        return bound
    return MethodType(static, object())


def _can_be_made(kind: type[Any]) -> bool:
    try:
        inspect.signature(kind).bind()
    except TypeError:
        return False
    except ValueError:  # a class of a C extension does not say what it takes
        return True
    return True


def _parameters(where: str, kind: type[Any], method: str) -> list[inspect.Parameter] | None:
    """What a method takes beside `self`; None if the class has no such method. ValueError, which
    begins with `where`, for something else under this name, or what cannot be called by name."""
    if not hasattr(kind, method):
        return None
    start = f"{where}: {kind.__name__}.{method}"
    if not _is_method(kind, method):
        given = type(inspect.getattr_static(kind, method)).__name__
        raise ValueError(f"{start} is {given}; write a method, def {method}(self), or rename it")
    taken = parameters_of(start, _bound(kind, method))
    for parameter in taken:
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise ValueError(f"{start}: {parameter.name} cannot be given by name; remove the /")
    return taken
