"""`elpo study FILE.yaml`: make the runs of a study; `elpo study FILE.yaml report`: what they show.

The same command goes on where it stopped. Exit codes: 0 done; 1 some runs failed, the others are
kept; 2 a mistake in the call or the file, one line on stderr; 130 on Ctrl-C, after the runs under
way have written a checkpoint.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from elpo_ray.config.arguments import EXIT_FAULT, Parser
from elpo_ray.study import report
from elpo_ray.study.conduct import Conductor, finished, result_of
from elpo_ray.study.plan import Study

RUNS, RESULTS = Path("runs/study"), Path("docs/study/runs")
EPILOG = """\
A finished run is one JSON file under RESULTS/NAME and is never made again: commit it. A run that
was cut off goes on from its checkpoint. docs/studies.md says what a file may hold.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = Parser("study", "Runs of several algorithms, tasks and seeds, and a report.", EPILOG)
    parser.add_argument("file", metavar="FILE", type=Path, help="the study, as in conf/study/")
    parser.add_argument(
        "what", nargs="?", choices=("run", "report", "list"), default="run",
        help="run (the default), report, or list: what is done and what is not",
    )  # fmt: skip
    parser.add_argument(
        "--runs", type=Path, default=RUNS, metavar="DIR", help=f"run folders ({RUNS})"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="DIR", help=f"finished runs ({RESULTS})"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="of the report (RESULTS/../NAME)")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="runs at once (by default what the machine holds)"
    )
    parser.add_argument(
        "--only", action="append", metavar="NAME",
        help="these runs alone, by names such as task-arm-seed; * is any part; may be repeated",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    if arguments.jobs is not None and arguments.jobs < 1:
        parser.error(f"--jobs {arguments.jobs}: give 1 or more")
    failed: list[str] = []

    def command() -> None:
        study = Study.read(arguments.file)
        if arguments.only:
            study = study.only(arguments.only)
        if arguments.what == "report":
            out = arguments.out or arguments.results.parent / study.name
            write_report(study, arguments.results, out)
            return
        conductor = Conductor(study, arguments.runs, arguments.results, arguments.jobs)
        if arguments.what == "list":
            Console().print(table(conductor))
        else:
            failed.extend(make(conductor))

    return parser.run(command) or (EXIT_FAULT if failed else 0)


def make(conductor: Conductor) -> list[str]:
    """Make the runs, showing how far they are; returns the names of those that failed."""
    console = Console()
    if console.is_terminal:
        with Live(console=console, refresh_per_second=1) as live:
            conductor.run(lambda: live.update(table(conductor)))
    else:
        said: dict[str, str] = {}

        def show() -> None:
            for one in conductor.progress:
                now = f"{one.state} {one.tries or ''} {one.note}".strip()
                if said.get(one.cell.name, "waiting") != now:
                    console.print(f"{one.cell.name}: {now}", highlight=False, soft_wrap=True)
                said[one.cell.name] = now

        conductor.run(show)
    failed = [one for one in conductor.progress if one.state == "failed"]
    for one in failed:
        console.print(
            f"{one.cell.name}: {one.note}; see {one.log}", highlight=False, soft_wrap=True
        )
    return [one.cell.name for one in failed]


def table(conductor: Conductor) -> Table:
    """How far each run is."""
    done = sum(one.state == "done" for one in conductor.progress)
    title = f"{done} of {len(conductor.progress)} runs done, {conductor.jobs} at once"
    grid = Table("task", "arm", "seed", "state", "step", "minutes", "note", title=title)
    for one in conductor.progress:
        running = one.state == "running"
        grid.add_row(
            one.cell.task,
            one.cell.arm,
            str(one.cell.seed),
            one.state,
            f"{one.step}/{one.cell.config.trainer.steps}" if running else "",
            f"{(time.monotonic() - one.begun) / 60:.0f}" if running else "",
            one.note,
        )
    return grid


def write_report(study: Study, results: Path, out: Path) -> None:
    """Write the report of what is there. Raises ValueError if nothing is."""
    found = {cell.name: finished(cell, result_of(results, study, cell)) for cell in study.cells}
    records = [record for record in found.values() if record is not None]
    if not records:
        raise ValueError(f"{results / study.name}: no finished run of this study; make some first")
    missing = [name for name, record in found.items() if record is None]
    path = report.write(study, records, missing, out)
    console = Console()
    console.print(path.read_text(encoding="utf-8"), highlight=False, markup=False, soft_wrap=True)
    console.print(f"written to {out}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
