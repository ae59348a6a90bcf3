"""Making the runs of a study: each is a process of `elpo train`, one after the other or several at
once.

Invariants: a finished run is a file of results and is never made again; a run that was cut off goes
on from its newest checkpoint; runs that begin with the same cold start do not make it twice.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf

from elpo_ray.config import Config
from elpo_ray.config.algebra import gpus_asked
from elpo_ray.config.arguments import EXIT_CONFIGURATION
from elpo_ray.config.memory import model_states
from elpo_ray.config.values import hydra_value, plain
from elpo_ray.runs.atomic import write_whole
from elpo_ray.runs.folder import RunFolder
from elpo_ray.study.plan import Cell, Samples, Study
from elpo_ray.study.record import Record, memory_gib

TRIES = 3
"""How often a run is begun or gone on with before it is given up."""
POLL_S = 1.0
STOP_S = 300.0
"""How long a run may take to write its checkpoint on Ctrl-C."""
PROCESSES_GIB = 6.0
"""Memory of a run's processes beside model states and caches."""


@dataclass
class Progress:
    """One run of the study, and how far it is."""

    cell: Cell
    folder: Path
    result: Path
    state: str = "waiting"
    """waiting, running, done or failed."""
    tries: int = 0
    note: str = ""
    process: subprocess.Popen[bytes] | None = None
    slot: int = 0
    sampling: bool = False
    """It is trained, and its samples are being taken."""
    begun: float = field(default_factory=time.monotonic)

    @property
    def step(self) -> int:
        """Finished steps, by the run's log."""
        try:
            lines = (self.folder / "metrics.jsonl").read_bytes().splitlines()
        except OSError:
            return 0
        try:
            return int(json.loads(lines[-1])["step"]) if lines else 0
        except (ValueError, KeyError, TypeError):
            return 0

    @property
    def samples(self) -> Path:
        """Where its samples lie."""
        return self.folder / "samples"

    @property
    def log(self) -> Path:
        """The file with what the run prints."""
        return self.folder.with_name(f"{self.folder.name}.log")


class Conductor:
    """Makes what is missing of a study."""

    def __init__(
        self,
        study: Study,
        runs: Path,
        results: Path,
        jobs: int | None = None,
        command: Callable[[Cell, Path], list[str]] | None = None,
        sampler: Callable[[Cell, Path, Path, Samples], list[str]] | None = None,
    ) -> None:
        """`runs`: where run folders lie; `results`: where their records do; `jobs`: runs at once,
        by what the machine holds without it; `command` and `sampler`: command lines,
        `train_command` and `sample_command` without them. Raises ValueError for a record that was
        made with other settings."""
        self.progress = [
            Progress(cell, runs / study.name / cell.name, result_of(results, study, cell))
            for cell in study.cells
        ]
        self.jobs = jobs or min(at_once(cell.config) for cell in study.cells)
        self._study = study
        self._command = command or train_command
        self._sampler = sampler or sample_command
        for one in self.progress:
            if finished(one.cell, one.result) is not None:
                one.state = "done"

    def run(self, show: Callable[[], None]) -> None:
        """Make the runs; `show` is called now and then. A run that fails is left behind; what is
        under way on Ctrl-C writes a checkpoint."""
        with self._stopping():
            while any(one.state in ("waiting", "running") for one in self.progress):
                self._begin_some()
                show()
                time.sleep(POLL_S)
                for one in self.progress:
                    if one.process is not None and one.process.poll() is not None:
                        self._ended(one)
        show()

    def _begin_some(self) -> None:
        running = [one for one in self.progress if one.state == "running"]
        starting = {cold_start(one.cell) for one in running if one.step == 0}
        for one in self.progress:
            if len(running) == self.jobs:
                return
            if one.state == "waiting" and cold_start(one.cell) not in starting:
                one.slot = min(set(range(self.jobs)) - {each.slot for each in running})
                self._begin(one)
                running.append(one)
                starting.add(cold_start(one.cell))

    def _begin(self, one: Progress) -> None:
        one.folder.parent.mkdir(parents=True, exist_ok=True)
        samples = self._study.samples
        if one.sampling and samples is not None:
            words = self._sampler(one.cell, one.folder, one.samples, samples)
        else:
            words = self._command(one.cell, one.folder)
        environment = dict(os.environ)
        gpus = gpus_asked(one.cell.config)
        if gpus and self.jobs > 1:
            own = range(one.slot * gpus, (one.slot + 1) * gpus)
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, own))
        with one.log.open("ab") as log:
            one.process = subprocess.Popen(
                words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment,
                start_new_session=True,
            )  # fmt: skip
        one.state, one.begun, one.tries = "running", time.monotonic(), one.tries + 1

    def _ended(self, one: Progress) -> None:
        assert one.process is not None
        code, one.process = one.process.returncode, None
        if code == 0 and self._study.samples is not None and not one.sampling:
            one.state, one.sampling, one.tries = "waiting", True, 0
            return
        if code == 0:
            samples = one.samples if one.sampling else None
            Record.of(self._study.name, one.cell, one.folder, samples).write(one.result)
            one.state, one.note = "done", ""
            return
        one.note = f"exit code {code}: {last_line(one.log)}"
        again = one.tries < TRIES and code != EXIT_CONFIGURATION
        one.state = "waiting" if again else "failed"

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        try:
            yield
        finally:
            left = [one.process for one in self.progress if one.process is not None]
            for process in left:
                process.send_signal(signal.SIGINT)
            for process in left:
                try:
                    process.wait(STOP_S)
                except subprocess.TimeoutExpired:
                    process.kill()


def result_of(results: Path, study: Study, cell: Cell) -> Path:
    """Where the record of a run lies."""
    return results / study.name / f"{cell.name}.json"


def finished(cell: Cell, path: Path) -> Record | None:
    """The record of a run that was made; None if there is none. Raises ValueError if it was made
    with other settings."""
    if not path.exists():
        return None
    record = Record.read(path)
    if record.digest == cell.digest:
        return record
    now, then = cell.settings, record.settings
    key = next((k for k in sorted(now.keys() | then.keys()) if now.get(k) != then.get(k)), "")
    raise ValueError(
        f"{path}: made with {key}={then.get(key, 'its default')}, not "
        f"{now.get(key, 'its default')}; remove it, or give the study or the arm another name"
    )


def cold_start(cell: Cell) -> tuple[str, int]:
    """Runs that agree in this begin with the same cold start, or may."""
    return cell.task, cell.seed


def train_command(cell: Cell, folder: Path) -> list[str]:
    """The command line of a run: a new one, or one that goes on in its folder. What was begun
    without a checkpoint is removed."""
    where = [
        f"trainer.run_dir={hydra_value(str(folder.parent))}",
        f"trainer.run_name={hydra_value(folder.name)}",
    ]
    if RunFolder(folder).newest_checkpoint() is not None:
        where = [f"trainer.resume={hydra_value(str(folder))}"]
    elif folder.exists():
        shutil.rmtree(folder)
    words = [*cell.words, f"trainer.seed={cell.seed}", "logging.progress=false", *where]
    if not any(word.startswith("logging.wandb=") for word in words):
        words.append("logging.wandb=disabled")
    return [sys.executable, "-m", "elpo_ray.main", *words]


def sample_command(cell: Cell, folder: Path, out: Path, samples: Samples) -> list[str]:
    """The command line that samples a trained model on its own task. The task, and where it is
    sampled, stand in a file beside the run."""
    whole = plain(cell.config)
    sections = {key: whole[key] for key in ("task", "engine", "sandbox", "cluster")}
    file = folder / f"{cell.task}.yaml"
    write_whole(file, OmegaConf.to_yaml(OmegaConf.create(sections)))
    words = [
        str(file),
        f"model={hydra_value(str(folder))}",
        f"out={hydra_value(str(out))}",
        f"n={samples.n}",
        f"ks=[{','.join(map(str, samples.ks))}]",
        f"seed={cell.seed}",
        "sampling.temperature=1.0",
        "sampling.top_p=1.0",
        "progress=false",
    ]
    if samples.problems is not None:
        words.append(f"problems={samples.problems}")
    return [sys.executable, "-m", "elpo_ray.evaluate", *words]


def at_once(config: Config) -> int:
    """How many such runs this machine holds, by cores or GPUs and by memory; at least one."""
    cluster = config.cluster
    engines = cluster.rollout_workers * cluster.engine_threads
    learner = cluster.learner_ranks * cluster.learner_threads
    bounds = [(os.cpu_count() or 1) // (max(engines, learner) + cluster.sandbox_actors)]
    states = model_states(config)
    host = states.host / 2**30 if states is not None else 0.0
    bounds.append(int(memory_gib() // (host + PROCESSES_GIB)))
    if cluster.gpus:
        bounds = [gpus_here() // max(1, gpus_asked(config)), bounds[1]]
    return max(1, min(bounds))


def gpus_here() -> int:
    """GPUs that a process of this one sees."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU") for line in done.stdout.splitlines())


def last_line(log: Path) -> str:
    """The last thing that a run said."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")
