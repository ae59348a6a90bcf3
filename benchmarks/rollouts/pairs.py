"""Growth by the search by evidence against growth by BEL: the same inputs, one after the other."""

from __future__ import annotations

import argparse
import json
import sys
from statistics import median
from typing import Any

from benchmarks.rollouts.growth import MeasuredActor, grown
from benchmarks.rollouts.setup import Values, quickstart, with_model
from elpo_ray.cluster import cluster as placement
from elpo_ray.cluster.cluster import Cluster
from elpo_ray.growth.budget import Totals
from elpo_ray.tasks import make_task


def measure(args: argparse.Namespace) -> Values:
    """Pairs of growth phases on one engine, each from an empty cache; who begins alternates."""
    configs = {
        "bel": quickstart(*args.set),
        "posterior": quickstart("algorithm=elpo_posterior", *args.set),
    }
    task = make_task(configs["bel"].task, 0)
    inputs = [task.train_problem(i) for i in range(args.inputs)]
    rows: list[Values] = []
    placement.RolloutActor = MeasuredActor  # type: ignore[misc]
    with Cluster(configs["bel"]) as cluster, with_model(args, configs["bel"], cluster) as folder:
        group = cluster.rollouts(folder)
        grown(group, configs["bel"], inputs[:16], 0)
        for step in range(1, args.pairs + 1):
            order = list(configs) if step % 2 else list(configs)[::-1]
            found: dict[str, Any] = {
                name: grown(group, configs[name], inputs, step) for name in order
            }
            row: Values = {"step": step, "first": order[0]}
            for name, one in found.items():
                totals = sum((Totals.of(tree.ledger) for tree in one["trees"]), Totals())
                assert totals.rollouts == 16 * len(inputs), "every input spends its budget"
                row |= {
                    f"{name}_s": one["seconds"],
                    f"{name}_tokens": one["tokens"],
                    f"{name}_probes": totals.probes,
                    f"{name}_idle": one["idle"],
                }
            row["ratio"] = row["posterior_s"] / row["bel_s"]
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    return {
        "inputs": args.inputs,
        "median_ratio": median(row["ratio"] for row in rows),
        "pairs": rows,
    }
