"""Independent trajectories from the prompt, as in GRPO; how several are sampled at once."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

from elpo_ray.config.growth import GrowthConfig
from elpo_ray.interfaces import Rollout


async def grow(rollout: Rollout, config: GrowthConfig) -> None:
    """Sample the whole budget from the prompt, all at once."""
    await sample(rollout, rollout.remaining)


async def sample(
    rollout: Rollout, count: int, at: int = 0, *, anchor: int | None = None
) -> list[int]:
    """`count` completions below node `at` at once; their leaf ids in the order asked for."""
    return await together(*(rollout.complete(at, anchor=anchor) for _ in range(count)))


async def sample_each(rollout: Rollout, starts: Sequence[tuple[int, int | None]]) -> list[int]:
    """One completion from each (node, anchor) at once; their leaf ids in the order asked for."""
    return await together(*(rollout.complete(at, anchor=anchor) for at, anchor in starts))


async def together(*parts: Coroutine[Any, Any, Any]) -> list[Any]:
    """The parts' results, all of them run at once; each begins in its turn.

    If one raises, the others are cancelled and have ended when this returns: none of them goes
    on spending the budget of a tree that was given up.
    """
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
