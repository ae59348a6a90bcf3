"""What learner and engines agree on when new weights are handed over, whatever the transport.

Every rank of the learner calls its publisher in lockstep; rank 0 drives the engines through
`EngineHandles`, the others only take part in the learner's gathers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # actors that hold no tensors import this too
    from torch import Tensor

Buckets = Callable[[int], Iterator[dict[str, "Tensor"]]]
"""The learner's `weight_buckets`: full tensors under Hugging Face names, at most so many bytes at
a time; a collective, so every rank iterates it to its end (all but rank 0 get empty dicts)."""


class WeightSyncError(RuntimeError):
    """Weights did not arrive as sent, or are not this model's. The engine keeps its old ones."""


@dataclass(frozen=True, slots=True)
class WireTensor:
    """A tensor as bytes, so that it passes an object store without a copy, bfloat16 included."""

    name: str
    dtype: str
    """Torch's name, such as `bfloat16`."""
    shape: tuple[int, ...]
    data: NDArray[np.uint8]
    digest: str
    """XXH3 of name, dtype, shape and data: it finds damage at memory speed, no forgery."""


Part = Sequence[WireTensor] | dict[str, Any]
"""A part of the weights: a bucket in host memory, or vLLM's update info (GPU)."""


class EngineHandles(Protocol):
    """All engines, as the learner reaches them: `Engine`'s methods of the same names. Each waits
    for all engines and raises what any of them raised."""

    def join_transfer(self, init_infos: Sequence[dict[str, Any]]) -> None:
        """Engine i gets init_infos[i] (GPU)."""
        ...

    def begin_update(self) -> None: ...

    def receive(self, part: Part) -> Callable[[], None]:
        """Every engine begins to take `part`, which may change on return; what is returned waits
        for the engines."""
        ...

    def finish_update(self, version: int) -> None: ...

    def abandon_update(self) -> None: ...


class Publisher(Protocol):
    """Hands the learner's weights to every engine."""

    def publish(self, version: int) -> None:
        """Every engine serves `version` on return. Called on all learner ranks in lockstep."""
        ...
