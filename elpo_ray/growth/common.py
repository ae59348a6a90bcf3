"""Which steps two trajectories have in common: what one of them shows about the other's prefixes.

Tools are deterministic given the prefix, so a trajectory with the same tokens up to step m is a
completion of the other's first m steps, although it was sampled from the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from elpo_ray.types import Step


def common_steps(
    steps: Sequence[Step], others: Sequence[Step], alike: Callable[[Step, Step], bool]
) -> int:
    """How many tool steps two trajectories have in common, counted from their first one."""
    count = 0
    for step, other in zip(steps, others, strict=False):
        if step.result is None or other.result is None or not alike(step, other):
            break
        count += 1
    return count


def same_tokens(step: Step, other: Step) -> bool:
    """Whether two steps are the same to the policy, action and observation."""
    return (
        step.turn.token_ids == other.turn.token_ids
        and step.observation_ids == other.observation_ids
    )


def same_result(step: Step, other: Step) -> bool:
    """Whether two calls gave the same result, whatever the turns said."""
    assert step.result is not None and other.result is not None, "a tool step has a result"
    return (step.result.kind, step.result.text) == (other.result.kind, other.result.text)
