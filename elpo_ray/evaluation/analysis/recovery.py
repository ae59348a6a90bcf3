"""How often a failed trajectory recovers when it goes on from before one of its steps (Figure 1).

To fix a step is to let the policy take it again: completions start from the prefix that ends
before it. Where the task has an oracle, the completions that took a sound step there are counted
apart, and how many of these succeeded. The paper has errors marked by a judge; here an error step
is one whose tool call failed, and every step from the first irrecoverable one on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from elpo_ray.config.measure import AnalyzeConfig
from elpo_ray.evaluation.analysis.failures import ExtraBudget, Record, sample_failures, verdicts
from elpo_ray.evaluation.oracle import first_irrecoverable
from elpo_ray.growth.bel import num_tool_steps, search
from elpo_ray.growth.independent import sample
from elpo_ray.interfaces import Task
from elpo_ray.rollout.worker import TreeRollout
from elpo_ray.types import Problem, Step, ToolKind

KINDS = ("random error", "first error", "first irrecoverable", "later irrecoverable")


async def examine(
    rollout: TreeRollout, task: Task, problem: Problem, config: AnalyzeConfig
) -> list[Record]:
    """One record a failed trajectory and kind of step that it has."""
    failures = await sample_failures(rollout, config.failures)
    records = []
    for leaf in failures.leaves:
        steps = rollout.tree.steps(leaf)
        first = first_irrecoverable(task, problem, steps)
        if first is None:
            first = await _searched(rollout, leaf, config)
        fixed: dict[int, Record] = {}
        for kind, step in chosen_steps(rollout, steps, first).items():
            if step not in fixed:
                fixed[step] = await _fix(rollout, task, problem, leaf, step, config.completions)
            records.append(
                {
                    "problem": problem.id,
                    "trajectory": leaf,
                    "tool_steps": num_tool_steps(steps),
                    "kind": kind,
                    "step": step,
                    **fixed[step],
                }
            )
    return records


def chosen_steps(rollout: TreeRollout, steps: Sequence[Step], first: int | None) -> dict[str, int]:
    """The step of each kind, from 1, as far as the trajectory has one; `first` = the first
    irrecoverable one, None if it is not known."""
    failed_calls = {
        m for m, step in enumerate(steps, 1) if step.result and step.result.kind is not ToolKind.OK
    }
    lost = set() if first is None else set(range(first, len(steps) + 1))
    errors = sorted(failed_calls | lost)
    later = sorted(lost - {first})
    chosen: dict[str, int] = {}
    if errors:
        chosen["random error"] = rollout.random.choice(errors)
        chosen["first error"] = errors[0]
    if first is not None:
        chosen["first irrecoverable"] = first
    if later:
        chosen["later irrecoverable"] = rollout.random.choice(later)
    return chosen


def summarize(records: Sequence[Record]) -> list[dict[str, Any]]:
    """A row a kind of step: the mean recovery over trajectories, and its standard error."""
    rows = []
    for kind in KINDS:
        group = [r for r in records if r["kind"] == kind and r["completions"]]
        if not group:
            continue
        shares = [record["successes"] / record["completions"] for record in group]
        sound = [r["sound_successes"] / r["sound"] for r in group if r["sound"]]
        error = stdev(shares) / sqrt(len(shares)) if len(shares) > 1 else None
        rows.append(
            {
                "fixed step": kind,
                "trajectories": len(group),
                "recovery": fmean(shares),
                "standard error": error,
                "recovery of sound fixes": fmean(sound) if sound else None,
                "mean step": fmean(record["step"] for record in group),
            }
        )
    return rows


async def _fix(
    rollout: TreeRollout, task: Task, problem: Problem, leaf: int, step: int, completions: int
) -> Record:
    """Completions from the prefix before `step`; those without a verdict do not count."""
    tree = rollout.tree
    at = tree.path(leaf)[step - 2] if step > 1 else 0
    extra = ExtraBudget(rollout, completions)
    leaves = await sample(extra, completions, at, anchor=step - 1 or None)
    outcomes = verdicts(tree, leaves)
    sound = verdicts(
        tree,
        [n for n in leaves if task.recoverable(problem, tree.steps(n)[:step]) is True],
    )
    return {
        "completions": len(outcomes),
        "successes": sum(outcomes),
        "sound": len(sound),
        "sound_successes": sum(sound),
    }


async def _searched(rollout: TreeRollout, leaf: int, config: AnalyzeConfig) -> int | None:
    """The first irrecoverable step by a search with large probes."""
    bel = replace(config.algorithm.growth.bel, x_min=config.scan, x_max=config.scan)
    tools = num_tool_steps(rollout.tree.steps(leaf))
    found = await search(ExtraBudget(rollout, config.scan * (tools + 1)), leaf, bel)
    if found.critical is None:
        return None
    return rollout.tree.path(leaf).index(found.critical) + 1
