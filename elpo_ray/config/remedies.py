"""What would make a run fit its GPUs: changes that are tried by the arithmetic, not guessed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

from elpo_ray.config import Config
from elpo_ray.config.memory import RESERVE, Shortage, fit, rank_peak
from elpo_ray.config.shapes import ModelShape

GIB = 1 << 30
NAMED = 3
"""Most ways that are named."""
ADAPTERS = 32
"""Rank of the adapters that are tried."""
UTILIZATION = 0.9
"""Share of a GPU that is tried for an engine."""

Changes = Mapping[str, Any]
"""Values by their dotted keys."""


def remedy(missing: Shortage, config: Config, shape: ModelShape, gpu_bytes: float) -> str:
    """What makes this part fit on GPUs with so many bytes, for a person to read."""
    if missing is Shortage.beside:
        return "lower engine.gpu_memory_utilization"
    if missing is Shortage.rank:
        return _of_rank(config, shape, gpu_bytes)
    told = []
    if _cache_fits(config, shape, gpu_bytes, {"engine.gpu_memory_utilization": UTILIZATION}):
        told.append(f"raise engine.gpu_memory_utilization: it fits with {UTILIZATION}")
    for tensor in (2, 4, 8):
        if _cache_fits(config, shape, gpu_bytes, {"engine.tensor_parallel_size": tensor}):
            told.append(f"use engine.tensor_parallel_size={tensor}")
            break
    return ", or ".join(told) or "take larger GPUs, a smaller model or a smaller model.max_context"


def _cache_fits(config: Config, shape: ModelShape, gpu_bytes: float, changes: Changes) -> bool:
    changed = _changed(config, changes)
    return changed is not None and not (
        {Shortage.cache, Shortage.beside} & {*fit(changed, shape, gpu_bytes).missing}
    )


def _of_rank(config: Config, shape: ModelShape, gpu_bytes: float) -> str:
    """The ways with the fewest changes after which a learner rank fits, and what it takes then."""
    room = gpu_bytes - (RESERVE if config.cluster.colocated else 0)
    sizes = {way: size + RESERVE for way, size in _ways(config, shape)}
    fitting = [way for way, size in sizes.items() if size <= room]
    fitting.sort(key=lambda way: len(way.split()))
    if fitting:
        fewest = len(fitting[0].split())
        ways = [way for way in fitting if len(way.split()) == fewest][:NAMED]
        told = (f"with {way} ({sizes[way] / GIB:.1f} GiB)" for way in ways)
        return f"it fits {', or '.join(told)}"
    if not sizes:
        return "take larger GPUs or a smaller model"
    least = min(sizes, key=lambda way: sizes[way])
    return (
        f"take larger GPUs or a smaller model; the least, with {least}, is "
        f"{sizes[least] / GIB:.1f} GiB"
    )


def _ways(config: Config, shape: ModelShape) -> Iterator[tuple[str, float]]:
    """Combinations of changes that a run may make, each with the bytes of a rank's tensors."""
    for chosen in product(*_axes(config)):
        changes = {key: value for part in chosen for key, value in part.items()}
        changed = _changed(config, changes) if changes else None
        if changed is not None:
            yield _written(changes), rank_peak(changed, shape)


def _axes(config: Config) -> list[list[Changes]]:
    """Changes of which at most one of each list is made; what costs least stands last, since the
    last list of a product changes first."""
    learner, ranks = config.learner, config.cluster.learner_ranks
    least = max(config.model.max_context, config.cold_start.max_tokens or 0)
    states: list[Changes] = [{"learner.zero_stage": n} for n in range(4) if n != learner.zero_stage]
    third: Changes = {} if learner.zero_stage == 3 else {"learner.zero_stage": 3}
    states += [{"cluster.learner_ranks": ranks * n, **third} for n in (2, 4, 8)]
    axes: list[list[Changes]] = [
        [{"learner.offload_optimizer": True}] * (not learner.offload_optimizer),
        [{"learner.lora.rank": ADAPTERS}] * (learner.adapters is None),
        states,
        [{"learner.max_tokens_per_pack": least}] * (least < learner.max_tokens_per_pack),
        [{"learner.gradient_checkpointing": True}] * (not config.gradient_checkpointing),
    ]
    return [[{}, *axis] for axis in axes]


def _changed(config: Config, changes: Changes) -> Config | None:
    """The run with other values; None where they do not go together."""
    try:
        for key, value in changes.items():
            config = _with(config, key, value)
    except ValueError:
        return None
    return config


def _with(section: Any, key: str, value: Any) -> Any:
    name, _, rest = key.partition(".")
    return replace(section, **{name: _with(getattr(section, name), rest, value) if rest else value})


def _written(changes: Changes) -> str:
    """The changes as words of a command line."""
    return " ".join(f"{k}={str(v).lower() if v is True else v}" for k, v in changes.items())
