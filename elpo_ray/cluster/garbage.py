"""Python's collector of cyclic garbage, tuned to the processes of a run."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

THRESHOLDS = (50_000, 20, 100)
"""Python's own: (700, 10, 10)."""


@contextmanager
def importing() -> Iterator[None]:
    """Switch the collector off while a large framework is imported: it would walk all loaded
    modules again and again, which is a quarter of the time of these imports."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def freeze_gc() -> None:
    """Call once everything is loaded: the collector never looks again at what is there now, and
    seldom at what comes later.

    A tree is thousands of small objects without a cycle. Walking them again and again took a third
    of all that a rollout costs beside decoding (`benchmarks/rollout.py control`).
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # else some extensions report everything that is left as a leak
    gc.set_threshold(*THRESHOLDS)
