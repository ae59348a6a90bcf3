"""A growth rule: half of the budget on whole trajectories, then each once more from a step."""

import asyncio

from elpo_ray.config.growth import GrowthConfig
from elpo_ray.interfaces import Rollout


async def grow(rollout: Rollout, config: GrowthConfig, *, step: int = 1) -> None:
    """Complete every trajectory again from its `step`-th step on."""
    half = rollout.remaining // 2
    leaves = await asyncio.gather(*(rollout.complete() for _ in range(half)))
    paths = [path for path in map(rollout.tree.path, leaves) if len(path) > step]
    await asyncio.gather(*(rollout.complete(path[step - 1], anchor=step) for path in paths))
    await asyncio.gather(*(rollout.complete() for _ in range(rollout.remaining)))
