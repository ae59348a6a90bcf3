"""Staleness 1 against 0, with engine and learner pinned to one core each."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import ray

from benchmarks.rollouts.setup import Values, quickstart, with_model
from elpo_ray.cluster.cluster import Cluster
from elpo_ray.credit import assign
from elpo_ray.forest.trees import pack
from elpo_ray.scheduling.dynamic_sampling import StepBatch, collect
from elpo_ray.scheduling.pipeline import Pipeline
from elpo_ray.tasks import make_task


def pin(pid: int, core: int) -> None:
    """Pin a process, with all its threads and children, to one core."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {core})
        for child in (task / "children").read_text().split():
            pin(int(child), core)


def measure(args: argparse.Namespace) -> Values:
    config = quickstart(*args.set)
    task = make_task(config.task, 0)
    per_step, version, cursor = config.trainer.inputs_per_step, 0, 0
    with Cluster(config) as cluster, with_model(args, config, cluster) as folder:
        learner = cluster.learner(folder, 1000)
        group = cluster.rollouts(folder)
        learner.connect(group)
        getpid: Callable[[Any], int] = lambda _: os.getpid()  # noqa: E731
        for actors, core in ((learner.ranks, 1), ([*group.members, *group.sandboxes], 0)):
            for pid in ray.get([actor.__ray_call__.remote(getpid) for actor in actors]):
                pin(pid, core)

        def grow(step: int, first: int) -> StepBatch:
            def some(skipped: int, count: int) -> list[Any]:
                begin = first + skipped
                wanted = [task.train_problem(i) for i in range(begin, begin + count)]
                return list(zip(wanted, group.grow(wanted, step), strict=True))

            return collect(some, per_step, config.algorithm.growth.dynamic)

        def run(staleness: int, steps: int) -> Values:
            nonlocal version, cursor
            last = version + steps + 1
            pipeline = Pipeline(grow, staleness=staleness, steps=last)
            waited = updated = 0.0
            began = time.perf_counter()
            for number in range(steps + 1):
                if number == 1:  # the first batch has nothing to overlap with
                    began, waited, updated = time.perf_counter(), 0.0, 0.0
                mark = time.perf_counter()
                batch = pipeline.batch(version, cursor, lambda: None)
                waited += time.perf_counter() - mark
                forest = pack(
                    batch.trained, assign(batch.trained, config.algorithm), config.loss,
                    config.learner,
                )  # fmt: skip
                mark = time.perf_counter()
                with learner.moving():
                    learner.update(forest)
                    learner.publish(version + 1)
                updated += time.perf_counter() - mark
                version, cursor = version + 1, cursor + batch.taken
            seconds = time.perf_counter() - began
            return {
                "steps_per_minute": 60 * steps / seconds,
                "waiting_for_growth_s": waited / steps,
                "update_and_sync_s": updated / steps,
            }

        run(0, 1)
        pairs = []
        for _ in range(args.pairs):
            pairs.append((run(0, args.steps), run(1, args.steps)))
            print(json.dumps(pairs[-1]), file=sys.stderr, flush=True)
    ratios = [ahead["steps_per_minute"] / turn["steps_per_minute"] for turn, ahead in pairs]
    return {"layers": args.layers, "ratio": median(ratios), "ratios": ratios, "pairs": pairs}
