"""What a person sees of an evaluation: the table, the plots, one HTML page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from elpo_ray.runs.atomic import write_whole

Summaries = Mapping[str, Mapping[str, Any]]
"""Task -> `summary.summarize`."""
NOTE = (
    "avg@n with two 95 % intervals: over problems (t on the problem means: other problems of the "
    "kind) and over samples (these problems, other samples). Pass@K and Major@K are means over all "
    "subsets of K of the same samples. – where nothing can be said."
)
STYLE = (
    "body{font:15px/1.5 sans-serif;margin:2em auto;max-width:72em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .8em;text-align:right;"
    "border-bottom:1px solid #ddd}th:first-child,td:first-child{text-align:left}"
    "img{max-width:100%}p{color:#555}"
)


def columns(summaries: Summaries) -> tuple[list[str], dict[str, list[str]]]:
    """The table: headings, and one row of cells a task."""
    ks = list(dict.fromkeys(k for numbers in summaries.values() for k in numbers["pass_at_k"]))
    heads = ["problems", "avg@n", "95 % over problems", "95 % over samples"]
    heads += [f"Pass@{k}" for k in ks] + [f"Major@{k}" for k in ks]
    heads += ["tool calls a sample", "tokens a sample"]
    rows = {}
    for task, numbers in summaries.items():
        average = numbers["avg"]
        cells = [str(numbers["problems"])]
        if average is None:
            cells += ["–"] * 3
        else:
            cells += [_percent(average["mean"]), _range(average["over_problems"]),
                      _range(average["over_samples"])]  # fmt: skip
        cells += [_percent(numbers["pass_at_k"].get(k)) for k in ks]
        cells += [_percent((numbers["major_at_k"] or {}).get(k)) for k in ks]
        spent = numbers["per_sample"]
        cells += [_number(spent["tool_calls"]), _number(spent["tokens"])]
        rows[task] = cells
    return heads, rows


def outcome_lines(summaries: Summaries) -> list[str]:
    """How samples and tool calls ended, a line a task."""
    lines = []
    for task, numbers in summaries.items():
        ends = ", ".join(f"{count} {kind}" for kind, count in numbers["outcomes"].items())
        calls = ", ".join(f"{count} {kind}" for kind, count in numbers["tool_results"].items())
        missing = f"; {numbers['missing']} samples missing" if numbers["missing"] else ""
        lines.append(f"{task} (n={numbers['n']}): {ends}; tool calls: {calls or 'none'}{missing}")
    return lines


def show(console: Console, model: str, summaries: Summaries) -> None:
    """The table on a terminal."""
    heads, rows = columns(summaries)
    table = Table(title=model, box=box.SIMPLE_HEAD)
    table.add_column("")
    for task in rows:
        table.add_column(task, justify="right")
    for place, head in enumerate(heads):
        table.add_row(head, *(cells[place] for cells in rows.values()))
    console.print(table)
    for line in outcome_lines(summaries):
        console.print(line, highlight=False, soft_wrap=True)


def write_report(folder: Path, model: str, summaries: Summaries) -> None:
    """`report.html` and `report.png`."""
    heads, rows = columns(summaries)
    cells = [[task, *row] for task, row in rows.items()]
    lines = [NOTE, *outcome_lines(summaries)]
    write_page(folder, model, {"": (["task", *heads], cells)}, lines, plot(model, summaries))


def write_page(
    folder: Path,
    title: str,
    tables: Mapping[str, tuple[list[str], list[list[str]]]],
    lines: Sequence[str],
    image: bytes,
) -> None:
    """`report.png`, and `report.html` with tables (headings, rows), image and lines of text."""
    (folder / "report.png").write_bytes(image)
    write_whole(folder / "report.html", page_text(title, tables, lines, image))


def page_text(
    title: str,
    tables: Mapping[str, tuple[list[str], list[list[str]]]],
    lines: Sequence[str],
    image: bytes,
) -> str:
    """An HTML page with tables (headings, rows), image and lines of text, which needs no other
    file."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    for name, (heads, rows) in tables.items():
        body += [f"<h2>{html.escape(name)}</h2>" if name else "", "<table>", _row("th", heads)]
        body += [_row("td", row) for row in rows]
        body.append("</table>")
    encoded = base64.b64encode(image).decode()
    body.append(f'<img alt="plots" src="data:image/png;base64,{encoded}">')
    body += [f"<p>{html.escape(line)}</p>" for line in lines]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style>{''.join(body)}</html>\n"
    )


def png(size: tuple[float, float], draw: Callable[[Any], None]) -> bytes:
    """The PNG of a figure of `size` inches that `draw` fills."""
    from matplotlib.figure import Figure  # a second to import

    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def plot(model: str, summaries: Summaries) -> bytes:
    """A PNG: avg@n with its intervals, Pass@K and Major@K over K, and how samples ended."""
    return png((15, 4.2), lambda figure: _draw(figure, model, summaries))


def _draw(figure: Any, model: str, summaries: Summaries) -> None:
    tasks = list(summaries)
    figure.suptitle(model, fontsize=10)
    bars, curves, ends = figure.subplots(1, 3)
    for place, task in enumerate(tasks):
        numbers = summaries[task]
        color = f"C{place % 10}"
        if numbers["avg"] is not None:
            mean, wide = numbers["avg"]["mean"], numbers["avg"]["over_problems"]
            error = [[mean - wide["low"]], [wide["high"] - mean]]
            bars.bar(place, mean, yerr=error, color=color, capsize=4)
        for name, style in (("pass_at_k", "-o"), ("major_at_k", "--s")):
            points = {int(k): v for k, v in (numbers[name] or {}).items() if v is not None}
            label = f"{task} {'Pass' if name == 'pass_at_k' else 'Major'}@K"
            if points:
                curves.plot(list(points), list(points.values()), style, color=color, label=label)
    bars.set(title="avg@n, 95 % over problems", ylim=(0, 1))
    bars.set_xticks(range(len(tasks)), tasks)
    curves.set(title="Pass@K and Major@K", xlabel="K", ylim=(0, 1.02))
    if curves.lines:
        curves.set_xscale("log", base=2)
        curves.legend(fontsize=8)
    _stack(ends, summaries)


def _stack(axes: Any, summaries: Summaries) -> None:
    """Shares of outcomes, a stacked bar a task."""
    tasks = list(summaries)
    kinds = dict.fromkeys(kind for numbers in summaries.values() for kind in numbers["outcomes"])
    bottom = [0.0] * len(tasks)
    for kind in kinds:
        shares = [
            numbers["outcomes"].get(kind, 0) / max(1, numbers["samples"])
            for numbers in summaries.values()
        ]
        axes.bar(range(len(tasks)), shares, bottom=bottom, label=kind)
        bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
    axes.set(title="how samples ended", ylim=(0, 1))
    axes.set_xticks(range(len(tasks)), tasks)
    if kinds:
        axes.legend(fontsize=8)


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _range(interval: Mapping[str, Any]) -> str:
    return f"{100 * interval['low']:.1f}–{100 * interval['high']:.1f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}"
