"""Devices that engines and learner share (`cluster.colocated`): one of the two uses them at a time.

Before engines sample, the learner's states go to host memory; before the learner does anything,
engines finish the turns in flight and sleep. Both sides call `DeviceSharing`
before they begin; it knows which was last, and does nothing where each side has its own devices.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field


@dataclass(eq=False)
class Side:
    """Engines or learner; before they are started there is nothing to move."""

    onload: Callable[[], None] = lambda: None
    offload: Callable[[], None] = lambda: None

    def is_gone(self) -> None:
        """Its processes have ended."""
        self.onload = self.offload = lambda: None


@dataclass
class DeviceSharing:
    """Engines and learner, at most one of which is on the devices."""

    shared: bool
    weights_lock: threading.RLock = field(default_factory=threading.RLock)
    """Held while weights change or the sides change places; see `LearnerGroup.changing_weights`."""
    engines: Side = field(default_factory=Side)
    learner: Side = field(default_factory=Side)
    _on_devices: Side | None = None

    @contextmanager
    def for_learner(self) -> Iterator[None]:
        """The body may use the learner; engines come no earlier than its end."""
        if not self.shared:
            yield
            return
        with self.weights_lock:
            self._change(self.engines, self.learner)
            yield

    @contextmanager
    def for_new_engine(self) -> Iterator[None]:
        """The body may start an engine; the learner comes no earlier than its end."""
        with self.weights_lock if self.shared else nullcontext():
            self.for_engines()
            yield

    def for_engines(self) -> None:
        """Engines may sample from now on, until the learner needs the devices."""
        if self.shared:
            with self.weights_lock:
                self._change(self.learner, self.engines)

    def _change(self, old: Side, new: Side) -> None:
        if self._on_devices is not new:
            old.offload()
            new.onload()
            self._on_devices = new
