"""The run folder: what a run leaves on disk, and how it is continued.

    runs/NAME/config.yaml            resolved configuration
              metrics.jsonl          one object a step
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
from elpo_ray.config.growth import GrowthConfig, GrowthRule
from elpo_ray.dump import dump_tree
from elpo_ray.growth.budget import Ledger
from elpo_ray.growth.fitting import BetaFit
from elpo_ray.growth.recoverability import PivotFit
from elpo_ray.rollout.journal import replay
from elpo_ray.runs.atomic import new_folder, write_whole
from elpo_ray.scheduling.jobs import SetAside
from elpo_ray.tree import RolloutTree
from elpo_ray.types import CheckpointError

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

    @classmethod
    def of(cls, config: Config) -> RunFolder:
        """Return the folder that `config` asks for: a new one (not made yet) or one to resume.

        Raises ValueError if a new run's name is taken, or if there is nothing to resume from or it
        was made with another model or learner.
        """
        if config.trainer.resume is not None:
            run = cls(Path(config.trainer.resume))
            run._check_resumable(config)
            return run
        name = config.trainer.run_name or (
            f"{config.experiment}-{config.algorithm.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        )
        path = Path(config.trainer.run_dir) / name
        if (path / "config.yaml").exists():
            raise ValueError(
                f"trainer.run_name={name!r}: {path} holds a run already; choose another name, or "
                f"continue it with trainer.resume={path}"
            )
        return cls(path)

    def begin(self, config: Config) -> None:
        """Make the folder, with the resolved configuration in it; a resumed one loses what came
        after its newest checkpoint, which will be made again."""
        checkpoint = self.newest_checkpoint()
        if checkpoint is not None:
            self.rewind(read_state(checkpoint).step)
        self.trees.mkdir(parents=True, exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        text = OmegaConf.to_yaml(OmegaConf.structured(config))
        write_whole(self.path / "config.yaml", text)

    def _check_resumable(self, config: Config) -> None:
        key = f"trainer.resume={str(self.path)!r}"
        if not (self.path / "config.yaml").exists():
            raise ValueError(f"{key}: not a run folder (no config.yaml)")
        if self.newest_checkpoint() is None:
            raise ValueError(
                f"{key}: no complete checkpoint in {self.checkpoints}; start the run anew"
            )
        saved, now = OmegaConf.load(self.path / "config.yaml"), OmegaConf.structured(config)
        for name in ("model", "learner.lora", "task.name"):
            old, new = OmegaConf.select(saved, name), OmegaConf.select(now, name)
            if _plain(old) != _plain(new):
                raise ValueError(
                    f"{key}: its checkpoint was written with {name}={_plain(old)}, not "
                    f"{_plain(new)}; continue with the saved value"
                )

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
    fields = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    beta_fit = BetaFit(**fields.pop("beta_fit", {}))
    pivot_fit = PivotFit(**fields.pop("pivot_fit", {}))
    return RunState(**fields, beta_fit=beta_fit, pivot_fit=pivot_fit)


def _plain(value: Any) -> Any:
    """A configuration value as the YAML file would hold it."""
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, enum_to_str=True)
    return getattr(value, "name", value)


def _is_json(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False
