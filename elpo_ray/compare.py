"""`python -m elpo_ray.compare RUN RUN...`: what differs between runs, what each of them reached,
and their curves over steps, rollouts, tokens or seconds, as tables and as one page. Folders of
`elpo evaluate` are compared by `evaluation.comparison`.

Runs seldom spend the same. Every axis has a common budget, the largest value that all runs reached;
figures are given at the end of each run and, apart, up to that budget. A step's metrics are noisy,
so a figure is the mean over the last `WINDOW` steps. Exit codes: 0 done; 2 a mistake in the call or
a folder that holds no run, one line on stderr.
"""

from __future__ import annotations

import base64
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from elpo_ray.config.arguments import Parser
from elpo_ray.config.values import flattened
from elpo_ray.evaluation.comparison import compare_evaluations, is_evaluation, short_names
from elpo_ray.runs.atomic import write_whole
from elpo_ray.runs.log import Notice, held_out, read_columns
from elpo_ray.view.book import compact, deflate, grouped
from elpo_ray.view.folder import check_run, read_settings, read_summary
from elpo_ray.view.page import assemble

SCRIPTS = ("dom.js", "theme.js", "data.js", "charts.js", "compare.js")
PAGE = "compare.html"
MOST_RUNS = 6
"""There are not more line styles that people can distinguish."""
WINDOW = 5
AXES = {
    "steps": ("step", ""),
    "rollouts": ("total/leaves", "rollouts"),
    "tokens": ("total/tokens_generated", "tokens_generated"),
    "seconds": ("total/train_seconds", ""),
}
"""Name -> (metric, the metric of one step whose running sum it is where a log does not have it)."""
FIGURES = ("reward", "pass_at_1", "localization_accuracy", "searches", "critical_found",
           "critical_depth", "entropy_root", "entropy_tool", "turns_per_rollout",
           "clip_low_inside", "clip_low_outside", "grad_norm", "mismatch_k3",
           "tokens_per_second", "seconds/grow", "seconds/update")  # fmt: skip
"""Metrics of the table, of those that any run has."""
SUMMARY = ("pass_at_1_before", "pass_at_1_after", "localization_accuracy", "steps", "inputs",
           "rollouts", "tokens_generated", "wall_seconds")  # fmt: skip
COMPARABLE = ("task.name", "task.eval_file", "task.eval_problems")
"""Held-out pass@1 means the same only if these agree."""
IGNORED = ("trainer.run_name", "trainer.run_dir", "trainer.resume", "trainer.fork", "logging.")
"""Settings whose difference says nothing about a result."""
Column = list[float | None]


@dataclass
class Run:
    """One run's part of the comparison."""

    name: str
    path: Path
    settings: dict[str, Any]
    """The settings by dotted key."""
    summary: dict[str, Any]
    finished: bool
    metrics: dict[str, Column]
    notices: list[Notice]
    axes: dict[str, Column] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Run:
        """Raises ValueError if `path` is no run folder."""
        check_run(path)
        settings, summary = read_settings(path), read_summary(path)
        metrics, notices = read_columns(path)
        run = cls(
            name=path.resolve().name,
            path=path,
            settings=flattened(settings.values),
            summary=summary or {},
            finished=summary is not None,
            metrics=metrics,
            notices=[*settings.notices, *notices],
        )
        run.axes = {name: run._axis(*keys) for name, keys in AXES.items()}
        return run

    def _axis(self, key: str, part: str) -> Column:
        if key in self.metrics:
            return self.metrics[key]
        total, sums = 0.0, list[float | None]()
        for value in self.metrics.get(part, []):
            total += value or 0.0
            sums.append(total)
        return sums

    def reached(self, axis: str) -> float | None:
        """The largest value on `axis`; None if the run has none."""
        return max((x for x in self.axes[axis] if x is not None), default=None)

    def figure(self, metric: str, axis: str, budget: float) -> float | None:
        """Mean of the last `WINDOW` values of a metric up to `budget` on `axis`."""
        pairs = zip(self.axes[axis], self.metrics.get(metric, []), strict=False)
        values = [y for x, y in pairs if x is not None and x <= budget and y is not None]
        last = values[-WINDOW:]
        return math.fsum(last) / len(last) if last else None


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs, one value a run; "" where a run has no such."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    shown = [key for key in keys if not key.startswith(IGNORED)]
    rows = {key: [run.settings.get(key, "") for run in runs] for key in shown}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}


def common_budgets(runs: Sequence[Run]) -> dict[str, float | None]:
    """For each axis, the largest value that every run reached; None if a run has no such axis."""
    common = {}
    for axis in AXES:
        ends = [run.reached(axis) for run in runs]
        common[axis] = None if None in ends else min(end for end in ends if end is not None)
    return common


def warnings(runs: Sequence[Run]) -> list[Notice]:
    """What keeps figures of these runs from being compared as they stand."""
    found = []
    for axis in AXES:
        ends = [run.reached(axis) for run in runs]
        known = [end for end in ends if end is not None]
        if len(known) == len(runs) and max(known) > 1.02 * min(known):
            where = ", ".join(f"{run.name} {end:,.0f}" for run, end in zip(runs, ends, strict=True))
            found.append(Notice(f"the budgets differ in {axis}", where))
    for key in COMPARABLE:
        values = [run.settings.get(key) for run in runs]
        if any(value != values[0] for value in values):
            text = f"{key} differs: held-out pass@1 is not measured on the same problems"
            found.append(Notice(text, ", ".join(str(value) for value in values)))
    for run in runs:
        if not run.finished:
            found.append(Notice("a run has not ended: no summary.json", run.name))
    return found


def standard_error(run: Run, key: str) -> float | None:
    """An upper bound for that of a held-out pass@1 over its problems: sqrt(p (1 - p) / problems).
    None for another figure."""
    value, problems = run.summary.get(key), run.summary.get("eval_problems")
    if not key.startswith("pass_at_1") or not isinstance(value, float):
        return None
    return math.sqrt(value * (1 - value) / problems) if problems else None


def compared(runs: Sequence[Run]) -> dict[str, Any]:
    """The page's data."""
    notices = [*warnings(runs), *(notice for run in runs for notice in run.notices)]
    summary = {
        key: [run.summary.get(key) for run in runs]
        for key in SUMMARY
        if any(run.summary.get(key) is not None for run in runs)
    }
    return {
        "runs": [
            {
                "name": run.name,
                "path": str(run.path),
                "algorithm": run.settings.get("algorithm.name"),
                "seed": run.settings.get("trainer.seed"),
                "finished": run.finished,
                "metrics": run.metrics,
                "axes": run.axes,
            }
            for run in runs
        ],
        "differences": {k: [str(v) for v in row] for k, row in differences(runs).items()},
        "summary": summary,
        "held_out": curve_ends(runs),
        "errors": {key: [standard_error(run, key) for run in runs] for key in summary},
        "figures": [key for key in FIGURES if any(key in run.metrics for run in runs)],
        "common": common_budgets(runs),
        "window": WINDOW,
        "notices": grouped(notices),
    }


def show(console: Console, runs: Sequence[Run]) -> None:
    """The tables on a terminal."""
    names = [run.name for run in runs]
    changed = Table("setting", *names, title="configuration")
    for key, row in differences(runs).items():
        changed.add_row(key, *map(str, row))
    console.print(changed if changed.row_count else "the configurations are the same")
    ends = Table("summary", *names)
    for key in SUMMARY:
        values = [run.summary.get(key) for run in runs]
        if any(value is not None for value in values):
            cells = [cell(v, standard_error(run, key)) for v, run in zip(values, runs, strict=True)]
            ends.add_row(key, *cells)
    console.print(ends)
    curves = Table("held-out pass@1", *names, title="with its 95 % interval over problems")
    for name, row in curve_ends(runs).items():
        curves.add_row(name, *row)
    if curves.row_count:
        console.print(curves)
    budget = common_budgets(runs)["rollouts"]
    title = f"training, mean of the last {WINDOW} steps"
    if budget is not None:
        title += f"; in brackets: up to {budget:,.0f} rollouts, which all runs reached"
    table = Table("metric", *names, title=title)
    for key in FIGURES:
        if any(key in run.metrics for run in runs):
            cells = []
            for run in runs:
                last = cell(run.figure(key, "steps", math.inf))
                at = "" if budget is None else f" ({cell(run.figure(key, 'rollouts', budget))})"
                cells.append(last + at)
            table.add_row(key, *cells)
    console.print(table)
    for notice in warnings(runs):
        console.print(f"note: {notice.text} ({notice.where})", highlight=False, soft_wrap=True)


def cell(value: Any, error: float | None = None) -> str:
    """A value as a table shows it, with its standard error."""
    if value is None:
        return "-"
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value)
    text = f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"
    return text if error is None else f"{text} ± {error:.2g}"


def curve_ends(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Held-out pass@1 of each run's first and last evaluation while it trained, with the step and
    the 95 % interval: of all problems and, where there are several, of each benchmark."""
    curves = [held_out(run.metrics) for run in runs]
    rows = {}
    for name in dict.fromkeys(name for found in curves for name in found):
        for place, end in ((0, "first"), (-1, "last")):
            points = [found[name][place] if found.get(name) else None for found in curves]
            rows[f"{name or 'all problems'}, {end}"] = [
                "-"
                if p is None
                else f"{p.pass_at_1:.1%} ({100 * p.low:.1f} to {100 * p.high:.1f}), step {p.step}"
                for p in points
            ]
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = Parser("compare", "Runs, or evaluations, beside each other: figures and curves.")
    parser.add_argument(
        "runs",
        metavar="RUN",
        type=Path,
        nargs="+",
        help=f"2 to {MOST_RUNS} run folders, or folders of elpo evaluate",
    )
    parser.add_argument(
        "--out", type=Path, default=Path(PAGE), metavar="FILE", help=f"page ({PAGE})"
    )
    arguments = parser.parse_args(argv)
    if not 2 <= len(arguments.runs) <= MOST_RUNS:
        parser.error(f"{len(arguments.runs)} runs: name 2 to {MOST_RUNS}")
    return parser.run(lambda: compare(arguments.runs, arguments.out))


def compare(paths: Sequence[Path], out: Path) -> None:
    """Write the page, print the tables. Raises ValueError if a path is no run folder or
    `out` cannot be written."""
    if any(map(is_evaluation, paths)):
        return compare_evaluations(paths, out, Console())
    runs = [Run.read(path) for path in paths]
    for run, name in zip(runs, short_names([str(run.path.resolve()) for run in runs]), strict=True):
        run.name = name
    data = base64.b64encode(deflate(compact(compared(runs)))).decode()
    title = " / ".join(run.name for run in runs)
    script = f'<script type="text/plain" id="overview">{data}</script>'
    page = assemble(f"{title} · elpo_ray", SCRIPTS, script)
    try:
        write_whole(out, page)
    except OSError as error:
        raise ValueError(f"--out {out}: {error.strerror}; name another place") from error
    console = Console()
    show(console, runs)
    console.print(f"curves: {out}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
