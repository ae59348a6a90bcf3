"""What a run says about itself: one object of numbers a step, sent to every sink.

Sinks: `metrics.jsonl` (everything), the console (one readable row), the trackers.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from elpo_ray.config import Config
from elpo_ray.config.growth import GrowthConfig
from elpo_ray.growth import fair_roots
from elpo_ray.growth.bel import segment_entropy
from elpo_ray.growth.budget import SpendKind, Totals
from elpo_ray.runs.log import LOG, JsonlSink
from elpo_ray.runs.trackers import Sink, sample_trees, trackers
from elpo_ray.scheduling.dynamic_sampling import StepBatch, has_contrast
from elpo_ray.tree import RolloutTree
from elpo_ray.types import Values


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; 0 of nothing, so that a step without searches still has a row."""
    return sum(values) / len(values) if values else 0.0


def tree_metrics(
    trees: Sequence[RolloutTree], growth: GrowthConfig, *, fixed: bool = True
) -> Values:
    """Numbers of one step's trees; `fixed`: every input spent its own budget.

    `pass_at_1` is `fair_pass_at_1` of all of them.
    """
    spent = sum((Totals.of(tree.ledger) for tree in trees), Totals())
    all_scores = [leaf.score for tree in trees for leaf in tree.leaves() if leaf.score]
    scores = [score for score in all_scores if score.graded]
    bel = growth.bel
    searches = [(tree, search) for tree in trees for search in tree.localizations]
    found = [len(t.path(s.critical)) for t, s in searches if s.critical is not None]
    nodes = [(node, step) for tree in trees for node in tree.nodes if (step := node.step)]
    kinds = Counter(step.result.kind.value for _, step in nodes if step.result is not None)
    return {
        "reward": mean([score.reward for score in scores]),
        "pass_at_1": fair_pass_at_1(trees, growth, fixed=fixed),
        "rollouts": spent.rollouts,
        "rollouts_root": spent.roots,
        "rollouts_probe": spent.probes,
        "rollouts_lost": spent.lost,
        "ungraded": len(all_scores) - len(scores),
        "reward_errors": sum(bool(score.error) for score in all_scores),
        "tokens_generated": spent.tokens,
        "tool_seconds": spent.tool_seconds,
        "searches": len(searches),
        "critical_found": len(found),
        "critical_depth": mean(found),
        "entropy_root": mean([segment_entropy(s, bel) for n, s in nodes if n.parent == 0]),
        "entropy_tool": mean([segment_entropy(s, bel) for n, s in nodes if n.parent != 0]),
        "turns_per_rollout": mean([len(t.path(leaf.id)) for t in trees for leaf in t.leaves()]),
        **posterior_metrics(trees),
        **{f"tool/{kind}": count for kind, count in sorted(kinds.items())},
    }


def fair_pass_at_1(
    trees: Sequence[RolloutTree], growth: GrowthConfig, *, fixed: bool = True
) -> float:
    """The mean success of the trajectories that each input begins with (`growth.fair_roots`), every
    input alike. Completions of a chosen prefix are no fair sample of the policy, nor are later
    trajectories from the prompt: a rule that stops sampling them when enough have failed sees too
    many failures."""
    first = [_first_outcomes(tree, fair_roots(growth, fixed=fixed)) for tree in trees]
    return mean([mean(outcomes) for outcomes in first if outcomes])


def posterior_metrics(trees: Sequence[RolloutTree]) -> Values:
    """Numbers of searches by evidence; none where there was no such search."""
    beliefs = [
        (search, search.posterior)
        for tree in trees
        for search in tree.localizations
        if search.posterior is not None
    ]
    if not beliefs:
        return {}
    named = [max(belief.last) for search, belief in beliefs if search.critical is not None]
    alike = [max((known.attempts for known in belief.free), default=0) for _, belief in beliefs]
    a, b = beliefs[0][1].beta
    return {
        "posterior/named": mean(named),
        "posterior/highest": mean([max(belief.last) for _, belief in beliefs]),
        "posterior/probes": mean([len(search.probes) for search, _ in beliefs]),
        "posterior/alike": mean(alike),
        "posterior/beta_mean": a / (a + b),
    }


def probe_prefixes(trees: Sequence[RolloutTree]) -> list[tuple[int, int]]:
    """For each probe, the tokens of the prefix that it began with: all, and those that came from
    the engine's cache."""
    found = []
    for tree in trees:
        for entry in tree.ledger:
            if entry["charged"] and entry["anchor"] is not None:
                path = tree.path(entry["leaf"])
                steps = tree.steps(path[entry["anchor"] - 1])
                first = tree.nodes[path[entry["anchor"]]].step
                cached = first.turn.cached_tokens if first is not None else 0
                found.append((len(tree.prompt_ids) + sum(s.num_tokens for s in steps), cached))
    return found


def rollout_metrics(trees: Sequence[RolloutTree], n_total: int, version: int) -> Values:
    """How the trees of a step came about: stale tokens (older than `version`), cached prefixes, and
    what a shared budget moved between inputs of `n_total` each."""
    tokens = stale = 0
    for tree in trees:
        for node in tree.nodes:
            if node.step is not None:
                turn = node.step.turn
                tokens += len(turn.token_ids)
                stale += len(turn.token_ids) * (turn.weight_version < version)
    prefixes = probe_prefixes(trees)
    cached = sum(cached for _, cached in prefixes)
    spent = [len(tree.leaves()) for tree in trees]
    return {
        "stale_tokens": stale / max(1, tokens),
        "probe_prefix_hit": cached / max(1, sum(length for length, _ in prefixes)),
        "inputs_with_contrast": sum(has_contrast(tree) for tree in trees),
        "budget/handed_over": sum(max(0, n_total - count) for count in spent),
        "budget/inputs_extended": sum(count > n_total for count in spent),
        "budget/unspent": n_total * len(trees) - sum(spent),
    }


def step_metrics(
    batch: StepBatch, growth: GrowthConfig, step: int, *, fixed: bool = True
) -> Values:
    """Numbers of everything that the `step`-th step grew, also what was not trained on; `step`
    counts from 1. `fixed` as in `tree_metrics`. `pass_at_1` is that of the first generation batch:
    dynamic sampling stops once enough inputs have contrast, so that all inputs would be no fair
    sample."""
    trees = batch.trees
    values = tree_metrics(trees, growth, fixed=fixed) | rollout_metrics(
        trees, growth.n_total, step - 1
    )
    return values | {
        "pass_at_1": fair_pass_at_1(batch.fair, growth, fixed=fixed),
        "inputs_grown": len(batch.grown),
        "inputs_trained": len(batch.trained),
        "tokens_per_second": values["tokens_generated"] / max(batch.seconds, 1e-9),
        "seconds_growing": batch.seconds,
        "weight_version": step,
    }


TRAINING_PHASES = ("grow", "credit", "update", "sync")


def comparison_axes(totals: Values) -> Values:
    """The axes over which algorithms are compared, from the run's totals so far: completed
    trajectories, decoded tokens, seconds of training, and seconds of everything (evaluations,
    checkpoints, cold start and the actors' start too)."""
    seconds = {key: value for key, value in totals.items() if key.startswith("seconds/")}
    return {
        "total/leaves": totals.get("rollouts", 0.0),
        "total/tokens_generated": totals.get("tokens_generated", 0.0),
        "total/train_seconds": sum(seconds.get(f"seconds/{p}", 0.0) for p in TRAINING_PHASES),
        "total/wall_seconds": sum(seconds.values()),
    }


def _first_outcomes(tree: RolloutTree, count: int) -> list[float]:
    """Success of the first `count` trajectories from the prompt, of those that have a verdict. The
    ledger has them before all that was asked for later."""
    leaves = [
        entry["leaf"]
        for entry in tree.ledger
        if entry["charged"] and entry["kind"] == SpendKind.ROOT
    ]
    scores = [tree.nodes[leaf].score for leaf in leaves[:count]]
    return [float(score.success) for score in scores if score is not None and score.graded]


class Stopwatch:
    """Seconds by phase since the last lap, as `seconds/PHASE`; `other` is what no phase covered."""

    def __init__(self) -> None:
        self._phases: Values = {}
        self._begun = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            key = f"seconds/{name}"
            self._phases[key] = self._phases.get(key, 0.0) + time.perf_counter() - start

    def lap(self) -> Values:
        """The seconds of every phase; their sum is the wall-clock time of the lap."""
        now = time.perf_counter()
        seconds, whole = self._phases, now - self._begun
        self._phases, self._begun = {}, now
        return seconds | {"seconds/other": whole - sum(seconds.values())}


COLUMNS: dict[str, tuple[str, str]] = {
    "reward": ("reward", "{:7.2f}"),
    "pass@1": ("pass_at_1", "{:6.1%}"),
    "budget": ("rollouts", "{:6.0f}"),
    "critical": ("critical_found", "{:8.0f}"),
    "depth": ("critical_depth", "{:5.2f}"),
    "H root": ("entropy_root", "{:6.3f}"),
    "H tool": ("entropy_tool", "{:6.3f}"),
    "clip in": ("clip_low_inside", "{:7.2%}"),
    "clip out": ("clip_low_outside", "{:8.2%}"),
    "tok/s": ("tokens_per_second", "{:6.0f}"),
    "grow s": ("seconds/grow", "{:6.1f}"),
    "update s": ("seconds/update", "{:8.1f}"),
    "sync s": ("seconds/sync", "{:6.2f}"),
}
"""Console columns: heading -> (metric, format)."""
SUPERVISED_COLUMNS: dict[str, tuple[str, str]] = {
    "loss": ("loss", "{:7.4f}"),
    "grad norm": ("grad_norm", "{:9.3f}"),
    "lr": ("lr", "{:8.2e}"),
    "tokens": ("trained_tokens", "{:9.0f}"),
    "tok/s": ("tokens_per_second", "{:6.0f}"),
    "s": ("learner_seconds", "{:6.1f}"),
}
"""The console columns of supervised training."""


class ConsoleSink:
    """One aligned row a step, the heading again every 20 rows."""

    def __init__(self, console: Console, columns: dict[str, tuple[str, str]]) -> None:
        self._console = console
        self._columns = columns
        self._rows = 0

    def write(self, step: int, values: Values) -> None:
        if not any(key in values for key, _ in self._columns.values()):
            return  # a held-out evaluation, which has a line of its own
        cells = [form.format(values.get(key, 0.0)) for key, form in self._columns.values()]
        widths = [
            max(len(head), len(cell)) for head, cell in zip(self._columns, cells, strict=True)
        ]
        if self._rows % 20 == 0:
            heads = (head.rjust(width) for head, width in zip(self._columns, widths, strict=True))
            self._print("step  " + "  ".join(heads), "bold")
        row = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        self._print(f"{step:4d}  {row}", "")
        self._rows += 1

    def _print(self, line: str, style: str) -> None:
        self._console.print(line, style=style, highlight=False, soft_wrap=True)

    def close(self) -> None: ...


class Metrics:
    """The accumulator: every sink gets the same numbers."""

    def __init__(
        self,
        folder: Path,
        config: Config,
        console: Console,
        columns: dict[str, tuple[str, str]] = COLUMNS,
    ) -> None:
        self._log = JsonlSink(folder / LOG)
        self._trackers = trackers(folder, config)
        self._sinks: list[Sink] = [self._log, ConsoleSink(console, columns), *self._trackers]

    def log(self, step: int, values: dict[str, Any]) -> None:
        numbers = {key: float(value) for key, value in values.items()}
        for sink in self._sinks:
            sink.write(step, numbers)

    def last(self) -> dict[str, Any]:
        """The last row of the log; empty if there is none."""
        return self._log.last()

    def show(self, step: int, trees: Sequence[RolloutTree]) -> None:
        """A few of the step's trees, where people look at a run."""
        samples = sample_trees(trees)
        for tracker in self._trackers if samples else ():
            tracker.show(step, samples)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
