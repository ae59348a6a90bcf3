"""The one truth for configuration: what may be set, its type, its default and its limits.

YAML under `conf/` holds values only. Every class here checks itself in `__post_init__` and raises
`ValueError` with the key, the value and the remedy; nothing downstream sees OmegaConf. One file a
section; this one holds the whole run and what must hold between sections.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from elpo_ray.config.algorithm import (
    Aggregation,
    AlgorithmConfig,
    BelConfig,
    ClipConfig,
    CreditConfig,
    CreditRule,
    ElcScope,
    GrowthConfig,
    GrowthRule,
    LossConfig,
)
from elpo_ray.config.learner import ColdStartConfig, LearnerConfig, OptimizerConfig, Schedule
from elpo_ray.config.model import ModelConfig, Precision, TinyModelConfig
from elpo_ray.config.rollout import EngineConfig, SamplingConfig, SandboxConfig
from elpo_ray.config.rules import require
from elpo_ray.config.run import ClusterConfig, LoggingConfig, TrainerConfig, WandbMode
from elpo_ray.config.task import (
    CountdownConfig,
    RewardConfig,
    RewardName,
    TaskConfig,
    TaskName,
)

__all__ = [
    "CONF_DIR",
    "Aggregation",
    "AlgorithmConfig",
    "BelConfig",
    "ClipConfig",
    "ClusterConfig",
    "ColdStartConfig",
    "Config",
    "CountdownConfig",
    "CreditConfig",
    "CreditRule",
    "ElcScope",
    "EngineConfig",
    "GrowthConfig",
    "GrowthRule",
    "LearnerConfig",
    "LoggingConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Precision",
    "RewardConfig",
    "RewardName",
    "SamplingConfig",
    "SandboxConfig",
    "Schedule",
    "TaskConfig",
    "TaskName",
    "TinyModelConfig",
    "TrainerConfig",
    "WandbMode",
    "require",
]

CONF_DIR = Path(__file__).resolve().parent.parent.parent / "conf"
"""The configuration groups, beside the package."""


@dataclass(kw_only=True)
class Config:
    """A whole run."""

    experiment: str = "custom"
    check_only: bool = False
    """Compose, validate, print the batch algebra and stop."""
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    cold_start: ColdStartConfig = field(default_factory=ColdStartConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of the whole RL run, the length of the learning-rate schedule."""
        batches = self.trainer.inputs_per_step // self.learner.minibatch_inputs
        return self.trainer.steps * batches * self.learner.epochs

    def __post_init__(self) -> None:
        require(
            self.trainer.inputs_per_step % self.learner.minibatch_inputs == 0,
            "learner.minibatch_inputs",
            self.learner.minibatch_inputs,
            f"must divide trainer.inputs_per_step={self.trainer.inputs_per_step}",
        )
        require(
            self.learner.max_tokens_per_pack >= self.model.max_context,
            "learner.max_tokens_per_pack",
            self.learner.max_tokens_per_pack,
            f"must hold one episode, model.max_context={self.model.max_context}",
        )
        require(
            self.task.max_turn_tokens < self.model.max_context,
            "task.max_turn_tokens",
            self.task.max_turn_tokens,
            f"must be below model.max_context={self.model.max_context}",
        )
        require(
            self.model.path is not None or self.task.name is TaskName.countdown,
            "model.path",
            self.model.path,
            "name a Hugging Face folder; only task=countdown can build its own tiny model",
        )
