"""The configuration of the commands that measure a model: `evaluate` and `analyze`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from elpo_ray.config.algorithm import AlgorithmConfig
from elpo_ray.config.model import ContextTokens, ModelConfig, Precision
from elpo_ray.config.rollout import EngineConfig, SamplingConfig, SandboxConfig
from elpo_ray.config.rules import NonNegativeInt, PositiveInt, Section
from elpo_ray.config.run import ClusterConfig
from elpo_ray.config.shapes import tensor_conflicts

DEFAULT_KS = (4, 16, 32)
"""The K of the paper's Pass@K and Major@K."""


@dataclass(kw_only=True)
class MeasureConfig(Section, key=""):
    """A model, the tasks on which it is measured, and the machines that do it."""

    model: str = ""
    """Hugging Face folder or hub name, run folder, checkpoint, or the URL of an OpenAI-compatible
    server (http://host:8000/v1)."""
    served_model: str | None = None
    """The model to ask a server for; null = the only one that it lists."""
    tasks: list[str] = field(default_factory=list)
    """Names of conf/task/, or runs' files, whose tasks are meant: 'tasks=[aime24,shop.yaml]'."""
    data_dir: str | None = None
    """Folder with the tasks' files (docs/tasks.md); null = from the hub."""
    task: dict[str, Any] = field(default_factory=dict)
    """Values that replace those of every task, as in task.max_turns=8."""
    problems: PositiveInt | None = None
    """Problems of each task, held-out ones unless `split` says otherwise; null = the task's own
    number, task.eval_problems."""
    max_context: ContextTokens | None = None
    """Tokens of prompt and episode; null = that of the run folder, else 20480."""
    precision: Precision | None = None
    """null = that of the run folder, else bf16 (fp32 without GPUs)."""
    tool_parser: str | None = None
    """As model.tool_parser; null = that of the run folder, else the one that the template shows."""
    template_options: dict[str, Any] = field(default_factory=dict)
    """As model.template_options; empty = those of the run folder, else none."""
    seed: NonNegativeInt = 0
    """Seed of the problems that are drawn and of the sampling."""
    out: str | None = None
    """Folder of the results; null = one under runs/, named after what determines them."""
    check_only: bool = False
    """The command checks model, tasks and prompts, prints what it would sample, and stops."""
    progress: bool = True
    """Progress bars on a terminal."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(top_p=0.6))
    engine: EngineConfig = field(default_factory=EngineConfig)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if not self.model:
            named = "a Hugging Face folder, a run folder, a checkpoint or http://host:port/v1"
            yield "model", f"name {named}"
        if not self.tasks:
            yield "tasks", "name some, as in 'tasks=[aime24,aime25]'"
        repeated = sorted({name for name in self.tasks if self.tasks.count(name) > 1})
        if repeated:
            yield "tasks", f"name {', '.join(repeated)} once"
        for key in ("endpoint", "served_model"):
            if getattr(self.engine, key) is not None:
                yield f"engine.{key}", "give the URL as model=http://…"
        model = ModelConfig(path=self.model or None)
        yield from tensor_conflicts(model, self.engine.tensor_parallel_size)


@dataclass(kw_only=True)
class EvaluateConfig(MeasureConfig):
    """avg@n, Pass@K and Major@K (`python -m elpo_ray.evaluate`)."""

    n: PositiveInt = 32
    """Samples of each problem."""
    ks: list[PositiveInt] | None = None
    """K of Pass@K and Major@K; null = those of 4, 16 and 32 that n allows."""

    @property
    def all_ks(self) -> list[int]:
        return [k for k in DEFAULT_KS if k <= self.n] if self.ks is None else sorted(self.ks)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        yield from super().conflicts()
        if (k := max(self.ks or [0])) > self.n:
            needed = f"Pass@{k} needs {k} samples of each problem"
            yield "ks", f"{needed}, n={self.n}; raise n or drop it"


class AnalysisName(Enum):
    """The paper's analyses (`elpo_ray.evaluation.analysis`)."""

    recovery = "recovery"
    """Figure 1: how often a failed trajectory recovers when it goes on from before one step."""
    ranking = "ranking"
    """Figure 3: do a method's scores order siblings as fresh rollouts do?"""
    localization = "localization"
    """Does a search name the same step again, and, with an oracle, the right one?"""


class Split(Enum):
    """Which problems of a task an analysis takes."""

    held_out = "held_out"
    """Those that no run trains on."""
    training = "training"
    """The first of the training stream with this seed, as in the paper's Figure 3."""


@dataclass(kw_only=True)
class AnalyzeConfig(MeasureConfig):
    """One analysis (`python -m elpo_ray.analyze`). Completions are sampled as in training."""

    analysis: AnalysisName = AnalysisName.localization
    split: Split = Split.held_out
    """Where the problems come from; their number is `problems`."""
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    """Its growth and credit are what `ranking` judges; its BEL settings are every search's."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rollouts: PositiveInt = 16
    """Trajectories from the prompt, among which the failures are found; recovery examines problems
    where all of them fail."""
    failures: PositiveInt = 4
    """Most failed trajectories of a problem that are analyzed."""
    completions: PositiveInt = 16
    """recovery: completions behind an edited step (the paper's 16), and most tries at an edit."""
    scan: PositiveInt = 16
    """recovery, without an oracle: completions per probe of the search for the critical step."""
    fresh: PositiveInt = 32
    """ranking: fresh completions of each sibling (the paper's 32)."""
    xs: list[PositiveInt] = field(default_factory=lambda: [1, 2, 4, 8])
    """localization: probe sizes X."""
    repeats: PositiveInt = 4
    """localization: searches of one trajectory at each X and budget."""
    budgets: list[PositiveInt] = field(default_factory=list)
    """localization: completions a search may spend; empty = as many as it asks for."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        yield from super().conflicts()
        if not self.xs:
            yield "xs", "name sizes of 1 or more"
        if "://" in self.model:
            remedy = "a search needs token entropies, which servers do not return; name a folder"
            yield "model", remedy
