"""Numbers of a running run in Ray's metrics, hence on its dashboard and in Prometheus.

elpo_<key>          every number of a step, as in `metrics.jsonl`, `/` as `_`   (driver)
elpo_worker_<...>   a rollout worker, every second; tag `actor`
elpo_learner_<...>  rank 0 of the learner; tag `actor`
elpo_sandbox_<...>  a sandbox actor, every few seconds; tag `actor`
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import ray
from ray.util.metrics import Gauge


class Gauges:
    """Gauges of this process; each is made when its name first comes up."""

    def __init__(self, prefix: str = "elpo_") -> None:
        self._prefix = prefix
        name = ray.get_runtime_context().get_actor_name() or "driver"
        self._tags = {"actor": name.split(".")[0]}
        """A worker keeps its name over its lives."""
        self._gauges: dict[str, Gauge] = {}

    def set(self, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            if key not in self._gauges:
                name = self._prefix + re.sub(r"\W", "_", key)
                self._gauges[key] = Gauge(name, description=key, tag_keys=("actor",))
            self._gauges[key].set(float(value), tags=self._tags)
