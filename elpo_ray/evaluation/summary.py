"""The numbers of a task from the records of its samples, and nothing else."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from elpo_ray.evaluation.estimators import average, major_at_k, pass_at_k
from elpo_ray.rollout.sample import Sample

Estimate = Callable[[Sequence[Sample], int], float]
"""(graded samples of one problem, K) -> the problem's share in Pass@K or Major@K."""
UNGRADED, RIGHT, WRONG, SILENT = "ungraded", "right", "wrong", "no answer"
"""How a sample can end beside the limits of `EndReason`."""


def by_problem(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """Samples of each problem, in the order of their index."""
    groups: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample in sorted(samples, key=lambda sample: sample.index):
        groups[sample.problem].append(sample)
    return dict(groups)


def mean_success(samples: Iterable[Sample]) -> float:
    """avg@n: the mean over problems of the share of successes among their graded samples; 0 where
    nothing was graded."""
    outcomes = outcomes_of(samples)
    return average(outcomes).mean if outcomes else 0.0


def outcomes_of(samples: Iterable[Sample]) -> list[list[bool]]:
    """Whether each graded sample succeeded, by problem; problems without one are left out."""
    graded = ([s.success for s in g if s.graded] for g in by_problem(samples).values())
    return [outcomes for outcomes in graded if outcomes]


def summarize(samples: Sequence[Sample], ks: Sequence[int]) -> dict[str, Any]:
    """All numbers of one task. Rates are fractions; what nothing could be said of is None.

    A problem with fewer than K graded samples is left out of Pass@K and Major@K, and counted.
    """
    groups, votes = by_problem(samples), _votes(samples)
    graded = {problem: [s for s in group if s.graded] for problem, group in groups.items()}
    outcomes = outcomes_of(samples)
    return {
        "problems": len(groups),
        "samples": len(samples),
        "ungraded": sum(not sample.graded for sample in samples),
        "avg": asdict(average(outcomes)) if outcomes else None,
        "pass_at_k": {str(k): _mean_at(graded, k, _pass) for k in ks},
        "major_at_k": {str(k): _mean_at(graded, k, _major) for k in ks} if votes else None,
        "problems_short_of_k": {str(k): sum(len(g) < k for g in graded.values()) for k in ks},
        "per_sample": {
            "turns": _mean(samples, "turns"),
            "tool_calls": _mean(samples, "tool_calls"),
            "tokens": _mean(samples, "tokens"),
            "observation_tokens": _mean(samples, "observation_tokens"),
            "tool_seconds": _mean(samples, "tool_seconds"),
        },
        "outcomes": _outcome_counts(samples, votes),
        "tool_results": dict(_tool_kinds(samples).most_common()),
    }


def per_problem(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """One row a problem: what it cost and how often it was solved."""
    rows, votes = [], _votes(samples)
    for problem, group in by_problem(samples).items():
        graded = [sample.success for sample in group if sample.graded]
        rows.append(
            {
                "problem": problem,
                "samples": len(group),
                "graded": len(graded),
                "successes": sum(graded),
                "avg": fmean(graded) if graded else None,
                "tool_calls": _mean(group, "tool_calls"),
                "tokens": _mean(group, "tokens"),
                "outcomes": _outcome_counts(group, votes),
                "tool_results": dict(_tool_kinds(group).most_common()),
            }
        )
    return rows


def sample_outcome(sample: Sample, votes: bool) -> str:
    """One word: right, wrong, no answer, ungraded, or the limit that was met. `votes`: the task
    has answers to vote on, so that a sample without one has given none."""
    if not sample.graded:
        return UNGRADED
    if sample.success:
        return RIGHT
    if not sample.answered:
        return sample.end.replace("_", " ")
    return SILENT if votes and sample.answer is None else WRONG


def _votes(samples: Iterable[Sample]) -> bool:
    return any(sample.answer is not None for sample in samples)


def _outcome_counts(samples: Iterable[Sample], votes: bool) -> dict[str, int]:
    return dict(Counter(sample_outcome(sample, votes) for sample in samples).most_common())


def _pass(group: Sequence[Sample], k: int) -> float:
    return pass_at_k(len(group), sum(sample.success for sample in group), k)


def _major(group: Sequence[Sample], k: int) -> float:
    return major_at_k([(sample.answer, sample.success) for sample in group], k)


def _mean_at(groups: Mapping[str, Sequence[Sample]], k: int, estimate: Estimate) -> float | None:
    values = [estimate(group, k) for group in groups.values() if len(group) >= k]
    return fmean(values) if values else None


def _mean(samples: Sequence[Sample], field: str) -> float | None:
    return fmean(getattr(sample, field) for sample in samples) if samples else None


def _tool_kinds(samples: Iterable[Sample]) -> Counter[str]:
    kinds: Counter[str] = Counter()
    for sample in samples:
        kinds.update(sample.tool_kinds)
    return kinds
