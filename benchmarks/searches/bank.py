"""A bank: what a policy does on some problems, sampled once, so that searches can be replayed.

For each problem it holds many trajectories from the prompt and, for each prefix of a failed one
that the task's oracle calls recoverable, the outcomes of several completions. A prefix that two
failed trajectories share, token for token, is completed once for both.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from elpo_ray.cluster.cluster import Cluster
from elpo_ray.config import Config
from elpo_ray.config.algorithm import AlgorithmConfig
from elpo_ray.config.growth import GrowthConfig
from elpo_ray.evaluation.oracle import first_irrecoverable
from elpo_ray.growth.bel import num_tool_steps, outcome
from elpo_ray.growth.independent import sample
from elpo_ray.models.folder import local_folder
from elpo_ray.rollout.worker import RolloutWorker, TreeRollout
from elpo_ray.runs.atomic import write_whole
from elpo_ray.runs.progress import progress_bar
from elpo_ray.scheduling.jobs import Job, OnComplete
from elpo_ray.tasks import make_task
from elpo_ray.types import FinishReason, InfrastructureError, Step, ToolKind, ToolResult, Turn

DIGITS = 5
"""Decimals of the stored log-probabilities and entropies."""


@dataclass(frozen=True)
class Trajectory:
    """One trajectory from the prompt."""

    steps: list[Step]
    success: bool
    truth: int | None
    """The first irrecoverable step, from 1, of a failed trajectory; None of a successful one."""
    pools: list[list[bool]]
    """Outcomes of completions of a failed trajectory's first 1, 2, … steps, for each prefix that is
    recoverable. Shape: [truth - 1][completions]."""


Bank = list[list[Trajectory]]
"""Trajectories by problem."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BankJob(Job[dict[str, Any]]):
    """Sample one problem's part of a bank."""

    roots: int
    completions: int

    async def run(self, worker: RolloutWorker, on_complete: OnComplete) -> dict[str, Any]:
        rollout = TreeRollout(worker, self.problem, 0, self.roots)
        try:
            return await self._sampled(rollout, worker)
        finally:
            await rollout.close()

    async def _sampled(self, rollout: TreeRollout, worker: RolloutWorker) -> dict[str, Any]:
        tree, trajectories = rollout.tree, []
        names: dict[tuple[int, ...], str] = {}
        pools: dict[str, list[bool]] = {}
        for leaf in await sample(rollout, self.roots):
            verdict = outcome(tree, leaf)
            if verdict is None:
                continue
            path, steps = tree.path(leaf), tree.steps(leaf)
            truth, keys = None, []
            if not verdict:
                truth = first_irrecoverable(worker.task, self.problem, steps)
                if truth is None:
                    raise ValueError(
                        f"task of {self.problem.id}: a bank needs a task with an oracle"
                    )
                for anchor in range(1, min(truth, num_tool_steps(steps) + 1)):
                    prefix = tuple(tree.prefix_ids(path[anchor - 1]))
                    key = names.setdefault(prefix, str(len(names)))
                    keys.append(key)
                    if key not in pools:
                        rollout.extend(self.completions)
                        leaves = await sample(
                            rollout, self.completions, path[anchor - 1], anchor=anchor
                        )
                        found = [outcome(tree, child) for child in leaves]
                        pools[key] = [bool(one) for one in found if one is not None]
            trajectories.append(
                {
                    "steps": [_step_record(step) for step in steps],
                    "success": verdict,
                    "truth": truth,
                    "pools": keys,
                }
            )
        return {"problem": self.problem.id, "trajectories": trajectories, "pools": pools}


@dataclass(frozen=True)
class BankSize:
    """How much is sampled."""

    problems: int
    roots: int
    """Trajectories from the prompt, each problem."""
    completions: int
    """Completions of each recoverable prefix of a failed trajectory."""


def make_bank(config: Config, folder: Path, size: BankSize, path: Path, console: Console) -> None:
    """Sample a bank of the training stream's first problems into `path`, one problem a line.
    `config` is a run's; `folder` the policy's. Raises ValueError for a task without an oracle."""
    growth = GrowthConfig(n_total=size.roots)
    config = replace(config, algorithm=AlgorithmConfig(growth=growth))
    task = make_task(config.task, config.trainer.seed)
    problems = [task.train_problem(index) for index in range(size.problems)]
    lines: dict[int, str] = {}
    with Cluster(config, learner=False) as cluster:
        rollouts = cluster.rollouts(local_folder(str(folder)))
        jobs = [
            BankJob(problem=p, width=size.roots, roots=size.roots, completions=size.completions)
            for p in problems
        ]
        with progress_bar(console, path.stem, len(jobs), True) as advance:
            for place, result in rollouts.stream(jobs, lambda _: None):
                if isinstance(result, InfrastructureError):
                    raise result
                lines[place] = json.dumps(result)
                advance(len(lines))
                if len(lines) % 5 == 0:
                    console.print(f"{path.stem}: {len(lines)} of {len(jobs)} problems sampled")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "\n".join(lines[place] for place in sorted(lines)) + "\n")


def read_bank(path: Path) -> Bank:
    """The bank in a file."""
    return [list(_trajectories(json.loads(line))) for line in path.read_text().splitlines()]


def shuffled(bank: Bank) -> Bank:
    """The bank with the log-probabilities and entropies of each trajectory's turns dealt out to its
    steps anew: a prior on them knows nothing."""
    rng = random.Random(0)

    def mixed(steps: list[Step]) -> list[Step]:
        others = rng.sample(steps, len(steps))
        return [
            replace(
                step,
                turn=replace(
                    step.turn, logprobs=other.turn.logprobs, entropies=other.turn.entropies
                ),
            )
            for step, other in zip(steps, others, strict=True)
        ]

    return [[replace(one, steps=mixed(one.steps)) for one in problem] for problem in bank]


def facts(bank: Bank) -> dict[str, float]:
    """What a bank is like: the policy's success rate; how many of the trajectories are different;
    of the sound prefixes of failed ones the mean chance of success V, how many lie below 0.1, and
    how often two and eight completions all fail."""
    roots = [one for problem in bank for one in problem]
    failed = [one for one in roots if not one.success]
    values = [sum(pool) / len(pool) for one in failed for pool in one.pools]
    distinct = {
        (number, tuple(step.turn.token_ids for step in one.steps))
        for number, problem in enumerate(bank)
        for one in problem
    }
    return {
        "problems": len(bank),
        "trajectories": len(roots),
        "success": 1 - len(failed) / len(roots),
        "distinct": len(distinct) / len(roots),
        "V": fmean(values) if values else 0.0,
        "V below 0.1": fmean(value < 0.1 for value in values) if values else 0.0,
        "2 miss": fmean((1 - value) ** 2 for value in values) if values else 0.0,
        "8 miss": fmean((1 - value) ** 8 for value in values) if values else 0.0,
    }


def _trajectories(record: dict[str, Any]) -> Iterator[Trajectory]:
    for one in record["trajectories"]:
        steps = [_step(fields) for fields in one["steps"]]
        pools = [record["pools"][key] for key in one["pools"]]
        yield Trajectory(steps, one["success"], one["truth"], pools)


def _step_record(step: Step) -> dict[str, Any]:
    result = step.result
    return {
        "ids": step.turn.token_ids,
        "logprobs": [round(value, DIGITS) for value in step.turn.logprobs],
        "entropies": [round(value, DIGITS) for value in step.turn.entropies],
        "observation": step.observation_ids,
        "result": None if result is None else [result.kind.value, result.text],
    }


def _step(record: dict[str, Any]) -> Step:
    result = record["result"]
    turn = Turn(
        tuple(record["ids"]),
        tuple(record["logprobs"]),
        tuple(record["entropies"]),
        FinishReason.STOP,
        weight_version=0,
    )
    return Step(
        turn,
        observation_ids=tuple(record["observation"]),
        result=None if result is None else ToolResult(ToolKind(result[0]), result[1]),
    )
