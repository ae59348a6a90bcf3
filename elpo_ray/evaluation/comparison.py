"""Several models measured on the same tasks: one table and one plot from the folders that
`elpo evaluate` leaves (the paper's Figures 5 and 6)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from elpo_ray.evaluation.report import columns, outcome_lines, page_text, png
from elpo_ray.runs.atomic import write_whole

KIND = "evaluate"
SAME = {
    "sampler": "the sampler differs",
    "sandbox": "the sandbox differs",
}
"""What of a folder's identity should agree, and what is said if it does not."""
NOTE = (
    "avg@n with two 95 % intervals: over problems (other problems of the kind) and over samples "
    "(these problems, other samples). Pass@K and Major@K are means over all subsets of K of the "
    "same samples. – where nothing can be said."
)


@dataclass
class Evaluation:
    """One model's part of the comparison."""

    name: str
    """The end of the model's name, and its folder where two are the same model."""
    path: Path
    identity: dict[str, Any]
    """What determined the samples (`manifest.json`)."""
    summaries: dict[str, dict[str, Any]]
    """Task -> `evaluation.summary.summarize`."""

    @classmethod
    def read(cls, path: Path) -> Evaluation:
        """Raises ValueError if `path` is no finished evaluation."""
        manifest = _json(path / "manifest.json")
        summaries = _json(path / "summary.json")
        kind = (manifest or {}).get("identity", {}).get("kind")
        if manifest is None or kind != KIND:
            what = "not a folder of elpo evaluate" if kind is None else f"a folder of elpo {kind}"
            raise ValueError(f"{path}: {what}; runs are compared with runs, evaluations with them")
        if not summaries:
            raise ValueError(
                f"{path}: no summary.json, so the evaluation has not ended; run its elpo evaluate "
                "command again"
            )
        return cls(str(manifest["model"]), path, manifest["identity"], summaries)


def is_evaluation(path: Path) -> bool:
    """Whether a folder holds what a measuring command left, rather than a run."""
    return (path / "manifest.json").is_file()


def compare_evaluations(paths: Sequence[Path], out: Path, console: Console) -> None:
    """Print the table; write the page `out` with table and plot, and the plot beside it as a PNG.
    Raises ValueError if a folder cannot be read."""
    evaluations = [Evaluation.read(path) for path in paths]
    short = short_names([one.name for one in evaluations])
    folders = short_names([str(one.path.resolve()) for one in evaluations])
    for one, name, folder in zip(evaluations, short, folders, strict=True):
        one.name = name if short.count(name) == 1 else f"{name} ({folder})"
    heads, rows = table(evaluations)
    notes = warnings(evaluations)
    shown = Table(title="evaluations", box=box.SIMPLE_HEAD)
    for head in heads:
        shown.add_column(head, justify="left" if head in heads[:2] else "right")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    for note in notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    image = png((4.6 * len(tasks_of(evaluations)) + 1, 9), lambda f: _draw(f, evaluations))
    ends = [f"{e.name}: {line}" for e in evaluations for line in outcome_lines(e.summaries)]
    title = " / ".join(one.name for one in evaluations)
    page = page_text(title, {"": (heads, rows)}, [NOTE, *notes, *ends], image)
    picture = out.with_suffix(".png")
    try:
        write_whole(out, page)
        picture.write_bytes(image)
    except OSError as error:
        raise ValueError(f"--out {out}: {error.strerror}") from error
    console.print(f"table and plot: {out}, {picture}", highlight=False, soft_wrap=True)


def short_names(paths: Sequence[str]) -> list[str]:
    """The ends of paths or hub names, of as many parts as tell different ones apart."""
    parts = [path.rstrip("/").split("/") for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(set(map(tuple, parts))):
            break
    return names


def tasks_of(evaluations: Sequence[Evaluation]) -> list[str]:
    """Every task of any of them."""
    return list(dict.fromkeys(task for one in evaluations for task in one.summaries))


def table(evaluations: Sequence[Evaluation]) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row for each measure of each task with a cell for each model."""
    heads = ["task", "", *(one.name for one in evaluations)]
    rows = []
    for task in tasks_of(evaluations):
        measures, cells = columns(
            {e.name: e.summaries[task] for e in evaluations if task in e.summaries}
        )
        for place, measure in enumerate(measures):
            row = [cells[e.name][place] if e.name in cells else "–" for e in evaluations]
            rows.append([task if place == 0 else "", measure, *row])
    return heads, rows


def warnings(evaluations: Sequence[Evaluation]) -> list[str]:
    """What keeps the numbers from being compared as they stand."""
    found = []
    for key, text in SAME.items():
        if len({json.dumps(one.identity.get(key), sort_keys=True) for one in evaluations}) > 1:
            found.append(text)
    for task in tasks_of(evaluations):
        parts = [e.identity["tasks"].get(task, {}) for e in evaluations if task in e.summaries]
        counts = {e.name: e.summaries[task]["n"] for e in evaluations if task in e.summaries}
        for key, text in (("problems", "the problems differ"), ("settings", "settings differ")):
            if len({json.dumps(part.get(key), sort_keys=True) for part in parts}) > 1:
                found.append(f"{task}: {text}")
        if len(set(counts.values())) > 1:
            each = ", ".join(f"{name} {n}" for name, n in counts.items())
            found.append(f"{task}: samples of a problem differ ({each})")
        found += [
            f"{task}: {e.summaries[task]['missing']} samples of {e.name} are missing"
            for e in evaluations
            if task in e.summaries and e.summaries[task]["missing"]
        ]
    return found


def _draw(figure: Any, evaluations: Sequence[Evaluation]) -> None:
    """A column for each task: Pass@K and Major@K over K, then tool calls and tokens a sample."""
    tasks = tasks_of(evaluations)
    axes = figure.subplots(3, len(tasks), squeeze=False)
    for column, task in enumerate(tasks):
        curves, calls, tokens = axes[0][column], axes[1][column], axes[2][column]
        for place, one in enumerate(evaluations):
            numbers = one.summaries.get(task)
            if numbers is None:
                continue
            color = f"C{place % 10}"
            for name, style, label in (
                ("pass_at_k", "-o", f"{one.name}, Pass@K"),
                ("major_at_k", "--s", f"{one.name}, Major@K"),
            ):
                points = {int(k): v for k, v in (numbers[name] or {}).items() if v is not None}
                if points:
                    curves.plot(
                        list(points), list(points.values()), style, color=color, label=label
                    )
            for bars, what in ((calls, "tool_calls"), (tokens, "tokens")):
                bars.barh(place, numbers["per_sample"][what] or 0.0, color=color)
        curves.set(title=f"{task}: Pass@K and Major@K", xlabel="K", ylim=(0, 1.02))
        if curves.lines:
            ks = sorted(
                {
                    int(k)
                    for e in evaluations
                    for k in e.summaries.get(task, {}).get("pass_at_k", ())
                }
            )
            curves.set_xscale("log", base=2)
            curves.set_xticks(ks, list(map(str, ks)))
            curves.legend(fontsize=7)
        for bars, title in ((calls, "tool calls a sample"), (tokens, "tokens a sample")):
            bars.set(title=title)
            bars.set_yticks(range(len(evaluations)), [one.name for one in evaluations], fontsize=7)
            bars.invert_yaxis()


def _json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
