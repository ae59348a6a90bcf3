"""How fast a run starts: `python benchmarks/startup.py [--against CHECKOUT]`, JSON lines.

Starts the quickstart with its cold start in the cache and stops it when the first tree grows. Each
run is one line: seconds from the command to the first line on the screen, to Ray up, to the learner
and the engines ready, to the first tree growing (the first evaluation is over), and the processor
seconds of all its processes until then. `null`: that checkout does not say when. With `--against`
another checkout takes turns with this one, under the same interpreter; the last line has the
medians and, of the pairs, the median ratio this/other.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parents[1]
MARKS = {
    "ray": ("cold start: ",),
    "learner": ("starting the engines",),
    "engines": ("evaluating",),
    "growing": ("held-out pass@1",),
}
"""Texts of the line that is printed when something is ready."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="of each checkout")
    parser.add_argument("--against", type=Path, help="root of another checkout")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the quickstart")
    args = parser.parse_args()
    checkouts = {"this": HERE} | ({"other": args.against.resolve()} if args.against else {})
    runs: dict[str, list[dict[str, float | None]]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory() as folder:
        for root in checkouts.values():  # fills the cache of cold starts, and those of bytecode
            start(root, Path(folder), args.set)
        for _ in range(args.runs):
            for name, root in checkouts.items():
                load = os.getloadavg()[0]
                runs[name].append(start(root, Path(folder), args.set))
                line = {"checkout": name, "load_before": round(load, 2)} | runs[name][-1]
                print(json.dumps(line), flush=True)
    print(json.dumps(summary(runs)))


def start(root: Path, folder: Path, overrides: list[str]) -> dict[str, float | None]:
    """One run of the code in `root`, until its first tree grows: seconds until each mark."""
    command = [sys.executable, "-m", "elpo_ray.cli", "train", "+experiment=quickstart"]
    seen: dict[str, float | None] = {"first_line": None} | dict.fromkeys(MARKS) | {"cpu": None}
    began = time.monotonic()
    process = subprocess.Popen(
        [*command, *overrides],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        now = round(time.monotonic() - began, 2)
        seen["first_line"] = seen["first_line"] or now
        for mark, texts in MARKS.items():
            if seen[mark] is None and any(text in line for text in texts):
                seen[mark] = now
        if seen["growing"] is not None and seen["cpu"] is None:
            seen["cpu"] = round(processor_seconds(process.pid), 1)
            process.send_signal(signal.SIGINT)
    if process.wait() != 130:
        raise SystemExit("".join(["the run did not end by the interrupt:\n", *lines]))
    return seen


def processor_seconds(pid: int) -> float:
    """Processor seconds of a process and all its descendants, ended ones included."""
    root = psutil.Process(pid)
    family = [root, *root.children(recursive=True)]
    return sum(sum(member.cpu_times()[:4]) for member in family if member.is_running())


def summary(runs: dict[str, list[dict[str, float | None]]]) -> dict[str, object]:
    """Medians of each checkout, and of the pairs' ratios."""

    def median(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return round(statistics.median(known), 3) if known else None

    keys = list(runs["this"][0])
    report: dict[str, object] = {
        name: {key: median([run[key] for run in some]) for key in keys}
        for name, some in runs.items()
    }
    if "other" in runs:
        pairs = list(zip(runs["this"], runs["other"], strict=True))
        report["this/other"] = {
            key: median([a[key] / b[key] for a, b in pairs if a[key] and b[key]]) for key in keys
        }
    return report


if __name__ == "__main__":
    main()
