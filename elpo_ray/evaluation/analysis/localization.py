"""Does a search name the same step again, and, where the task has an oracle, the right one?

Every failed trajectory is searched several times at each probe size X and each budget, all else as
in training. A search by evidence has probes of one completion, and here no evidence from the tree.
Invariant: searches of one trajectory share nothing but the trajectory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations, product
from statistics import fmean
from typing import Any

from elpo_ray.config.growth import GrowthRule
from elpo_ray.config.measure import AnalyzeConfig
from elpo_ray.evaluation.analysis.failures import ExtraBudget, Record, sample_failures
from elpo_ray.evaluation.oracle import first_irrecoverable
from elpo_ray.growth import posterior
from elpo_ray.growth.bel import num_tool_steps, search
from elpo_ray.interfaces import Task
from elpo_ray.rollout.worker import TreeRollout
from elpo_ray.types import Problem

STRENGTHS = (0.0, 0.25, 0.5, 1.0)
"""Upper ends of the bins of a policy's success rate on a problem; the first holds 0 alone."""


async def examine(
    rollout: TreeRollout, task: Task, problem: Problem, config: AnalyzeConfig
) -> list[Record]:
    """One record a search; steps count from 1, the answer turn is step K+1."""
    failures = await sample_failures(rollout, config.failures)
    tree, records, growth = rollout.tree, [], config.algorithm.growth
    by_evidence = growth.rule is GrowthRule.posterior
    for leaf in failures.leaves:
        steps = tree.steps(leaf)
        tools = num_tool_steps(steps)
        truth = first_irrecoverable(task, problem, steps)
        budgets: list[int | None] = [*config.budgets] or [None]
        for x, budget in product([1] if by_evidence else config.xs, budgets):
            for repeat in range(config.repeats):
                if by_evidence:
                    extra = ExtraBudget(rollout, budget or growth.posterior.max_probes)
                    found = await posterior.search(extra, leaf, [], growth)
                else:
                    extra = ExtraBudget(rollout, budget or x * (tools + 1))
                    found = await search(extra, leaf, replace(growth.bel, x_min=x, x_max=x))
                named = None if found.critical is None else tree.path(leaf).index(found.critical)
                records.append(
                    {
                        "problem": problem.id,
                        "trajectory": leaf,
                        "success_rate": failures.success_rate,
                        "tool_steps": tools,
                        "truth": truth,
                        "x": x,
                        "budget": budget,
                        "repeat": repeat,
                        "named": None if named is None else named + 1,
                        "interval": list(found.interval),
                        "spent": extra.spent,
                        "probes": [[p.anchor, p.attempts, p.successes] for p in found.probes],
                    }
                )
    return records


def summarize(records: Sequence[Record]) -> list[dict[str, Any]]:
    """A row for each X and budget, over all problems and by the policy's strength on them."""
    rows = []
    groups: defaultdict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in records:
        key = (record["x"], record["budget"])
        groups[(*key, "all")].append(record)
        groups[(*key, strength(record["success_rate"]))].append(record)
    for (x, budget, bin), group in groups.items():
        row = {"x": x, "budget": budget or "free", "success rate": bin, "searches": len(group)}
        rows.append(row | consistency(group) | accuracy(group))
    order = ["all", *(_label(i) for i in range(len(STRENGTHS)))]
    rows.sort(key=lambda row: (order.index(row["success rate"]), row["x"], str(row["budget"])))
    return rows


def consistency(records: Sequence[Record]) -> dict[str, float | None]:
    """How many searches named a step, and how often two of one trajectory named the same one."""
    again: defaultdict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in records:
        again[record["problem"], record["trajectory"], record["x"], record["budget"]].append(record)
    same, apart = [], []
    for group in again.values():
        named = [record["named"] for record in group if record["named"] is not None]
        pairs = list(combinations(named, 2))
        if pairs:
            same.append(fmean(a == b for a, b in pairs))
            apart.append(fmean(abs(a - b) for a, b in pairs))
    return {
        "completions": _mean(record["spent"] for record in records),
        "named": _mean(record["named"] is not None for record in records),
        "agree": _mean(same),
        "steps apart": _mean(apart),
    }


def accuracy(records: Sequence[Record]) -> dict[str, float | None]:
    """Against the oracle; None without one. Right: the named step is the first irrecoverable one.
    False irrecoverable: complete probes of recoverable anchors without a success."""
    judged = [record for record in records if record["truth"] is not None]
    sound = [
        successes
        for record in judged
        for anchor, attempts, successes in record["probes"]
        if anchor < record["truth"] and attempts == record["x"]
    ]
    named = [record for record in judged if record["named"] is not None]
    return {
        "right": _mean(record["named"] == record["truth"] for record in named),
        "false irrecoverable": _mean(successes == 0 for successes in sound),
    }


def success_by_anchor(records: Sequence[Record]) -> dict[int, float]:
    """Chance of success from a recoverable prefix of m steps: what `simulate --values` asks for,
    m = 0 being the policy's success rate. Empty without an oracle."""
    tried: defaultdict[int, list[int]] = defaultdict(lambda: [0, 0])
    rates = {record["problem"]: record["success_rate"] for record in records}
    judged = [record for record in records if record["truth"] is not None]
    for record in judged:
        for anchor, attempts, successes in record["probes"]:
            if anchor < record["truth"]:
                tried[anchor][0] += attempts
                tried[anchor][1] += successes
    found = {anchor: won / attempts for anchor, (attempts, won) in sorted(tried.items())}
    return {0: fmean(rates.values()), **found} if judged else {}


def strength(rate: float) -> str:
    """The bin of a success rate."""
    return _label(next(i for i, end in enumerate(STRENGTHS) if rate <= end))


def _label(place: int) -> str:
    return f"{STRENGTHS[place - 1]:g}–{STRENGTHS[place]:g}" if place else "0"


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return fmean(numbers) if numbers else None
