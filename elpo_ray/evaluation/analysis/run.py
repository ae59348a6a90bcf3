"""An analysis over all problems of its tasks: examine what is missing, then sum up.

Invariant: the records of a finished problem are on disk before the next one is waited for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from elpo_ray.cluster.cluster import Cluster
from elpo_ray.config.measure import AnalysisName, AnalyzeConfig
from elpo_ray.config.task import TaskConfig
from elpo_ray.config.values import plain
from elpo_ray.evaluation.analysis.catalog import SUMMARIZE, AnalyzeJob
from elpo_ray.evaluation.analysis.localization import success_by_anchor
from elpo_ray.evaluation.bench import Bench, ResultFolder
from elpo_ray.evaluation.report import png, write_page
from elpo_ray.runs.atomic import write_whole
from elpo_ray.runs.progress import announce, progress_bar, waiting
from elpo_ray.types import Fault, InfrastructureError

USED = {
    AnalysisName.recovery: ("split", "rollouts", "failures", "completions", "scan", "algorithm"),
    AnalysisName.ranking: ("split", "fresh", "algorithm"),
    AnalysisName.localization: (
        "split", "rollouts", "failures", "xs", "repeats", "budgets", "algorithm"
    ),
}  # fmt: skip
"""The settings that determine an analysis's records."""
NOTES = {
    AnalysisName.recovery: "problems that no rollout solved; recovered: one of the completions "
    "behind the edited step succeeds; sound edits leave a way to succeed, by the task's oracle",
    AnalysisName.ranking: "advantages of siblings against Mean@n of fresh completions; ties of "
    "scores count one half; at the prompt: children of the root",
    AnalysisName.localization: "agree: two searches of one trajectory name the same step; right "
    "and false irrecoverable: by the task's oracle; success rate: the policy's on the problem",
}
Rows = list[dict[str, Any]]


def analyze(config: AnalyzeConfig, tasks: Mapping[str, TaskConfig]) -> Path:
    """Examine, sum up, show; returns the folder of the results.

    Raises ValueError before anything starts, Fault if problems were lost (the rest is kept).
    """
    console, name = Console(), config.analysis
    with waiting(console, "reading the model and the problems"):
        bench = Bench.prepare(config, tasks)
    settings = plain(config)
    used = {key: settings[key] for key in USED[name]}
    if config.check_only:
        counts = ", ".join(f"{len(found)} of {task}" for task, found in bench.problems.items())
        used["algorithm"] = config.algorithm.name
        said = ", ".join(f"{key}={value}" for key, value in used.items())
        console.print(f"{name.value} of {bench.source.path} on {counts}: {said}", soft_wrap=True)
        return Path()
    folder = ResultFolder.of(bench, name.value, {"analysis": used})
    try:
        lost = _examine(bench, folder, config, console)
    except KeyboardInterrupt:
        done = sum(len(folder.records(task).load()) for task in tasks)
        raise folder.interrupted(done, sum(map(len, bench.problems.values())), "problems") from None
    summaries: dict[str, Rows] = {}
    for task in tasks:
        records = [r for line in folder.records(task).load() for r in line["records"]]
        summaries[task] = SUMMARIZE[name](records)
        show(console, f"{name.value} · {task} · {config.model}", summaries[task])
        if name is AnalysisName.localization and (values := success_by_anchor(records)):
            listed = ",".join(f"{value:.3f}" for value in values.values())
            console.print(f"success from sound prefixes of {list(values)} steps: {listed}")
    write_whole(folder.path / "summary.json", json.dumps(summaries, indent=2) + "\n")
    write_page(
        folder.path,
        f"{name.value}: {config.model}",
        {task: table(rows) for task, rows in summaries.items()},
        [NOTES[name]],
        plot(name, summaries),
    )
    console.print(f"everything lies in {folder.path}/", highlight=False, soft_wrap=True)
    if lost:
        raise Fault(
            f"{lost} problems were lost to failing engines or sandboxes and are in no number; run "
            "the same command again"
        )
    return folder.path


def _examine(bench: Bench, folder: ResultFolder, config: AnalyzeConfig, console: Console) -> int:
    """Fill the files; returns how many problems were lost."""
    missing = {}
    for task, problems in bench.problems.items():
        done = {record["problem"] for record in folder.records(task).load()}
        missing[task] = [problem for problem in problems if problem.id not in done]
    if not any(missing.values()):
        return 0
    lost = 0
    with waiting(console, "starting Ray"):
        cluster = Cluster(next(iter(bench.configs.values())), learner=False)
    with cluster:
        console.print(cluster.watched, highlight=False, soft_wrap=True)
        with waiting(console, "starting the engines"):
            rollouts = cluster.rollouts(Path(bench.source.path))
        for task, problems in missing.items():
            rollouts.use(bench.configs[task])
            records = folder.records(task)
            jobs = [
                AnalyzeJob(problem=problem, config=config, width=config.rollouts)
                for problem in problems
            ]
            announce(console, f"examining {task}")
            with progress_bar(console, task, len(jobs), config.progress) as advance:
                stream = rollouts.stream(jobs, lambda _: None)
                for finished, (place, result) in enumerate(stream, start=1):
                    advance(finished)
                    if isinstance(result, InfrastructureError):
                        lost += 1
                    else:
                        records.append({"problem": problems[place].id, "records": result})
    return lost


def show(console: Console, title: str, rows: Rows) -> None:
    """The rows on a terminal."""
    heads, cells = table(rows)
    shown = Table(title=title, box=box.SIMPLE_HEAD, collapse_padding=True)
    for head in heads:
        shown.add_column(head, justify="right")
    for row in cells:
        shown.add_row(*row)
    console.print(shown)
    if not rows:
        console.print("no failed trajectory with a tool call: nothing to examine")


def table(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Headings and cells; numbers with three digits."""
    heads = list(rows[0]) if rows else []
    return heads, [[_cell(row[head]) for head in heads] for row in rows]


def plot(name: AnalysisName, summaries: Mapping[str, Rows]) -> bytes:
    """A PNG with one panel a task."""

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, len(summaries), squeeze=False)[0]
        for axes, (task, rows) in zip(panels, summaries.items(), strict=True):
            PLOTS[name](axes, rows)
            axes.set(title=task, ylim=(0, 1))
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=8)

    return png((5.0 * max(1, len(summaries)), 4.0), draw)


def _plot_recovery(axes: Any, rows: Rows) -> None:
    names = [row["edited step"].replace(" ", "\n") for row in rows]
    errors = [row["standard error"] or 0.0 for row in rows]
    axes.bar(names, [row["recovered"] for row in rows], yerr=errors, capsize=4, label="recovered")


def _plot_ranking(axes: Any, rows: Rows) -> None:
    for shift, key in ((-0.2, "pairwise accuracy"), (0.2, "Kendall τ")):
        places = [place + shift for place in range(len(rows))]
        axes.bar(places, [max(0.0, row[key] or 0.0) for row in rows], width=0.4, label=key)
    axes.set_xticks(range(len(rows)), [row["branching"] for row in rows])


def _plot_localization(axes: Any, rows: Rows) -> None:
    whole = [row for row in rows if row["success rate"] == "all"]
    for key, style in (("agree", "-o"), ("right", "-s"), ("false irrecoverable", "--^")):
        for budget in dict.fromkeys(row["budget"] for row in whole):
            points = [(r["x"], r[key]) for r in whole if r["budget"] == budget]
            known = [(x, y) for x, y in points if y is not None]
            if known:
                axes.plot(*zip(*known, strict=True), style, label=f"{key}, budget {budget}")
    axes.set_xlabel("X, completions a probe")


PLOTS = {
    AnalysisName.recovery: _plot_recovery,
    AnalysisName.ranking: _plot_ranking,
    AnalysisName.localization: _plot_localization,
}


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
