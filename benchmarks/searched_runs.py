"""What the searches of finished runs found, against the task's oracle.

    python benchmarks/searched_runs.py runs/NAME [runs/NAME ...] [--bin 150]

Reads the dumped trees (`logging.dump_tokens=true`) of runs on a task with an oracle. Prints one
JSON object: for each run the share of named steps that are right, whether every input spent exactly
N_total, and pass@1 before and after; over all runs the calibration: named steps, sorted by their
posterior and cut into bins of at least `--bin`, with each bin's mean posterior and share right.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

sys.path[0] = str(Path(__file__).resolve().parents[1])  # beside this file lies a `sandbox`

from elpo_ray.chat.template import Chat  # noqa: E402
from elpo_ray.config import Config  # noqa: E402
from elpo_ray.config.measure import MeasureConfig  # noqa: E402
from elpo_ray.config.values import typed  # noqa: E402
from elpo_ray.dump import read_line  # noqa: E402
from elpo_ray.evaluation.oracle import first_irrecoverable  # noqa: E402
from elpo_ray.evaluation.source import resolve  # noqa: E402
from elpo_ray.tasks import make_task  # noqa: E402
from elpo_ray.tools.catalog import schemas  # noqa: E402
from elpo_ray.tree import RolloutTree  # noqa: E402
from elpo_ray.types import (  # noqa: E402
    EndReason,
    FinishReason,
    Step,
    ToolKind,
    ToolResult,
    Turn,
)


@dataclass(frozen=True)
class Search:
    """One search of a run."""

    named: bool
    right: bool
    posterior: float | None
    """The named step's posterior; a binary search has None."""


def steps_of(tree: RolloutTree, leaf: int, chat: Chat) -> list[Step]:
    """The steps of a dumped trajectory, with what an oracle reads of them."""
    steps = []
    for node in (tree.nodes[i] for i in tree.path(leaf)):
        more = node.extra
        if "token_ids" not in more:
            raise ValueError(f"tree {tree.task_id}: no tokens; dump with logging.dump_tokens=true")
        ids, cut = tuple(more["token_ids"]), node.end in (EndReason.TURN_LENGTH, EndReason.CONTEXT)
        zeros = (0.0,) * len(ids)
        finish = FinishReason.LENGTH if cut else FinishReason.STOP
        turn = Turn(ids, zeros, zeros, finish, more.get("weight_version", 0))
        kind = more.get("tool_kind")
        result = None if kind is None else ToolResult(ToolKind(kind), more.get("observation", ""))
        steps.append(Step(turn, action_text=more["text"], call=chat.parse(ids).call, result=result))
    return steps


def searches(run: Path, config: Config) -> Iterator[tuple[RolloutTree, list[Search]]]:
    """Every tree of a run and its searches that the oracle can judge."""
    task = make_task(config.task, config.trainer.seed)
    folder = resolve(MeasureConfig(model=str(run), tasks=[str(config.task.name)])).folder
    assert folder is not None, "a run has a model folder"
    chat = Chat.from_folder(str(folder), schemas(config.task, config.sandbox))
    for dump in sorted((run / "trees").glob("step_*.jsonl")):
        for line in dump.read_text(encoding="utf-8").splitlines():
            tree = read_line(line)
            problem = task.train_problem(int(tree.task_id.rpartition("-")[2]))
            found = []
            for one in tree.localizations:
                truth = first_irrecoverable(task, problem, steps_of(tree, one.leaf, chat))
                if truth is None:
                    continue
                right = one.confirmed and tree.path(one.leaf)[truth - 1] == one.critical
                believed = max(one.posterior.last) if one.posterior is not None else None
                found.append(Search(one.confirmed, right, believed))
            yield tree, found


def of_run(run: Path) -> tuple[dict[str, Any], list[Search]]:
    """The numbers of one run, and all of its searches."""
    config = typed(Config, OmegaConf.load(run / "config.yaml"))
    n_total = config.algorithm.growth.n_total
    everything: list[Search] = []
    trees = exact = 0
    for tree, found in searches(run, config):
        everything += found
        trees += 1
        exact += len(tree.leaves()) == n_total == sum(entry["charged"] for entry in tree.ledger)
    named = [one for one in everything if one.named]
    summary_file = run / "summary.json"
    summary = json.loads(summary_file.read_text()) if summary_file.is_file() else {}
    return {
        "run": run.name,
        "algorithm": config.algorithm.name,
        "seed": config.trainer.seed,
        "trees": trees,
        "trees that spent exactly N_total": exact,
        "searches": len(everything),
        "named": len(named),
        "right of named": sum(one.right for one in named) / len(named) if named else None,
        "pass@1 before": summary.get("pass_at_1_before"),
        "pass@1 after": summary.get("pass_at_1_after"),
        "seconds growing": summary.get("seconds_by_phase", {}).get("grow"),
    }, everything


def calibration(found: Sequence[Search], size: int) -> list[dict[str, float]]:
    """Named steps by their posterior, in bins of at least `size`."""
    pairs = sorted((one.posterior, one.right) for one in found if one.named and one.posterior)
    count = max(1, len(pairs) // size)
    rows = []
    for part in np.array_split(np.array(pairs, dtype=np.float64).reshape(-1, 2), count):
        if len(part):
            posterior, right = part.mean(axis=0)
            rows.append(
                {
                    "names": len(part),
                    "posterior from": float(part[0, 0]),
                    "to": float(part[-1, 0]),
                    "mean posterior": float(posterior),
                    "right": float(right),
                    "apart": float(abs(right - posterior)),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--bin", type=int, default=150, help="fewest named steps of a bin")
    args = parser.parse_args()
    rows, found = [], []
    for run in args.runs:
        row, mine = of_run(run)
        print(json.dumps(row), file=sys.stderr, flush=True)
        rows.append(row)
        found += mine
    print(json.dumps({"runs": rows, "calibration": calibration(found, args.bin)}, indent=2))


if __name__ == "__main__":
    main()
