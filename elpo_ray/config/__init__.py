"""The one truth for configuration: what may be set, its type, its default and its limits.

YAML under `conf/` holds values only. Every class here checks itself in `__post_init__` and raises
`ValueError` with the key, the value and the remedy; nothing downstream sees OmegaConf. One file a
section; this one holds the whole run and what must hold between sections.
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass, field, replace
from pathlib import Path

from elpo_ray.config.algorithm import AlgorithmConfig, LossConfig
from elpo_ray.config.growth import GrowthRule
from elpo_ray.config.learner import ColdStartConfig, LearnerConfig
from elpo_ray.config.model import ModelConfig, Precision
from elpo_ray.config.rollout import EngineConfig, SamplingConfig, SandboxConfig, Transfer
from elpo_ray.config.rules import require
from elpo_ray.config.run import ClusterConfig, LoggingConfig, TrainerConfig
from elpo_ray.config.schedule import BudgetConfig, BudgetScope, ScheduleConfig
from elpo_ray.config.task import TaskConfig, TaskName

_CHECKOUT = Path(__file__).resolve().parent.parent.parent
CONF_DIR = _CHECKOUT / "conf"
"""The configuration groups: beside the package, or where an installation of its own puts them."""
if not CONF_DIR.is_dir():
    CONF_DIR = Path(sysconfig.get_path("data"), "share", "elpo_ray", "conf")


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
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of the whole RL run, the length of the learning-rate schedule."""
        batches = self.trainer.inputs_per_step // self.learner.minibatch_inputs
        return self.trainer.steps * batches * self.learner.epochs

    @property
    def loss(self) -> LossConfig:
        """The algorithm's loss, with the correction of stale tokens where there are any."""
        loss = self.algorithm.loss
        if self.schedule.staleness and loss.tis_cap is None and loss.icepop is None:
            return replace(loss, tis_cap=self.schedule.tis_cap)
        return loss

    @property
    def transfer(self) -> Transfer:
        """How weights travel; never `auto`."""
        if self.engine.transfer is not Transfer.auto:
            return self.engine.transfer
        if not self.cluster.gpus:
            return Transfer.host
        return Transfer.ipc if self.cluster.colocated else Transfer.nccl

    @property
    def allowance(self) -> tuple[int, int, int]:
        """(fewest, first granted, most) rollouts of an input."""
        n_total = self.algorithm.growth.n_total
        if self.budget.scope is BudgetScope.input:
            return n_total, n_total, n_total
        fewest, most = self.budget.min, self.budget.max
        return (
            max(2, n_total // 2) if fewest is None else fewest,
            n_total,
            2 * n_total if most is None else most,
        )

    def train_turns(self, step: int) -> int:
        """Assistant turns that a training episode of `step`, counted from 0, may take: the task's,
        or fewer where the algorithm bounds the tool calls."""
        limits = self.algorithm.growth.max_tool_calls
        if not limits:
            return self.task.max_turns
        stage = min(step * len(limits) // self.trainer.steps, len(limits) - 1)
        calls = max(limits[stage], self.task.tool_calls_needed)
        return min(self.task.max_turns, calls + 1)

    def __post_init__(self) -> None:
        self._check_devices()
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
            self.learner.max_tokens_per_pack >= (self.cold_start.max_tokens or 0),
            "learner.max_tokens_per_pack",
            self.learner.max_tokens_per_pack,
            f"must hold one demonstration, cold_start.max_tokens={self.cold_start.max_tokens}",
        )
        require(
            self.task.max_turn_tokens < self.model.max_context,
            "task.max_turn_tokens",
            self.task.max_turn_tokens,
            f"must be below model.max_context={self.model.max_context}",
        )
        fewest, n_total, most = self.allowance
        for key, value in (("min", fewest), ("max", most)):
            require(
                fewest <= n_total <= most,
                f"budget.{key}",
                value,
                f"budget.min <= algorithm.growth.n_total={n_total} <= budget.max must hold",
            )
        require(
            self.budget.scope is BudgetScope.input or self.algorithm.growth.rule is GrowthRule.bel,
            "budget.scope",
            self.budget.scope.value,
            f"growth rule {self.algorithm.growth.rule.value} has no search to end early; use input",
        )
        require(
            self.model.path is not None or self.task.name is TaskName.countdown,
            "model.path",
            self.model.path,
            "name a Hugging Face folder; only task=countdown can build its own tiny model",
        )

    def _check_devices(self) -> None:
        """Who lives on which device, and how weights get from one to the other."""
        cluster, transfer = self.cluster, self.engine.transfer
        if cluster.colocated:
            for key, value, use in (
                ("engine.tensor_parallel_size", self.engine.tensor_parallel_size, 1),
                ("schedule.staleness", self.schedule.staleness, 0),
            ):
                why = f"cluster.colocated=true: one engine a device, in turns; use {use}"
                require(value == use, key, value, why)
            stage, adapters = self.learner.zero_stage, self.learner.adapters is not None
            least = 2 if self.model.precision is Precision.bf16 else 1
            require(
                least <= stage <= (2 if adapters else 3),
                "learner.zero_stage",
                stage,
                "cluster.colocated=true needs states that DeepSpeed can move; use 2"
                + ("" if adapters else " or 3"),
            )
        fits = {
            Transfer.auto: True,
            Transfer.host: True,
            Transfer.nccl: cluster.gpus and not cluster.colocated,
            Transfer.ipc: cluster.gpus and cluster.colocated,
        }
        require(
            fits[transfer],
            "engine.transfer",
            transfer.value,
            "nccl connects GPUs, ipc both sides of one GPU (cluster.colocated=true); use auto",
        )
