"""The held-out evaluations of a training run: which problems, and the numbers of `metrics.jsonl`.

A problem's `extra["benchmark"]` names the set that it belongs to. Where the problems belong to
several sets, each of them has a curve of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain, zip_longest
from statistics import fmean

from elpo_ray.evaluation.estimators import average
from elpo_ray.evaluation.summary import outcomes_of
from elpo_ray.rollout.sample import Sample
from elpo_ray.runs.log import HELD_OUT
from elpo_ray.types import BENCHMARK, Problem, Values


def part_of(problems: Sequence[Problem], count: int | None) -> list[Problem]:
    """`count` of the problems, or all: the first ones of each benchmark, as evenly as possible, in
    their order. The same every time, so that evaluations can be compared."""
    if count is None or count >= len(problems):
        return list(problems)
    places: dict[str, list[int]] = {}
    for place, problem in enumerate(problems):
        places.setdefault(_benchmark(problem), []).append(place)
    in_turn = chain.from_iterable(zip_longest(*places.values()))
    chosen = [place for place in in_turn if place is not None][:count]
    return [problems[place] for place in sorted(chosen)]


def held_out_values(problems: Sequence[Problem], samples: Sequence[Sample]) -> Values:
    """pass@1 with its 95 % interval over problems and what a sample took, of all problems and of
    each benchmark, by their names in `metrics.jsonl` (docs/metrics.md). Nothing is said of problems
    without a verdict."""
    of = {problem.id: _benchmark(problem) for problem in problems}
    names = list(dict.fromkeys(of.values()))
    values = _numbers("eval", samples)
    if len(names) > 1:
        for name in names:
            own = [sample for sample in samples if of[sample.problem] == name]
            values |= _numbers("eval/" + re.sub(r"[^\w.-]", "_", name), own)
    return values


def described(values: Values) -> str:
    """The pass@1 of such values as text: that of each benchmark, if there are several."""
    found = {}
    for key in values:
        match = HELD_OUT.fullmatch(key)
        if match is not None:
            low, high = values[f"{key}_low"], values[f"{key}_high"]
            text = f"{values[key]:.1%} ({100 * low:.1f} to {100 * high:.1f})"
            found[match["benchmark"] or ""] = text
    return ", ".join(f"{name} {text}".strip() for name, text in found.items())


def _numbers(prefix: str, samples: Sequence[Sample]) -> Values:
    outcomes = outcomes_of(samples)
    if not outcomes:
        return {}
    found = average(outcomes)
    values = {
        "pass_at_1": found.mean,
        "pass_at_1_low": found.over_problems.low,
        "pass_at_1_high": found.over_problems.high,
        "problems": len(outcomes),
        "ungraded": sum(not sample.graded for sample in samples),
        "tool_calls": fmean(sample.tool_calls for sample in samples),
        "tokens": fmean(sample.tokens for sample in samples),
    }
    return {f"{prefix}/{name}": float(value) for name, value in values.items()}


def _benchmark(problem: Problem) -> str:
    return str(problem.extra.get(BENCHMARK, ""))
