"""Do a method's scores order siblings as fresh rollouts do (Figure 3)?

A tree is grown and credited as in training; at each branching node the advantages of its children
are compared with their Mean@n: the share of successes among n fresh completions from each child.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

from elpo_ray import growth
from elpo_ray.config.measure import AnalyzeConfig
from elpo_ray.credit import assign
from elpo_ray.evaluation.analysis.failures import ExtraBudget, Record, verdicts
from elpo_ray.growth.independent import sample
from elpo_ray.interfaces import Task
from elpo_ray.rollout.worker import TreeRollout
from elpo_ray.types import Problem


async def examine(
    rollout: TreeRollout, task: Task, problem: Problem, config: AnalyzeConfig
) -> list[Record]:
    """One record a branching node, the prompt included."""
    tree = rollout.tree
    settings = config.algorithm.growth
    await growth.grow(rollout, settings)
    [credit] = assign([tree], config.algorithm)
    branchings = [(n.id, list(n.children)) for n in tree.nodes if len(n.children) > 1]
    records = []
    for node, children in branchings:
        found = [await _fresh_mean(rollout, child, config.fresh) for child in children]
        judged = [(c, mean) for c, mean in zip(children, found, strict=True) if mean is not None]
        records.append(
            {
                "problem": problem.id,
                "node": node,
                "depth": len(tree.path(node)),
                "scores": [float(credit.advantage[child]) for child, _ in judged],
                "means": [mean for _, mean in judged],
            }
        )
    return records


def summarize(records: Sequence[Record]) -> list[dict[str, Any]]:
    """A row for branchings at the prompt, one for those inside, one for all."""
    rows = []
    groups = {
        "prompt": [r for r in records if r["depth"] == 0],
        "inside": [r for r in records if r["depth"] > 0],
        "all": list(records),
    }
    for where, group in groups.items():
        accuracies = [a for r in group if (a := pairwise(r["scores"], r["means"])) is not None]
        taus = [t for r in group if (t := kendall(r["scores"], r["means"])) is not None]
        if group:
            rows.append(
                {
                    "branching": where,
                    "nodes": len(group),
                    "with a true order": len(accuracies),
                    "pairwise accuracy": fmean(accuracies) if accuracies else None,
                    "Kendall τ": fmean(taus) if taus else None,
                }
            )
    return rows


def pairwise(scores: Sequence[float], means: Sequence[float]) -> float | None:
    """Share of the pairs with different means that the scores order alike, a tie of scores counting
    one half; None if all means are equal."""
    pairs = [(i, j) for i, j in combinations(range(len(means)), 2) if means[i] != means[j]]
    if not pairs:
        return None
    return fmean(
        0.5 if scores[i] == scores[j] else float((scores[i] < scores[j]) == (means[i] < means[j]))
        for i, j in pairs
    )


def kendall(scores: Sequence[float], means: Sequence[float]) -> float | None:
    """Kendall's τ-b. 0 where the scores are all equal, for then they order nothing; None where the
    means are."""
    if len(set(means)) < 2:
        return None
    if len(set(scores)) == 1:
        return 0.0
    from scipy import stats  # half a second to import

    return float(stats.kendalltau(scores, means).statistic)


async def _fresh_mean(rollout: TreeRollout, node: int, completions: int) -> float | None:
    """Mean@n of a node; a finished trajectory's is its own outcome. None if nothing was graded."""
    tree, leaves = rollout.tree, [node]
    if tree.nodes[node].score is None:
        extra, anchor = ExtraBudget(rollout, completions), len(tree.path(node))
        leaves = await sample(extra, completions, node, anchor=anchor)
    outcomes = verdicts(tree, leaves)
    return fmean(outcomes) if outcomes else None
