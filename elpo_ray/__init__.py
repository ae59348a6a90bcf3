"""elpo_ray: Error-Localized Policy Optimization for tool-integrated reasoning agents.

In Python, as `import elpo_ray as elpo`: `elpo.train("shop.yaml", tools=[search], reward=reward)`
trains and returns the run. Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elpo_ray.training.api import Run, train
    from elpo_ray.types import InfrastructureError, Problem, Score, Step

code_interpreter = "code_interpreter"
"""The code interpreter, as an entry of `tools`."""

__all__ = ["InfrastructureError", "Problem", "Run", "Score", "Step", "code_interpreter", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("Run", "train"):
        from elpo_ray.training import api  # Ray takes a second to import

        return getattr(api, name)
    from elpo_ray import types

    return getattr(types, name)
