"""Settings of a run: its length, its actors, what it writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any

from elpo_ray.config.rules import Names, NonNegativeInt, PositiveFloat, PositiveInt, Section


@dataclass(kw_only=True)
class TrainerConfig(Section, key="trainer"):
    """Length, batch, seeds and what is kept."""

    steps: PositiveInt = 235
    """Training steps: each grows trees for `inputs_per_step` inputs and trains on them."""
    inputs_per_step: PositiveInt = 128
    """Problems of a step, each with a tree of its own."""
    seed: NonNegativeInt = 0
    """Seed of problems, demonstrations, initial weights and sampling."""
    checkpoint_every: NonNegativeInt = 20
    """Steps between checkpoints; the last step is always kept. 0 = only the last."""
    keep_checkpoints: PositiveInt = 2
    """The newest checkpoints that are kept; older ones are deleted."""
    background_checkpoints: bool = False
    """Checkpoints are written while the next step's trees grow: each learner rank keeps a copy of
    its share of the state in host memory meanwhile, and the next update waits for the end."""
    eval_every: NonNegativeInt = 0
    """Steps between held-out evaluations; 0 = only before and after."""
    eval_part: PositiveInt | None = None
    """Held-out problems of the evaluations in between, the first ones of each benchmark; null = all
    of task.eval_problems, as before and after."""
    run_dir: str = "runs"
    """Folder in which each run makes its own."""
    run_name: str | None = None
    """Folder under run_dir; null = experiment, algorithm and time."""
    resume: str | None = None
    """Run folder to continue from its newest checkpoint, with the same settings but for those that
    say where it runs and what it writes (docs/training.md)."""
    fork: str | None = None
    """New name under run_dir: the run goes on from the checkpoint of `resume` as one of its own,
    and may have other settings; the old run stays as it is."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.fork is not None and self.resume is None:
            yield "fork", "name the run to go on from with trainer.resume=runs/NAME"
        if self.fork is not None and self.run_name is not None:
            yield "run_name", "trainer.fork names the run already; leave run_name out"
        if self.run_dir == "":
            yield "run_dir", "name a folder; . is the working folder"
        if self.resume == "":
            yield "resume", "give the run's folder, as in trainer.resume=runs/NAME, or null"
        if self.run_name and self.resume and Path(self.resume).absolute().name != self.run_name:
            own = f"for a run of its own write trainer.fork={self.run_name} instead"
            yield "run_name", f"trainer.resume={self.resume} goes on under its own name; {own}"
        for key in ("run_name", "fork"):
            name = getattr(self, key)
            if name is not None and (name in ("", ".", "..") or "/" in name):
                yield key, "give a folder's name without /; trainer.run_dir says where it lies"


@dataclass(kw_only=True)
class ClusterConfig(Section, key="cluster"):
    """The actors, what each of them asks Ray for, and the deadlines."""

    address: str | None = None
    """Ray address to join ("auto" for a running cluster); null = start a local one."""
    rollout_workers: PositiveInt = 1
    """Actors that grow trees, each with a vLLM engine of its own."""
    learner_ranks: PositiveInt = 1
    """Processes that train the model together under DeepSpeed."""
    sandbox_actors: PositiveInt = 1
    """Actors that run the policy's code."""
    gpus: bool = True
    """Each learner rank takes one GPU, each rollout worker `engine.tensor_parallel_size`."""
    colocated: bool = False
    """Engine i and learner rank i share a device: engines sleep (vLLM's sleep mode) while the
    learner works, its states lie in host memory while trees grow."""
    engine_threads: PositiveInt = 1
    """Threads of an engine on CPU; tools and episodes use the other cores."""
    learner_threads: PositiveInt = 1
    """Threads of a learner rank on CPU."""
    sandbox_sessions: PositiveInt = 64
    """Live sessions per sandbox actor; further ones wait."""
    dashboard: bool = True
    """A cluster that the run starts itself serves the Ray dashboard."""
    start_timeout_s: PositiveFloat = 900.0
    """Seconds that an actor may take to start; engines load the model in this time."""
    call_timeout_s: PositiveFloat = 7200.0
    """Deadline of one remote call, and of one completed trajectory of a worker; a miss names the
    actor and the phase."""
    stuck_s: PositiveFloat = 120.0
    """A rollout worker that does not answer for so long, though it should every second, is
    replaced; a sandbox call that takes so much longer than `sandbox.wall_s` is made elsewhere."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        workers, ranks = self.rollout_workers, self.learner_ranks
        if self.colocated and workers != ranks:
            remedy = f"needs as many rollout workers (now {workers}) as learner ranks ({ranks})"
            yield "colocated", remedy


class TrackerName(StrEnum):
    """The built-in trackers (`elpo_ray.runs.trackers`)."""

    wandb = "wandb"
    """Weights & Biases."""
    tensorboard = "tensorboard"
    """TensorBoard's event files."""
    mlflow = "mlflow"
    """MLflow."""


class WandbMode(Enum):
    """Where Weights & Biases writes."""

    offline = "offline"
    """Into the run's folder; `wandb sync` uploads it later."""
    online = "online"
    """To its server, which needs an account and a network."""
    disabled = "disabled"
    """Nowhere."""


@dataclass(kw_only=True)
class LoggingConfig(Section, key="logging"):
    """What a run writes beside `metrics.jsonl`."""

    wandb: WandbMode = WandbMode.offline
    tensorboard: bool = False
    """Event files under `runs/NAME/tensorboard`."""
    mlflow: str | None = None
    """Tracking URI of an MLflow server or folder (http://…, file:…); null = none."""
    trackers: list[Any] = field(default_factory=list)
    """Further trackers: a built-in name, your own as module:attribute, or `{name: …, options: {…}}`
    with keyword arguments (docs/extending.md)."""
    project: str = "elpo_ray"
    """Project of Weights & Biases, experiment of MLflow."""
    progress: bool = True
    """Progress bars on a terminal."""
    dump_tokens: bool = True
    """Dumped trees hold every sampled token's id, entropy and log-probability too: about four
    times the bytes of its text."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        known = Names(TrackerName)
        for entry in self.trackers:
            whole = entry if isinstance(entry, dict) else {"name": entry}
            name, options = whole.get("name"), whole.get("options", {})
            right = isinstance(name, str) and isinstance(options, dict)
            if not right or not whole.keys() <= {"name", "options"}:
                yield "trackers", f"{entry!r}: write a name, or {{name: …, options: {{…}}}}"
            elif not known.holds(name):
                yield "trackers", known.remedy(name)

    @property
    def wanted(self) -> dict[str, dict[str, Any]]:
        """Every tracker's options by its name or dotted path."""
        found: dict[str, dict[str, Any]] = {}
        if self.wandb is not WandbMode.disabled:
            found[TrackerName.wandb] = {"mode": self.wandb.value}
        if self.tensorboard:
            found[TrackerName.tensorboard] = {}
        if self.mlflow is not None:
            found[TrackerName.mlflow] = {"uri": self.mlflow}
        for entry in self.trackers:
            whole = entry if isinstance(entry, dict) else {"name": entry}
            found[whole["name"]] = dict(whole.get("options", {}))
        return found
