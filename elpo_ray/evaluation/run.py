"""An evaluation: sample what is missing, then count.

Invariants: a finished sample is on disk before the next one is waited for, so that nothing is
sampled twice; the numbers come from the files alone.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from elpo_ray.cluster.cluster import Cluster
from elpo_ray.cluster.rollouts import RolloutGroup
from elpo_ray.config.measure import EvaluateConfig
from elpo_ray.config.task import TaskConfig
from elpo_ray.evaluation.bench import Bench, ResultFolder
from elpo_ray.evaluation.report import show, write_report
from elpo_ray.evaluation.summary import per_problem, summarize
from elpo_ray.evaluation.votes import one_vote_each
from elpo_ray.rollout.sample import Sample
from elpo_ray.runs.atomic import write_whole
from elpo_ray.runs.progress import announce, progress_bar, waiting
from elpo_ray.scheduling.jobs import EvaluateJob
from elpo_ray.types import Fault, InfrastructureError, Problem

MAX_LOST = 20
"""Samples lost to the infrastructure, without one success between them, that end the evaluation."""


@dataclass(frozen=True)
class Missing:
    """What a task still needs."""

    name: str
    wanted: list[tuple[Problem, int]]


def evaluate(config: EvaluateConfig, tasks: Mapping[str, TaskConfig]) -> Path:
    """Sample, summarize, report; returns the folder of the results.

    Raises ValueError before anything starts, Fault if samples were lost (the rest is kept).
    """
    console = Console()
    with waiting(console, "reading the model and the problems"):
        bench = Bench.prepare(config, tasks)
    if config.check_only:
        console.print(plan(bench, config), highlight=False, soft_wrap=True)
        return Path()
    folder = ResultFolder.of(bench, "evaluate", {})
    missing = [m for name in tasks if (m := _missing(bench, folder, name, config.n)).wanted]
    lost = 0
    if missing:
        try:
            lost = _sample(bench, folder, missing, console)
        except KeyboardInterrupt:
            left = sum(len(_missing(bench, folder, name, config.n).wanted) for name in tasks)
            count = config.n * sum(map(len, bench.problems.values()))
            raise folder.interrupted(count - left, count, "samples") from None
    summaries = {name: write_numbers(bench, folder, name, config) for name in tasks}
    write_whole(folder.path / "summary.json", json.dumps(summaries, indent=2) + "\n")
    write_report(folder.path, config.model, summaries)
    show(console, config.model, summaries)
    console.print(f"everything lies in {folder.path}/", highlight=False, soft_wrap=True)
    if lost:
        raise Fault(
            f"{lost} samples were lost to failing engines or sandboxes and are in no number; run "
            "the same command again to sample them"
        )
    return folder.path


def plan(bench: Bench, config: EvaluateConfig) -> str:
    """What would be sampled, for a person to read."""
    lines = [f"model {bench.source.path}, {bench.source.max_context} tokens of context"]
    for name, problems in bench.problems.items():
        task = bench.configs[name].task
        lines.append(
            f"{name}: {len(problems)} problems x {config.n} samples = {len(problems) * config.n}, "
            f"at most {task.max_turns} turns of {task.max_turn_tokens or 'any number of'} tokens; "
            f"Pass@K and Major@K for K = {', '.join(map(str, config.all_ks)) or 'none'}"
        )
    return "\n".join(lines)


def write_numbers(
    bench: Bench, folder: ResultFolder, name: str, config: EvaluateConfig
) -> dict[str, Any]:
    """Count one task's samples with an index below n; the rows of its problems go to a file."""
    known = {problem.id for problem in bench.problems[name]}
    samples = [
        sample
        for sample in map(Sample.from_json, folder.records(name).load())
        if sample.index < config.n and sample.problem in known
    ]
    samples = asyncio.run(one_vote_each(bench.tasks[name], bench.problems[name], samples))
    rows = "".join(json.dumps(row) + "\n" for row in per_problem(samples))
    write_whole(folder.path / name / "problems.jsonl", rows)
    missing = len(known) * config.n - len(samples)
    return {"n": config.n, "missing": missing, **summarize(samples, config.all_ks)}


def _missing(bench: Bench, folder: ResultFolder, name: str, n: int) -> Missing:
    """Problem by problem, the samples that no finished run has left."""
    done = {(record["problem"], record["index"]) for record in folder.records(name).load()}
    pairs = [(problem, i) for problem in bench.problems[name] for i in range(n)]
    return Missing(name, [(problem, i) for problem, i in pairs if (problem.id, i) not in done])


def _sample(bench: Bench, folder: ResultFolder, missing: list[Missing], console: Console) -> int:
    """Start the engines and fill the files; returns how many samples were lost."""
    first = bench.configs[missing[0].name]
    lost = 0
    with waiting(console, "starting Ray"):
        cluster = Cluster(first, learner=False)
    with cluster:
        console.print(cluster.watched, highlight=False, soft_wrap=True)
        with waiting(console, "starting the engines"):
            rollouts = cluster.rollouts(Path(bench.source.path))
        for place, part in enumerate(missing):
            if place:
                rollouts.use(bench.configs[part.name])
            lost += _sample_task(rollouts, bench, folder, part, console)
    return lost


def _sample_task(
    rollouts: RolloutGroup, bench: Bench, folder: ResultFolder, part: Missing, console: Console
) -> int:
    records = folder.records(part.name)
    config = bench.config
    jobs = [
        EvaluateJob(problem=problem, index=i, sampling=config.sampling)
        for problem, i in part.wanted
    ]
    lost = in_a_row = 0
    announce(console, f"sampling {part.name}")
    with progress_bar(console, part.name, len(jobs), config.progress) as advance:
        for _, result in rollouts.stream(jobs, advance):
            if not isinstance(result, InfrastructureError):
                records.append(result.to_json())
                in_a_row = 0
                continue
            lost, in_a_row = lost + 1, in_a_row + 1
            if in_a_row == MAX_LOST:
                raise Fault(
                    f"{part.name}: {MAX_LOST} samples in a row were lost ({result}); finished ones "
                    f"are kept in {folder.path}, run the same command again"
                ) from result
    return lost
