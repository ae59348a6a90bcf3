"""BEL trees against independent rollouts, and the whole stack against its bare engine."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from statistics import median
from typing import Any

import ray

from benchmarks.rollouts.setup import Values, quickstart, with_model
from elpo_ray.cluster import cluster as placement
from elpo_ray.cluster.cluster import Cluster
from elpo_ray.cluster.rollout_actor import RolloutActor
from elpo_ray.cluster.rollouts import RolloutGroup
from elpo_ray.config import Config
from elpo_ray.rollout.engine import CPU_BLOCK_SIZE
from elpo_ray.runs.metrics import probe_prefixes
from elpo_ray.tasks import make_task
from elpo_ray.tree import RolloutTree
from elpo_ray.types import Problem


class MeasuredActor(RolloutActor):
    """A rollout worker whose engine can be used bare."""

    async def bare(self, requests: list[tuple[list[int], int]]) -> tuple[int, float]:
        """Decode the given number of tokens after each prefix. All requests are known beforehand
        and ask for tokens only. Returns tokens and seconds."""
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        llm: Any = self.engine._llm  # type: ignore[union-attr]

        async def one(number: int, prefix: list[int], count: int) -> int:
            params = SamplingParams(
                temperature=1.0, max_tokens=count, ignore_eos=True, detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )  # fmt: skip
            prompt = tokens_input(prefix, cache_salt=f"bare {began}")
            async for output in llm.generate(prompt, params, f"bare-{began}-{number}"):
                last = output
            return len(last.outputs[0].token_ids)

        began = time.perf_counter()
        counts = await asyncio.gather(*(one(i, *request) for i, request in enumerate(requests)))
        return sum(counts), time.perf_counter() - began

    async def forget(self) -> None:
        """Empty the prefix cache."""
        await self.engine._llm.reset_prefix_cache()  # type: ignore[union-attr]

    async def seconds(self) -> tuple[float, float]:
        """Seconds so far with work to do, and those of them with an idle engine."""
        values = self._running.worker.counters.values()
        return values["busy_s"], values["idle_s"]


def turns(trees: list[RolloutTree]) -> list[tuple[list[int], int]]:
    """(prefix, tokens sampled after it) of every turn."""
    return [
        (tree.prefix_ids(node.parent), len(node.step.turn.token_ids))
        for tree in trees
        for node in tree.nodes
        if node.step is not None and node.parent is not None
    ]


def grown(group: RolloutGroup, config: Config, inputs: list[Problem], step: int) -> Values:
    """Run one growth phase, from an empty prefix cache."""
    (worker,) = group.members
    group.use(config)
    ray.get(worker.forget.remote())
    busy, idle = ray.get(worker.seconds.remote())
    began = time.perf_counter()
    trees = group.grow(inputs, step)
    seconds = time.perf_counter() - began
    busy, idle = (
        b - a for a, b in zip((busy, idle), ray.get(worker.seconds.remote()), strict=True)
    )
    tokens = sum(count for _, count in turns(trees))
    return {"seconds": seconds, "tokens": tokens, "idle": idle / busy, "trees": trees}


GPU_BLOCK_SIZE = 16
"""Tokens of a cache block of vLLM on a GPU."""


def prefix_hits(trees: list[RolloutTree], block: int) -> Values:
    """Two shares of the probes' prefix tokens: those found in the cache, and those in whole blocks
    (vLLM caches no others)."""
    prefixes = probe_prefixes(trees)
    tokens = sum(length for length, _ in prefixes)
    whole = sum((length - 1) // block * block for length, _ in prefixes)
    return {
        "probe_prefix_hit": sum(cached for _, cached in prefixes) / tokens,
        "probe_prefix_in_whole_blocks": whole / tokens,
    }


def measure(args: argparse.Namespace) -> Values:
    trees, flat = quickstart(*args.set), quickstart("algorithm=grpo", *args.set)
    task, gpus = make_task(trees.task, 0), trees.cluster.gpus
    inputs = [task.train_problem(i) for i in range(args.inputs)]
    rows: list[Values] = []
    placement.RolloutActor = MeasuredActor  # type: ignore[misc]
    with Cluster(trees) as cluster, with_model(args, trees, cluster) as folder:
        group = cluster.rollouts(folder)
        grown(group, trees, inputs[:16], 0)
        began = time.perf_counter()
        for step in range(1, args.pairs + 1):
            if rows and time.perf_counter() - began > args.seconds:
                break
            bel = grown(group, trees, inputs, step)
            sampled = turns(bel["trees"])
            ray.get(group.members[0].forget.remote())
            tokens, seconds = ray.get(group.members[0].bare.remote(sampled))
            independent = grown(group, flat, inputs, step)
            rows.append(
                {
                    "bel_s": bel["seconds"],
                    "independent_s": independent["seconds"],
                    "wall_clock_ratio": bel["seconds"] / independent["seconds"],
                    "token_ratio": bel["tokens"] / independent["tokens"],
                    "tokens_per_turn": bel["tokens"] / len(sampled),
                    "bel_turns_per_s": len(sampled) / bel["seconds"],
                    "bel_tokens_per_s": bel["tokens"] / bel["seconds"],
                    "bare_tokens_per_s": tokens / seconds,
                    "stack_over_bare": bel["tokens"] / bel["seconds"] / (tokens / seconds),
                    **prefix_hits(bel["trees"], GPU_BLOCK_SIZE if gpus else CPU_BLOCK_SIZE),
                    "engine_idle": bel["idle"],
                    "engine_idle_independent": independent["idle"],
                }
            )
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return {
        "inputs": args.inputs,
        "layers": args.layers,
        "mlp": args.mlp,
        "n_total": 16,
        "median": {key: median(row[key] for row in rows) for key in rows[0]},
        "rounds": rows,
    }
