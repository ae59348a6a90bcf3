"""A study's report: numbers as JSON, tables as Markdown, curves as SVG."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from elpo_ray.runs.atomic import write_whole
from elpo_ray.study.figures import (
    Curve,
    Estimate,
    area,
    common_budget,
    curve,
    difference,
    estimate,
    value_at,
)
from elpo_ray.study.plan import Study
from elpo_ray.study.record import AXES, Record

Records = Mapping[str, Sequence[Record]]
"""The records of one task by arm."""
LABELS = {
    "leaves": "completed trajectories",
    "tokens": "decoded tokens",
    "seconds": "seconds of training",
}
Numbers = dict[int, float]
"""One value a seed."""


def by_task(study: Study, records: Sequence[Record]) -> dict[str, dict[str, list[Record]]]:
    """Records by task and arm, in the order of the study's file."""
    found: dict[str, dict[str, list[Record]]] = {}
    for cell in study.cells:
        found.setdefault(cell.task, {}).setdefault(cell.arm, [])
    for record in records:
        found[record.task][record.arm].append(record)
    return found


def numbers(study: Study, records: Sequence[Record]) -> dict[str, Any]:
    """Everything that the report says, as JSON data."""
    tasks = {task: _task(arms, study.baseline) for task, arms in by_task(study, records).items()}
    return {"study": study.name, "baseline": study.baseline, "tasks": tasks}


def _task(arms: Records, baseline: str | None) -> dict[str, Any]:
    budgets = _budgets([record for records in arms.values() for record in records])
    measures = _measures(budgets)
    values = {
        arm: {name: _values(records, measure) for name, measure in measures.items()}
        for arm, records in arms.items()
    }
    rows = {
        arm: {
            "seeds": sorted(record.seed for record in arms[arm]),
            **{name: _json(estimate(list(seeds.values()))) for name, seeds in row.items()},
            **_sampled(arms[arm]),
            "less_baseline": {}
            if baseline is None or arm == baseline
            else _less(arms[arm], arms.get(baseline, ())),
        }
        for arm, row in values.items()
    }
    return {"common_budgets": budgets, "arms": rows}


def _less(records: Sequence[Record], baseline: Sequence[Record]) -> dict[str, Any]:
    """Differences from the baseline, paired by seed, at the largest budgets that both reached: an
    arm that spends less than these two does not cut their comparison short."""
    measures = _measures(_budgets([*records, *baseline]))
    return {
        name: _json(difference(_values(records, measures[name]), _values(baseline, measures[name])))
        for name in COMPARED
    }


def _budgets(records: Sequence[Record]) -> dict[str, float | None]:
    """The largest budget that all of these runs reached, on each axis."""
    return {axis: common_budget([curve(record, axis) for record in records]) for axis in AXES}


def _sampled(records: Sequence[Record]) -> dict[str, Any]:
    """Pass@K and Major@K by K, where models were sampled and the task has them."""
    found: dict[str, Any] = {}
    for name in ("pass_at_k", "major_at_k"):
        tables = [(record.samples or {}).get(name) or {} for record in records]
        ks = sorted({k for table in tables for k in table}, key=int)
        values = {k: [table[k] for table in tables if table.get(k) is not None] for k in ks}
        found[name] = {k: _json(estimate(each)) for k, each in values.items() if each}
    return found


Measure = Callable[[Record], float | None]
COMPARED = ("after", "area_leaves", "area_tokens", "area_seconds", "at_leaves", "at_tokens",
            "at_seconds")  # fmt: skip
"""Measures whose difference from the baseline is given."""


def _measures(budgets: Mapping[str, float | None]) -> dict[str, Measure]:
    """What a run is measured by. `at_*`: held-out pass@1 at the budget; `area_*`: its mean until
    there."""

    def on(axis: str, how: Callable[[Curve, float], float | None]) -> Measure:
        budget = budgets[axis]
        return lambda r: None if budget is None else how(curve(r, axis), budget)

    measures: dict[str, Measure] = {
        "before": lambda r: r.summary.get("pass_at_1_before"),
        "after": lambda r: r.summary.get("pass_at_1_after"),
    }
    for axis in AXES:
        measures[f"at_{axis}"] = on(axis, value_at)
        measures[f"area_{axis}"] = on(axis, area)
    return measures | {
        "localization_accuracy": lambda r: r.summary.get("localization_accuracy"),
        "tool_calls": tool_calls,
        "leaves": lambda r: _last_of(curve(r, "leaves")),
        "tokens": lambda r: _last_of(curve(r, "tokens")),
        "seconds": lambda r: _last_of(curve(r, "seconds")),
    }


def tool_calls(record: Record) -> float | None:
    """Tool calls of a trajectory, the mean over the last steps: its turns but for the answer."""
    turns = record.last("turns_per_rollout")
    return None if turns is None else turns - 1


def _last_of(points: Curve) -> float | None:
    return points[-1][0] if points else None


def _values(records: Sequence[Record], measure: Measure) -> Numbers:
    found = {record.seed: measure(record) for record in records}
    return {seed: value for seed, value in found.items() if value is not None}


def _json(found: Estimate | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)


# --- Markdown ---


def markdown(report: Mapping[str, Any], missing: Sequence[str]) -> str:
    """The report as text with one table a task."""
    baseline = report["baseline"]
    lines = [f"# {report['study']}", ""]
    lines += [
        "Held-out pass@1 in percent: the mean over seeds ± half of the 95 % t interval over seeds.",
        "*Area* is the mean pass@1 up to the largest budget that all runs of the task reached;",
        "*at equal tokens* and *at equal seconds* are pass@1 at that budget.",
        "",
    ]
    if baseline is not None:
        lines += [
            f"*Less {baseline}* is the difference paired by seed; at equal tokens: at the largest",
            f"number of them that all runs of the arm and of {baseline} reached.",
            "",
        ]
    if missing:
        lines += [f"Not finished: {', '.join(missing)}.", ""]
    for task, part in report["tasks"].items():
        budgets = [
            f"{part['common_budgets'][axis]:,.0f} {label}"
            for axis, label in LABELS.items()
            if part["common_budgets"][axis] is not None
        ]
        lines += [f"## {task}", "", *_table(part, baseline), ""]
        lines += _k_table(part)
        if budgets:
            lines += [f"Reached by all runs: {', '.join(budgets)}.", ""]
        lines += [f"![Held-out pass@1 of {task}]({task}.svg)", ""]
    return "\n".join(lines)


def _table(part: Mapping[str, Any], baseline: str | None) -> list[str]:
    heads = ["arm", "seeds", "before", "after"]
    if baseline is not None:
        heads.append(f"less {baseline}")
    heads += ["area, leaves", "at equal tokens"]
    if baseline is not None:
        heads.append(f"less {baseline}")
    heads += ["at equal seconds", "localized", "tool calls", "tokens", "seconds"]
    rows = []
    for arm, row in part["arms"].items():
        apart = row["less_baseline"]
        cells = [arm, str(len(row["seeds"])), percent(row["before"]), percent(row["after"])]
        if baseline is not None:
            cells.append(percent(apart.get("after"), sign=True))
        cells += [percent(row["area_leaves"]), percent(row["at_tokens"])]
        if baseline is not None:
            cells.append(percent(apart.get("at_tokens"), sign=True))
        cells += [percent(row["at_seconds"]), percent(row["localization_accuracy"])]
        cells += [amount(row["tool_calls"], 2), amount(row["tokens"]), amount(row["seconds"])]
        rows.append(cells)
    table = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in table]


def _k_table(part: Mapping[str, Any]) -> list[str]:
    """Pass@K and Major@K, if any arm has them."""
    columns = {
        (name, k): f"{label}@{k}"
        for name, label in (("pass_at_k", "Pass"), ("major_at_k", "Major"))
        for k in sorted({k for row in part["arms"].values() for k in row[name]}, key=int)
    }
    if not columns:
        return []
    rows = [
        [arm, *(percent(row[name].get(k)) for name, k in columns)]
        for arm, row in part["arms"].items()
    ]
    table = [["arm", *columns.values()], ["---"] * (1 + len(columns)), *rows]
    return [*("| " + " | ".join(cells) + " |" for cells in table), ""]


def percent(found: Mapping[str, Any] | None, *, sign: bool = False) -> str:
    """A mean and its interval in percent, `sign`: with its sign; a dash for nothing."""
    if found is None:
        return "–"
    text = f"{100 * found['mean']:+.1f}" if sign else f"{100 * found['mean']:.1f}"
    return text if found["half"] is None else f"{text} ± {100 * found['half']:.1f}"


def amount(found: Mapping[str, Any] | None, digits: int = 0) -> str:
    """A mean as a number; a dash for nothing."""
    return "–" if found is None else f"{found['mean']:,.{digits}f}"


# --- curves ---


def picture(arms: Records, path: Path) -> None:
    """Held-out pass@1 against each axis, an SVG: the mean over seeds, and its 95 % interval."""
    from matplotlib import rc_context  # a second to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    panels = figure.subplots(1, len(AXES), sharey=True)
    for axes, (axis, label) in zip(panels, LABELS.items(), strict=True):
        for place, (arm, records) in enumerate(arms.items()):
            curves = [curve(record, axis) for record in records if len(record.held_out) > 1]
            if curves:
                _draw(axes, curves, arm, f"C{place % 10}", ("-", ":", "--")[place // 10 % 3])
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("held-out pass@1")
    if panels[0].lines:
        panels[0].legend(fontsize=8)
    # The same figures give the same file.
    with rc_context({"svg.hashsalt": "elpo_ray"}):
        figure.savefig(path, metadata={"Date": None})


def _draw(axes: Any, curves: Sequence[Curve], label: str, color: str, style: str) -> None:
    end = common_budget(curves)
    assert end is not None, "a curve has points"
    ticks = sorted({min(x, end) for points in curves for x, _ in points})
    found = []
    for tick in ticks:
        values = [y for points in curves if (y := value_at(points, tick)) is not None]
        found.append(estimate(values))
    known = [(tick, each) for tick, each in zip(ticks, found, strict=True) if each is not None]
    axes.plot([x for x, _ in known], [e.mean for _, e in known], style, color=color, label=label)
    low = [e.mean - (e.half or 0.0) for _, e in known]
    high = [e.mean + (e.half or 0.0) for _, e in known]
    axes.fill_between([x for x, _ in known], low, high, color=color, alpha=0.15, linewidth=0)


def write(study: Study, records: Sequence[Record], missing: Sequence[str], folder: Path) -> Path:
    """Write `report.md`, `report.json` and one SVG a task; returns the first."""
    folder.mkdir(parents=True, exist_ok=True)
    found = numbers(study, records)
    write_whole(
        folder / "report.json", json.dumps(found | {"missing": list(missing)}, indent=1) + "\n"
    )
    for task, arms in by_task(study, records).items():
        picture(arms, folder / f"{task}.svg")
    write_whole(folder / "report.md", markdown(found, missing))
    return folder / "report.md"
