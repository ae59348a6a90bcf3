"""The run folder: what a run leaves on disk, and how it is continued.

    runs/NAME/config.yaml            resolved configuration
              configs/step_00001.yaml the configuration from that step on, for each that it had
              metrics.jsonl          one object a step
              trackers.json          what the trackers call the run
              tokenizer.json         texts of the dumped token ids
              base/                  the starting model's files but for its weights
              trees/step_00001.jsonl one tree a line (docs/tree.schema.json)
              checkpoints/step_00005 learner state and `state.json`
              set_aside/             inputs that were given up, each with what it had completed
              summary.json           written at the end

Invariants: a checkpoint appears under its final name only when it is complete; an older one is
removed only after a newer one is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from elpo_ray.config import Config
from elpo_ray.config.continuing import Change, Difference, differences, settings_text
from elpo_ray.config.growth import GrowthConfig, GrowthRule
from elpo_ray.dump import dump_tree
from elpo_ray.growth.budget import Ledger
from elpo_ray.growth.fitting import BetaFit
from elpo_ray.growth.recoverability import PivotFit
from elpo_ray.rollout.journal import replay
from elpo_ray.runs.atomic import new_folder, write_whole
from elpo_ray.runs.lock import FolderLock
from elpo_ray.runs.log import last_step
from elpo_ray.scheduling.jobs import SetAside
from elpo_ray.tree import RolloutTree
from elpo_ray.types import CheckpointError

CONFIG = "config.yaml"
CONFIGS = "configs"
WRITTEN = (
    CONFIG, CONFIGS, "metrics.jsonl", "trackers.json", "trees", "checkpoints", "set_aside", "base",
    "tokenizer.json", "summary.json", "tensorboard", "wandb",
)  # fmt: skip
"""What a start that comes to no step may have written into its folder."""
WEIGHT_FILES = (
    ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json",
)  # fmt: skip
"""Ends of the names of files that hold weights, or say where they are."""


@dataclass(kw_only=True)
class RunState:
    """Everything a resumed run needs beside the learner's own state."""

    step: int = 0
    """Finished steps; also the version of the weights."""
    cursor: int = 0
    """Training problems handed out so far."""
    pass_at_1_before: float | None = None
    beta_fit: BetaFit = field(default_factory=BetaFit)
    """What searches by evidence know of recoverable prefixes (`growth.posterior.fit_beta`)."""
    pivot_fit: PivotFit = field(default_factory=PivotFit)
    """What branchings of failed trajectories show of their prefixes (`growth.pivot`)."""
    totals: dict[str, float] = field(default_factory=dict)
    """Sums over the run: rollouts, tokens, seconds by phase, localizations judged and right."""

    def fitted(self, growth: GrowthConfig, step: int, staleness: int) -> GrowthConfig | None:
        """The growth of the `step`-th step, from 0, where part of it is fitted to earlier ones."""
        if growth.posterior.fit_beta:
            beta = self.beta_fit.before(step, staleness, growth.posterior.beta)
            return replace(growth, posterior=replace(growth.posterior, beta=beta))
        if growth.rule == GrowthRule.pivot and growth.pivot.coefficients is None:
            found = self.pivot_fit.before(step, staleness)
            return replace(growth, pivot=replace(growth.pivot, coefficients=found))
        return None

    def fit(self, growth: GrowthConfig, trees: Sequence[RolloutTree]) -> None:
        """Fit to the trees of the last finished step and of those before."""
        if growth.posterior.fit_beta:
            self.beta_fit.add(self.step, trees, growth.posterior.beta)
        if growth.rule == GrowthRule.pivot:
            self.pivot_fit.add(self.step, trees, growth.pivot)

    def add(self, **amounts: float) -> None:
        for key, amount in amounts.items():
            self.totals[key] = self.totals.get(key, 0.0) + amount


class RunFolder:
    """One run's folder, new or continued."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trees = path / "trees"
        self.checkpoints = path / "checkpoints"
        self.base = path / "base"
        self.changes: list[Difference] = []
        """The settings that differ from those of the run that is continued."""
        self._source: RunFolder | None = None
        """The run that this one is forked from."""
        self._lock = FolderLock(path)

    @classmethod
    def of(cls, config: Config) -> RunFolder:
        """Return the folder that `config` asks for: a new one (not made yet) or one to resume.

        Raises ValueError if a new run's name is taken, or if there is nothing to resume from or
        its settings were others. The folder of a start that came to no step is not taken.
        """
        trainer = config.trainer
        if trainer.resume is None:
            name = trainer.run_name or (
                f"{config.experiment}-{config.algorithm.name}-{time.strftime('%Y%m%d-%H%M%S')}"
            )
            return cls._new(config, "run_name", name)
        run = cls(Path(trainer.resume))
        run.changes = run._check_resumable(config)
        if trainer.fork is None:
            run._lock.check(f"trainer.resume={trainer.resume!r}")
            return run
        forked = cls._new(config, "fork", trainer.fork)
        forked.changes, forked._source = run.changes, run
        return forked

    @classmethod
    def _new(cls, config: Config, key: str, name: str) -> RunFolder:
        run = cls(Path(config.trainer.run_dir) / name)
        if (run.path / CONFIG).exists() and not run.failed_start:
            raise ValueError(
                f"trainer.{key}={name!r}: {run.path} holds a run already; choose another name, or "
                f"continue it with trainer.resume={run.path}"
            )
        return run

    @property
    def failed_start(self) -> bool:
        """Whether a run began here, whose process is gone, and left nothing that was learned: no
        checkpoint after a step."""
        if self._lock.held or not self._lock.begun:
            return False  # it may hold a run of an older version, or no run at all
        newest = self.newest_checkpoint()
        return newest is None or read_state(newest).step == 0

    def finished(self, steps: int) -> bool:
        """Whether a run of so many steps has come to its end here: nothing is left to do."""
        newest = self.newest_checkpoint()
        if newest is None or not (self.path / "summary.json").exists():
            return False
        return read_state(newest).step >= steps

    def begin(self, config: Config) -> None:
        """Make the folder, with the resolved configuration in it; a resumed one loses what came
        after its newest checkpoint, which will be made again. What a failed start has left is
        removed or, if steps are in its log, moved aside. Raises ValueError if another process has
        begun the run meanwhile."""
        key = f"trainer.run_name={self.path.name!r}"
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock.take(key)
        new = config.trainer.resume is None or self._source is not None
        if new and (self.path / CONFIG).exists():
            self._clear()
            self._lock.take(key)
        if self._source is not None:
            self._take_over(self._source)
        checkpoint = self.newest_checkpoint()
        done = 0 if checkpoint is None else read_state(checkpoint).step
        if checkpoint is not None:
            self.rewind(done)
            (self.path / "summary.json").unlink(missing_ok=True)
        self.trees.mkdir(parents=True, exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        self._keep_settings(settings_text(config), done)

    def close(self) -> None:
        """Let other processes resume the run."""
        self._lock.release()

    def _clear(self) -> None:
        """Remove what a failed start has written, or begin a new folder beside its steps."""
        if last_step(self.path):
            self._lock.release()
            self.aside()
            self.path.mkdir()
            return
        for name in WRITTEN:
            place = self.path / name
            if place.is_dir():
                shutil.rmtree(place)
            else:
                place.unlink(missing_ok=True)

    def aside(self) -> Path:
        """Give the folder a free name beside its own, and return it."""
        number = 1
        while (other := self.path.with_name(f"{self.path.name}.attempt{number}")).exists():
            number += 1
        return self.path.rename(other)

    def _take_over(self, source: RunFolder) -> None:
        """Make this folder that of a run which has come to the newest checkpoint of `source`."""
        checkpoint = source.newest_checkpoint()
        assert checkpoint is not None, "`of` has seen it"
        for name in ("metrics.jsonl", "tokenizer.json", CONFIG):
            if (source.path / name).is_file():
                shutil.copyfile(source.path / name, self.path / name)
        for folder in (source.trees, source.base, source.path / CONFIGS):
            if folder.is_dir():
                shutil.copytree(
                    folder, self.path / folder.name, copy_function=_link, dirs_exist_ok=True
                )
        with new_folder(self.checkpoints / checkpoint.name) as partial:
            shutil.copytree(checkpoint, partial, copy_function=_link, dirs_exist_ok=True)

    def _keep_settings(self, text: str, done: int) -> None:
        """Write `config.yaml`, and beside it each configuration that has made steps, under the
        first of them. `done`: the steps that are finished."""
        kept = self.path / CONFIGS
        kept.mkdir(exist_ok=True)
        if done and not any(kept.iterdir()):  # a run of an older version
            shutil.copyfile(self.path / CONFIG, kept / f"step_{1:05d}.yaml")
        for path in kept.glob("step_*.yaml"):
            if int(path.stem.removeprefix("step_")) > done:
                path.unlink()
        if not done or self.changes:
            write_whole(kept / f"step_{done + 1:05d}.yaml", text)
        write_whole(self.path / CONFIG, text)

    def _run_meant(self) -> str:
        """What to give instead of a folder that is no run's: that of the run around it, if any."""
        run = next(filter(None, map(run_of, self.path.absolute().parents)), None)
        if run is None:
            return "give a run's folder, as in trainer.resume=runs/NAME"
        own, here = run.path, Path.cwd()
        own = own.relative_to(here) if own.is_relative_to(here) else own
        return f"give the run's own, trainer.resume={own}; it goes on from its newest checkpoint"

    def _check_resumable(self, config: Config) -> list[Difference]:
        """The settings that differ and may. Raises ValueError if others do."""
        key = f"trainer.resume={str(self.path)!r}"
        if not (self.path / CONFIG).exists():
            raise ValueError(f"{key}: not a run folder (no config.yaml); {self._run_meant()}")
        checkpoint = self.newest_checkpoint()
        if checkpoint is None:
            raise ValueError(
                f"{key}: no complete checkpoint in {self.checkpoints}; start the run anew"
            )
        text = (self.path / CONFIG).read_text(encoding="utf-8")
        found = differences(text, config)
        saved, now = OmegaConf.create(text), OmegaConf.structured(config)
        for name in ("model", "learner.lora"):
            if any(d.change is Change.never and d.key.startswith(name) for d in found):
                old, new = OmegaConf.select(saved, name), OmegaConf.select(now, name)
                raise ValueError(
                    f"{key}: its checkpoint was written with {name}={_plain(old)}, not "
                    f"{_plain(new)}; continue with the saved value"
                )
        refused = [d for d in found if d.change is Change.fork]
        if refused and config.trainer.fork is None:
            step = read_state(checkpoint).step
            raise ValueError(
                f"{key}: its {step} steps were made with other settings, now "
                f"{', '.join(map(str, refused))}; leave them as they were, or go on under another "
                "name with trainer.fork=NEW_NAME"
            )
        return found

    def keep_tokenizer(self, model: Path) -> None:
        """Copy the tokenizer of a model folder, if it is a fast one."""
        if (model / "tokenizer.json").is_file():
            shutil.copyfile(model / "tokenizer.json", self.path / "tokenizer.json")

    def keep_base(self, model: Path) -> None:
        """Copy the files of the starting model that hold no weights, so that a checkpoint becomes a
        model folder without it."""
        with new_folder(self.base) as partial:
            copy_but_weights(model, partial)

    def write_trees(self, step: int, trees: Iterable[RolloutTree], *, tokens: bool = True) -> None:
        """Dump the trees of a step, counted from 1; `tokens` as in `dump.dump_tree`."""
        with (self.trees / f"step_{step:05d}.jsonl").open("w", encoding="utf-8") as file:
            for tree in trees:
                file.write(json.dumps(dump_tree(tree, tokens), ensure_ascii=False) + "\n")

    def set_aside(self, step: int, inputs: Iterable[SetAside]) -> None:
        """Keep a record of each input that was given up; `step` counts from 1."""
        for number, given_up in enumerate(inputs):
            problem = given_up.problem
            tree = RolloutTree(problem.id, max(1, len(given_up.journal)), (), problem.messages)
            replay(tree, Ledger(tree.budget), given_up.journal)
            record = {
                "step": step,
                "problem": problem.id,
                "why": given_up.why,
                "tree": dump_tree(tree),
            }
            folder = self.path / "set_aside"
            folder.mkdir(exist_ok=True)
            text = json.dumps(record, ensure_ascii=False) + "\n"
            write_whole(folder / f"step_{step:05d}_{number}.json", text)

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_whole(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")

    def newest_checkpoint(self) -> Path | None:
        complete = sorted(self.checkpoints.glob("step_*/state.json"))
        return complete[-1].parent if complete else None

    def rewind(self, step: int) -> None:
        """Drop metrics and trees of steps after `step`, and what an interrupted save left."""
        log = self.path / "metrics.jsonl"
        if log.exists():
            end = 0
            for line in log.read_text(encoding="utf-8").splitlines(keepends=True):
                if not _is_json(line) or json.loads(line)["step"] > step:
                    break
                end += len(line.encode())
            os.truncate(log, end)  # in place: a sink may have it open
        for path in self.trees.glob("step_*.jsonl"):
            if int(path.stem.removeprefix("step_")) > step:
                path.unlink()
        for path in self.checkpoints.glob(".partial-*"):
            shutil.rmtree(path)

    @contextmanager
    def checkpoint(self, state: RunState, keep: int) -> Iterator[Path]:
        """Yield a folder to write the learner's state into, then commit it under its final name.

        Raises CheckpointError, with the partial folder removed, when the disk refuses.
        """
        final = self.checkpoints / f"step_{state.step:05d}"
        try:
            with new_folder(final) as partial:
                yield partial
                text = json.dumps(asdict(state), indent=2) + "\n"
                (partial / "state.json").write_text(text, encoding="utf-8")
        except OSError as error:
            newest = self.newest_checkpoint() or "none"
            raise CheckpointError(
                f"checkpoint {final}: {error.strerror or error}; nothing of it was kept, the "
                f"newest complete one is {newest}; free disk space and continue with "
                f"trainer.resume={self.path}"
            ) from error
        for old in sorted(self.checkpoints.glob("step_*"))[:-keep]:
            shutil.rmtree(old)


def run_of(path: Path) -> RunFolder | None:
    """The run that a folder is, or is a checkpoint of."""
    parents = [path.parent.parent] if path.parent.name == "checkpoints" else []
    for candidate in (path, *parents):
        if (candidate / "config.yaml").is_file() and (candidate / "checkpoints").is_dir():
            return RunFolder(candidate)
    return None


def copy_but_weights(source: Path, target: Path) -> None:
    """Copy the files of a model folder that hold no weights."""
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(WEIGHT_FILES):
            shutil.copyfile(file, target / file.name)


def read_state(checkpoint: Path) -> RunState:
    """The driver's state in a checkpoint's folder."""
    fields = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    beta_fit = BetaFit(**fields.pop("beta_fit", {}))
    pivot_fit = PivotFit(**fields.pop("pivot_fit", {}))
    return RunState(**fields, beta_fit=beta_fit, pivot_fit=pivot_fit)


def _plain(value: Any) -> Any:
    """A configuration value as the YAML file would hold it."""
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, enum_to_str=True)
    return getattr(value, "name", value)


def _link(source: str, target: str) -> str:
    """Give a file that never changes a second name; copy it to another file system."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target


def _is_json(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False
