"""Do a method's scores order siblings as fresh rollouts do (Figure 3)?

A tree is grown and credited as in training; at each branching node the advantages of its children
are compared with their Mean@n: the share of successes among n fresh completions from each child.
Siblings with the same tokens are one sibling: their order would be that of chance.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

from elpo_ray import growth
from elpo_ray.config.measure import AnalyzeConfig
from elpo_ray.credit import assign
from elpo_ray.credit.parts import any_leaf
from elpo_ray.evaluation.analysis.failures import ExtraBudget, Record, verdicts
from elpo_ray.growth.independent import sample
from elpo_ray.interfaces import Task
from elpo_ray.rollout.worker import TreeRollout
from elpo_ray.tree import RolloutTree
from elpo_ray.types import Problem


async def examine(
    rollout: TreeRollout, task: Task, problem: Problem, config: AnalyzeConfig
) -> list[Record]:
    """One record a branching node, the prompt included."""
    tree = rollout.tree
    settings = config.algorithm.growth
    await growth.grow(rollout, settings)
    [credit] = assign([tree], config.algorithm)
    branchings = [(n.id, siblings(tree, n.id)) for n in tree.nodes]
    records = []
    for node, children in branchings:
        if len(children) < 2:
            continue
        found = [await _fresh_mean(rollout, child, config.fresh) for child in children]
        judged = [(c, mean) for c, mean in zip(children, found, strict=True) if mean is not None]
        records.append(
            {
                "problem": problem.id,
                "node": node,
                "depth": len(tree.path(node)),
                "scores": [
                    fmean(float(credit.advantage[child]) for child in same) for same, _ in judged
                ],
                "means": [mean for _, mean in judged],
            }
        )
    return records


def siblings(tree: RolloutTree, node: int) -> list[list[int]]:
    """The children of a node that lead to a verdict; those with the same tokens, action and
    observation, stand together."""
    graded = any_leaf(tree, lambda score: score.graded)
    groups: defaultdict[tuple[Any, Any], list[int]] = defaultdict(list)
    for child in filter(graded.__getitem__, tree.nodes[node].children):
        step = tree.nodes[child].step
        assert step is not None, "a grown node has its tokens"
        groups[step.turn.token_ids, step.observation_ids].append(child)
    return list(groups.values())


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


async def _fresh_mean(rollout: TreeRollout, same: Sequence[int], completions: int) -> float | None:
    """Mean@n of a sibling, from one of its nodes; a finished trajectory's is its own outcome. None
    if nothing was graded."""
    tree, leaves = rollout.tree, list(same)
    open_nodes = [node for node in same if tree.nodes[node].score is None]
    if open_nodes:
        extra, anchor = ExtraBudget(rollout, completions), len(tree.path(open_nodes[0]))
        leaves = await sample(extra, completions, open_nodes[0], anchor=anchor)
    outcomes = verdicts(tree, leaves)
    return fmean(outcomes) if outcomes else None
