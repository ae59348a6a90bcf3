"""The smallest run of the real stack, part by part: what fails here would fail an hour later.

One tiny model, one rollout worker, one learner rank, one sandbox actor, over the same classes as a
run. The learner takes a step large enough to change what the model says, the engine gets the new
weights, and both must then agree on the probability of what the engine samples.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from elpo_ray.config import Config
from elpo_ray.credit import assign
from elpo_ray.doctor.finding import Finding, failure, ok, warning
from elpo_ray.forest.trees import TrainForest, pack
from elpo_ray.models.base import base_model
from elpo_ray.tasks import make_task
from elpo_ray.tree import RolloutTree

INPUTS = 2
MISMATCH = 0.01
"""Nats a token between engine and learner: far above rounding in bf16, far below another model."""
SETTLED_S = 120.0
"""A part that takes longer than this to start is worth a warning."""


def smallest_run(config: Config) -> Iterator[Finding]:
    """`config`: a run of the tiny model with one actor of each kind. Raises what a run would."""
    with tempfile.TemporaryDirectory(prefix="elpo-doctor-") as scratch:
        config = replace(config, cold_start=replace(config.cold_start, cache=scratch))
        task = make_task(config.task, config.trainer.seed)
        base = base_model(config, task)
        yield from _over_ray(config, base)


def _over_ray(config: Config, base: Path) -> Iterator[Finding]:
    from elpo_ray.cluster.cluster import Cluster

    task = make_task(config.task, config.trainer.seed)
    inputs = [task.train_problem(index) for index in range(INPUTS)]
    watch = _Watch()
    with Cluster(config) as cluster:
        yield watch.started("Ray", "started and joined" if config.cluster.address else "started")
        learner = cluster.learner(base, total_steps=2)
        yield watch.started("DeepSpeed", "one rank started")
        rollouts = cluster.rollouts(base)
        learner.connect(rollouts)
        yield watch.started("vLLM", "one engine and one sandbox actor started")
        trees = _whole(rollouts.grow(inputs, 0))
        yield _generated(trees, watch.lap())
        stats = learner.update(_forest(trees, config))
        yield _stepped(stats, watch.lap())
        learner.publish(version=1)
        seconds = watch.lap()
        trees = _whole(rollouts.grow(inputs, 1))
        yield _synced(trees, learner.update(_forest(trees, config)), seconds)


def _whole(results: Sequence[object]) -> list[RolloutTree]:
    """The trees among what came back. Raises RuntimeError for inputs that were set aside."""
    for result in results:
        if not isinstance(result, RolloutTree):
            raise RuntimeError(f"an input was set aside: {result}")
    return [result for result in results if isinstance(result, RolloutTree)]


def _forest(trees: list[RolloutTree], config: Config) -> TrainForest:
    """Every step praised alike: a random model earns no contrast, and the learner must move."""
    credits = [
        replace(
            credit,
            advantage=np.ones_like(credit.advantage),
            negative_advantage=np.zeros_like(credit.negative_advantage),
        )
        for credit in assign(trees, config.algorithm)
    ]
    return pack(trees, credits, config.algorithm.loss, config.learner)


def _generated(trees: list[RolloutTree], seconds: float) -> Finding:
    steps = [node.step for tree in trees for node in tree.nodes if node.step is not None]
    tokens = sum(len(step.turn.token_ids) for step in steps)
    finite = all(np.isfinite([*s.turn.logprobs, *s.turn.entropies]).all() for s in steps)
    detail = (
        f"{tokens} tokens in {sum(len(t.leaves()) for t in trees)} trajectories, {seconds:.1f} s"
    )
    if not finite:
        return failure(
            "vLLM generate",
            f"{detail}; log-probs or entropies are not finite",
            "reinstall vLLM (make clean install)",
        )
    return ok("vLLM generate", detail)


def _stepped(stats: dict[str, float], seconds: float) -> Finding:
    detail = (
        f"{stats['optimizer_steps']:.0f} steps over {stats['trained_tokens']:.0f} tokens, gradient "
        f"norm {stats['grad_norm']:.3g}, {seconds:.1f} s"
    )
    if not stats["optimizer_steps"] or not np.isfinite(stats["grad_norm"]):
        return failure("DeepSpeed step", detail, "reinstall torch and DeepSpeed (make install)")
    return ok("DeepSpeed step", detail)


def _synced(trees: list[RolloutTree], stats: dict[str, float], seconds: float) -> Finding:
    versions = {n.step.turn.weight_version for t in trees for n in t.nodes if n.step is not None}
    mismatch = stats["mismatch_k3"]
    detail = f"{seconds:.2f} s, engine and learner differ by {mismatch:.1e} nats a token"
    if versions != {1} or not mismatch < MISMATCH:
        return failure(
            "weight sync",
            f"{detail}, versions served: {sorted(versions)}",
            "engine and learner disagree on the model: install the pinned vLLM and transformers",
        )
    return ok("weight sync", detail)


class _Watch:
    """Seconds since the last lap."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def lap(self) -> float:
        before, self._since = self._since, time.monotonic()
        return self._since - before

    def started(self, name: str, detail: str) -> Finding:
        seconds = self.lap()
        if seconds > SETTLED_S:
            return warning(
                name, f"{detail} in {seconds:.0f} s", "slow: is the machine or its disk busy?"
            )
        return ok(name, f"{detail} in {seconds:.1f} s")
