"""What the commands that measure a model may be told: `evaluate` and `analyze`."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from elpo_ray.config.algorithm import AlgorithmConfig
from elpo_ray.config.model import Precision
from elpo_ray.config.rollout import EngineConfig, SamplingConfig, SandboxConfig
from elpo_ray.config.rules import require
from elpo_ray.config.run import ClusterConfig

DEFAULT_KS = (4, 16, 32)
"""The K of the paper's Pass@K and Major@K."""


@dataclass(kw_only=True)
class MeasureConfig:
    """A model, the tasks it is measured on, and where."""

    model: str = ""
    """Hugging Face folder or hub name, run folder, checkpoint, or the URL of an OpenAI-compatible
    server (http://host:8000/v1)."""
    served_model: str | None = None
    """The model to ask a server for; null = the only one that it lists."""
    tasks: list[str] = field(default_factory=list)
    """Names of conf/task/."""
    data_dir: str | None = None
    """Folder with the tasks' files (docs/tasks.md); null = from the hub."""
    task: dict[str, Any] = field(default_factory=dict)
    """Put over every task's own values, as in +task.max_turns=8."""
    problems: int | None = None
    """Held-out problems of each task; null = the task's own number, task.eval_problems."""
    max_context: int | None = None
    """Tokens of prompt and episode; null = that of the run folder, else 20480."""
    precision: Precision | None = None
    """null = that of the run folder, else bf16 (fp32 without GPUs)."""
    seed: int = 0
    out: str | None = None
    """Folder of the results; null = one under runs/, named after what determines them."""
    check_only: bool = False
    """Check model, tasks and prompts, say what would be sampled, and stop."""
    progress: bool = True
    """Progress bars on a terminal."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(top_p=0.6))
    engine: EngineConfig = field(default_factory=EngineConfig)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        require(
            bool(self.model),
            "model",
            self.model,
            "name a Hugging Face folder, a run folder, a checkpoint or http://host:port/v1",
        )
        require(bool(self.tasks), "tasks", self.tasks, "name some, as in tasks=[aime24,aime25]")
        repeated = sorted({name for name in self.tasks if self.tasks.count(name) > 1})
        require(not repeated, "tasks", self.tasks, f"name {', '.join(repeated)} once")
        for key in ("problems", "max_context"):
            value = getattr(self, key)
            require(value is None or value >= 1, key, value, "use 1 or more, or null")
        require(self.seed >= 0, "seed", self.seed, "use 0 or more")
        for key in ("endpoint", "served_model"):
            value = getattr(self.engine, key)
            require(value is None, f"engine.{key}", value, "give the URL as model=http://…")


@dataclass(kw_only=True)
class EvaluateConfig(MeasureConfig):
    """avg@n, Pass@K and Major@K (`python -m elpo_ray.evaluate`)."""

    n: int = 32
    """Samples of each problem."""
    ks: list[int] | None = None
    """K of Pass@K and Major@K; null = those of 4, 16 and 32 that n allows."""

    @property
    def all_ks(self) -> list[int]:
        return [k for k in DEFAULT_KS if k <= self.n] if self.ks is None else sorted(self.ks)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.n >= 1, "n", self.n, "use 1 or more")
        for k in self.ks or []:
            require(k >= 1, "ks", self.ks, "use 1 or more")
            require(
                k <= self.n,
                "ks",
                self.ks,
                f"Pass@{k} needs {k} samples of each problem, n={self.n}; raise n or drop it",
            )


class AnalysisName(Enum):
    """The paper's analyses (`elpo_ray.evaluation.analysis`)."""

    recovery = "recovery"
    """Figure 1: how often a failed trajectory recovers when it goes on from before one step."""
    ranking = "ranking"
    """Figure 3: do a method's scores order siblings as fresh rollouts do?"""
    localization = "localization"
    """Does a search name the same step again, and, with an oracle, the right one?"""


@dataclass(kw_only=True)
class AnalyzeConfig(MeasureConfig):
    """One analysis (`python -m elpo_ray.analyze`). Completions are sampled as in training."""

    analysis: AnalysisName = AnalysisName.localization
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    """Its growth and credit are what `ranking` judges; its BEL settings are every search's."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rollouts: int = 16
    """Trajectories from the prompt, among which the failures are found."""
    failures: int = 4
    """At most so many failed trajectories of a problem are looked into."""
    completions: int = 16
    """recovery: completions after a step was taken back (the paper's 16)."""
    scan: int = 16
    """recovery, without an oracle: completions per probe of the search for the step to blame."""
    fresh: int = 32
    """ranking: fresh completions of each sibling (the paper's 32)."""
    xs: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    """localization: probe sizes X."""
    repeats: int = 4
    """localization: searches of one trajectory at each X and budget."""
    budgets: list[int] = field(default_factory=list)
    """localization: completions a search may spend; empty = as many as it asks for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("rollouts", "failures", "completions", "scan", "fresh", "repeats"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "use 1 or more")
        require(bool(self.xs) and min(self.xs) >= 1, "xs", self.xs, "name sizes of 1 or more")
        require(all(b >= 1 for b in self.budgets), "budgets", self.budgets, "use 1 or more")
        require(
            "://" not in self.model,
            "model",
            self.model,
            "a search needs token entropies, which servers do not return; name a folder",
        )
