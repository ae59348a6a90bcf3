"""Rollouts per second through Ray, search, ledger and collection; memory of the driver."""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import ray

from benchmarks.rollouts.setup import Values, local_ray, quickstart
from elpo_ray.cluster import rollouts as group_module
from elpo_ray.cluster.garbage import freeze_gc
from elpo_ray.cluster.rollout_actor import RolloutActor
from elpo_ray.cluster.rollouts import RolloutGroup
from elpo_ray.config import Config
from elpo_ray.rollout.settings import RolloutSettings
from elpo_ray.rollout.worker import RolloutWorker
from elpo_ray.scheduling.runner import JobRunner
from elpo_ray.types import (
    FinishReason,
    Parsed,
    Problem,
    Score,
    ToolCall,
    ToolKind,
    ToolResult,
    Turn,
)


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def rss_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Scripted:
    """Policy, chat, tools and task in one. A trajectory has four turns of 16 tokens and three tool
    calls, half of the trajectories fail, and nothing takes time."""

    state = None
    call_of_turn = ToolCall("code_interpreter", {"code": "1 + 1"})
    result = ToolResult(ToolKind.OK, "2", duration_s=0.001)

    async def generate(self, prefix: Any, sampling: Any) -> Turn:
        entropy = (sampling.seed >> 8 & 255) / 256
        return Turn(tuple(range(40, 56)), (-0.5,) * 16, (entropy,) * 16, FinishReason.STOP, 0)

    def prompt_ids(self, messages: Any, *, tools: bool = True) -> list[int]:
        return list(range(60))

    def parse(self, token_ids: Any) -> Parsed:
        return Parsed("call", call=self.call_of_turn)

    def observation_ids(self, text: str) -> list[int]:
        return list(range(16))

    async def begin(self, problem: Any, tree: str) -> None: ...

    async def open(self, **_: Any) -> Scripted:
        return self

    async def call(self, call: Any) -> ToolResult:
        return self.result

    async def reward(self) -> None: ...

    async def close(self) -> None: ...

    async def release(self, tree: str) -> None: ...

    async def score(self, problem: Any, steps: Any, tools: Any) -> Score:
        success = steps[-1].turn.entropies[0] > 0.5
        return Score(1.0 if success else -1.0, success)


class ScriptedActor(RolloutActor):
    """A rollout worker without engine and sandbox."""

    async def start(self, config: Config, folder: str, sandboxes: list[Any]) -> None:
        scripted: Any = Scripted()
        settings = RolloutSettings.of(config)
        worker = RolloutWorker(scripted, scripted, scripted, scripted, settings)
        self.engine, self.runner = None, JobRunner(worker, 512, lambda: None)
        freeze_gc()

    async def cpu(self) -> float:
        return cpu_seconds()


def problems(count: int) -> list[Problem]:
    return [Problem(f"p{i}", ({"role": "user", "content": "x"},), None) for i in range(count)]


@contextmanager
def scripted_group(workers: int) -> Iterator[RolloutGroup]:
    config = quickstart("task.max_turns=4")
    remote: Any = ray.remote(ScriptedActor)

    def spawn(number: int, life: int) -> Any:
        return remote.options(num_cpus=0, max_concurrency=1000).remote()

    handles = [spawn(number, 0) for number in range(workers)]
    ray.get([handle.start.remote(config, "", []) for handle in handles])
    group = RolloutGroup(handles, [], config, "", spawn)
    freeze_gc()
    try:
        yield group
    finally:
        group.close()
        for handle in handles:
            ray.kill(handle)


def rate(workers: int, inputs: int, rounds: int) -> Values:
    with scripted_group(workers) as group:
        group.grow(problems(workers * 50), 0)
        rates, driver, worker = [], [], []
        for step in range(rounds):
            used, began = cpu_seconds(), time.perf_counter()
            theirs = sum(ray.get([handle.cpu.remote() for handle in group.members]))
            trees = group.grow(problems(inputs), step)
            seconds = time.perf_counter() - began
            theirs = sum(ray.get([handle.cpu.remote() for handle in group.members])) - theirs
            rollouts = sum(tree.budget for tree in trees)
            rates.append(rollouts / seconds)
            driver.append((cpu_seconds() - used) / rollouts * 1e6)
            worker.append(theirs / rollouts * 1e6)
    return {
        "workers": workers,
        "rollouts_per_s": median(rates),
        "rollouts_per_s_runs": rates,
        "driver_cpu_us_per_rollout": median(driver),
        "worker_cpu_us_per_rollout": median(worker),
    }


def memory(args: argparse.Namespace) -> Values:
    steps, marks = 1000, {}
    with local_ray(), scripted_group(1) as group:
        for step in range(steps):
            group.grow(problems(4), step)
            if step + 1 in (100, 250, 500, 750, 1000):
                marks[f"rss_mib_after_{step + 1}"] = rss_mib()
    return {"steps": steps, "rollouts": steps * 4 * 16, **marks}


def exchange_cost(seconds: float) -> float:
    """Processor time of the driver for one exchange without news, in microseconds."""
    patience, group_module.PATIENCE_S = group_module.PATIENCE_S, 0.005
    try:
        with scripted_group(2) as group:
            count, take = 0, group.queue.take

            def counted(worker: int, report: Any) -> None:
                nonlocal count
                count += 1
                take(worker, report)

            group.queue.take = counted  # type: ignore[method-assign]
            time.sleep(1.0)
            count, used = 0, cpu_seconds()
            time.sleep(seconds)
            return (cpu_seconds() - used) / count * 1e6
    finally:
        group_module.PATIENCE_S = patience


def extrapolate(driver_us: float, exchange_us: float) -> list[Values]:
    """Share of a core that one driver needs for this number of engines. A worker reports once per
    second and whenever a tree is finished; its own work does not grow with their number."""
    rows = []
    for engines in (2, 64, 512):
        row: Values = {"engines": engines}
        for each in (1, 5):
            busy = each * driver_us + (1 + each / 16) * exchange_us
            row[f"driver_core_share_at_{each}_rollouts_per_s_each"] = engines * busy / 1e6
        rows.append(row)
    return rows


def rates(args: argparse.Namespace) -> Values:
    with local_ray():
        one, two = rate(1, 400, args.pairs), rate(2, 800, args.pairs)
        exchange = exchange_cost(3.0)
    table = extrapolate(two["driver_cpu_us_per_rollout"], exchange)
    return {
        "one_worker": one,
        "two_workers": two,
        "driver_cpu_us_per_exchange": exchange,
        "extrapolation": table,
    }
