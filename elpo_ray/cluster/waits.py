"""Waiting for actors: a deadline on every remote call, and a name for every kind of loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from elpo_ray.types import Fault, InfrastructureError


class LearnerLost(Fault):
    """A rank of the learner died or hangs: its weights since the newest checkpoint are gone."""


class WorkerLost(Exception):
    """A rollout worker must be replaced; the message says what happened and in which phase."""


def wait_for(refs: Any, timeout_s: float, what: str) -> Any:
    """`ray.get` with a deadline; the actor's own exception comes out, not Ray's wrapping of it."""
    try:
        return ray.get(refs, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError:
        raise TimeoutError(f"{what}: no answer within {timeout_s:.0f} s") from None
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if error.cause is not None else error) from error


@contextmanager
def learner_losses(phase: str) -> Iterator[None]:
    """Raises LearnerLost if a rank dies in the body or does not answer."""
    try:
        yield
    except ray.exceptions.RayActorError as error:
        raise LearnerLost(f"a learner rank died in {phase}: {first_line(error)}") from error
    except TimeoutError as error:
        raise LearnerLost(str(error)) from error


@contextmanager
def worker_losses(what: str, timeout_s: float) -> Iterator[None]:
    """Raises WorkerLost if the worker that the body waits for died, hangs, or lost its engine."""
    try:
        yield
    except TimeoutError:
        raise WorkerLost(f"{what}: no answer within {timeout_s:.0f} s") from None
    except ray.exceptions.RayActorError as error:
        raise WorkerLost(first_line(error)) from error
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InfrastructureError):
            raise WorkerLost(f"{what.split()[0]}: {error.cause}") from error
        raise (error.cause if error.cause is not None else error) from error


def first_line(error: BaseException) -> str:
    """What went wrong, without Ray's page of advice."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
