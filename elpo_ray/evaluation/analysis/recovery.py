"""Does a failed trajectory recover once exactly one of its steps is another one (Figure 1)?

Only problems count that the policy does not solve in `rollouts` attempts: their Pass@n is 0. A
step of a failed trajectory is edited: the policy takes it again until the new step differs from
the old one. The trajectory has recovered if Pass@n is 1 now: one of `completions` that go on from
the edited step succeeds. In the paper a judge marks the errors; here an error is a step whose tool
call failed, or any step from the first irrecoverable one on.
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

IRRECOVERABLE = ("1st irrecoverable", "2nd irrecoverable", "3rd irrecoverable")
"""The step that makes the task unreachable, and the two behind it."""
KINDS = ("random error", "first error", *IRRECOVERABLE)


async def examine(
    rollout: TreeRollout, task: Task, problem: Problem, config: AnalyzeConfig
) -> list[Record]:
    """One record a failed trajectory and kind of step that it has; none if the problem was solved
    or not every attempt has a verdict."""
    attempts, failures = rollout.remaining, await sample_failures(rollout, config.failures)
    if failures.success_rate > 0 or failures.graded < attempts:
        return []
    records = []
    for leaf in failures.leaves:
        steps = rollout.tree.steps(leaf)
        first = first_irrecoverable(task, problem, steps)
        if first is None:
            first = await _searched(rollout, leaf, config)
        edited: dict[int, Record] = {}
        for kind, step in chosen_steps(rollout, steps, first).items():
            if step not in edited:
                edited[step] = await _edit(rollout, task, problem, leaf, step, config.completions)
            records.append(
                {
                    "problem": problem.id,
                    "trajectory": leaf,
                    "tool_steps": num_tool_steps(steps),
                    "kind": kind,
                    "step": step,
                    **edited[step],
                }
            )
    return records


def chosen_steps(rollout: TreeRollout, steps: Sequence[Step], first: int | None) -> dict[str, int]:
    """The step of each kind, from 1, as far as the trajectory has one; `first` = the first
    irrecoverable one, None if it is not known."""
    failed_calls = {
        m for m, step in enumerate(steps, 1) if step.result and step.result.kind is not ToolKind.OK
    }
    lost = [] if first is None else list(range(first, len(steps) + 1))
    errors = sorted(failed_calls | set(lost))
    chosen: dict[str, int] = {}
    if errors:
        chosen["random error"] = rollout.random.choice(errors)
        chosen["first error"] = errors[0]
    return chosen | dict(zip(IRRECOVERABLE, lost, strict=False))


def summarize(records: Sequence[Record]) -> list[dict[str, Any]]:
    """A row a kind of step: the share of edited trajectories that recovered with its standard
    error, the mean share of completions that succeeded, and the share that recovered among edits
    that left a way to succeed, where an oracle knows."""
    rows = []
    for kind in KINDS:
        asked = [record for record in records if record["kind"] == kind]
        group = [record for record in asked if record["completions"]]
        if not group:
            continue
        recovered = [float(record["successes"] > 0) for record in group]
        sound = [r for r, record in zip(recovered, group, strict=True) if record["sound"]]
        rows.append(
            {
                "edited step": kind,
                "trajectories": len(group),
                "recovered": fmean(recovered),
                "standard error": stdev(recovered) / sqrt(len(group)) if len(group) > 1 else None,
                "completions that succeed": fmean(
                    record["successes"] / record["completions"] for record in group
                ),
                "sound edits": len(sound) if any(r["sound"] is not None for r in group) else None,
                "recovered after sound edits": fmean(sound) if sound else None,
                "no other step": len(asked) - len(group),
                "mean step": fmean(record["step"] for record in group),
            }
        )
    return rows


async def _edit(
    rollout: TreeRollout, task: Task, problem: Problem, leaf: int, step: int, completions: int
) -> Record:
    """Edit a step and go on from there `completions` times; none if the policy knows no other step
    in so many tries. `sound`: whether the edit left a way to succeed, None without an oracle. The
    completion that brought the new step is the first of those that go on."""
    tree = rollout.tree
    path = [0, *tree.path(leaf)]
    old, before = tree.nodes[path[step]].step, path[step - 1]
    assert old is not None
    extra = ExtraBudget(rollout, completions)
    while extra.remaining:
        edited = await extra.complete(before, anchor=step - 1 or None)
        new = tree.path(edited)[step - 1]
        taken = tree.nodes[new].step
        assert taken is not None
        if taken.turn.token_ids != old.turn.token_ids:
            break
    else:
        return {"completions": 0, "successes": 0, "sound": None}
    leaves = [edited]
    if tree.nodes[new].score is None:  # the trajectory goes on behind it
        more = ExtraBudget(rollout, completions - 1)
        leaves += await sample(more, completions - 1, new, anchor=step)
    outcomes = verdicts(tree, leaves)
    return {
        "completions": len(outcomes),
        "successes": sum(outcomes),
        "sound": task.recoverable(problem, tree.steps(new)),
    }


async def _searched(rollout: TreeRollout, leaf: int, config: AnalyzeConfig) -> int | None:
    """The first irrecoverable step by a search with large probes."""
    bel = replace(config.algorithm.growth.bel, x_min=config.scan, x_max=config.scan)
    tools = num_tool_steps(rollout.tree.steps(leaf))
    found = await search(ExtraBudget(rollout, config.scan * (tools + 1)), leaf, bel)
    if found.critical is None:
        return None
    return rollout.tree.path(leaf).index(found.critical) + 1
