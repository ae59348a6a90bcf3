"""The schema of the configuration: what may be set, its type, its default and its limits.

YAML under `conf/` holds values only. An object of the schema is checked when it is made and raises
`ValueError` with the key, the value and the remedy (`rules.py`); nothing downstream sees OmegaConf.
Each section has a file; this one holds the whole run and what must hold between sections.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from elpo_ray.config.algorithm import AlgorithmConfig, LossConfig
from elpo_ray.config.dotted import is_path
from elpo_ray.config.growth import GrowthRule
from elpo_ray.config.learner import ColdStartConfig, LearnerConfig
from elpo_ray.config.model import ModelConfig, Precision
from elpo_ray.config.rollout import EngineConfig, SamplingConfig, SandboxConfig, Transfer
from elpo_ray.config.rules import Section
from elpo_ray.config.run import ClusterConfig, LoggingConfig, TrainerConfig
from elpo_ray.config.schedule import BudgetConfig, BudgetScope, ScheduleConfig
from elpo_ray.config.shapes import tensor_conflicts
from elpo_ray.config.task import TaskConfig, TaskName

_CHECKOUT = Path(__file__).resolve().parent.parent.parent
CONF_DIR = _CHECKOUT / "conf"
"""The configuration groups: beside the package, or where an installation of its own puts them."""
if not CONF_DIR.is_dir():
    CONF_DIR = Path(sysconfig.get_path("data"), "share", "elpo_ray", "conf")

MADE = (TaskName.countdown, TaskName.reasoning_gym)
"""Tasks that make demonstrations of their own."""


@dataclass(kw_only=True)
class Config(Section, key=""):
    """The configuration of a whole run."""

    experiment: str = "custom"
    """Name of the experiment. It begins the name of the run's folder."""
    check_only: bool = False
    """The command prints how the batch divides up, checks all that the run would check before its
    first actor, and stops."""
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
        """How many optimizer steps the whole RL run takes: the length of the rate's schedule."""
        batches = self.trainer.inputs_per_step // self.learner.minibatch_inputs
        return self.trainer.steps * batches * self.learner.epochs

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the learner computes activations again. Without it a pack of the default size
        takes 155 GiB of activations with 4 billion parameters; a tiny model only loses time."""
        asked = self.learner.gradient_checkpointing
        return self.cluster.gpus and self.model.path is not None if asked is None else asked

    @property
    def loss(self) -> LossConfig:
        """The algorithm's loss, with the correction of stale tokens where there are any."""
        loss = self.algorithm.loss
        if self.schedule.staleness and loss.tis_cap is None and loss.icepop is None:
            return replace(loss, tis_cap=self.schedule.tis_cap)
        return loss

    @property
    def transfer(self) -> Transfer:
        """How the engines get new weights; never `auto`."""
        if self.engine.transfer is not Transfer.auto:
            return self.engine.transfer
        if not self.cluster.gpus:
            return Transfer.host
        return Transfer.ipc if self.cluster.colocated else Transfer.nccl

    @property
    def allowance(self) -> tuple[int, int, int]:
        """(fewest, first granted, most) rollouts that an input gets."""
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

    def conflicts(self) -> Iterator[tuple[str, str]]:
        yield from self._length_conflicts()
        yield from self._budget_conflicts()
        yield from self._device_conflicts()
        made = self.task.name in MADE or is_path(self.task.name)
        if self.model.path is None and not made and self.task.demonstrations_file is None:
            tiny = "or demonstrations (task.demonstrations_file), from which a tiny one is built"
            yield "model.path", f"name a Hugging Face folder, {tiny}"

    def _length_conflicts(self) -> Iterator[tuple[str, str]]:
        """Lengths of texts, and sizes of batches."""
        inputs, context = self.trainer.inputs_per_step, self.model.max_context
        size = self.learner.minibatch_inputs
        if inputs % size:
            fits = next(n for n in range(min(size, inputs), 0, -1) if inputs % n == 0)
            remedy = f"write learner.minibatch_inputs={fits}"
            yield (
                "learner.minibatch_inputs",
                f"must divide trainer.inputs_per_step={inputs}; {remedy}",
            )
        if self.learner.max_tokens_per_pack < context:
            remedy = f"must hold one episode, model.max_context={context}"
            yield "learner.max_tokens_per_pack", remedy
        demonstration = self.cold_start.max_tokens or 0
        if self.learner.max_tokens_per_pack < demonstration:
            remedy = f"must hold one demonstration, cold_start.max_tokens={demonstration}"
            yield "learner.max_tokens_per_pack", remedy
        if (self.task.max_turn_tokens or 0) >= context:
            yield "task.max_turn_tokens", f"must be below model.max_context={context}; or use null"

    def _budget_conflicts(self) -> Iterator[tuple[str, str]]:
        """How many rollouts an input gets."""
        fewest, n_total, most = self.allowance
        remedy = f"budget.min <= algorithm.growth.n_total={n_total} <= budget.max must hold"
        if fewest > n_total:
            yield "budget.min", remedy
        if most < n_total:
            yield "budget.max", remedy
        rule, searching = self.algorithm.growth.rule, (GrowthRule.bel, GrowthRule.posterior)
        own = is_path(rule)  # whether that one can share is looked at when it is loaded
        if self.budget.scope is BudgetScope.batch and rule not in searching and not own:
            remedy = f"growth rule {rule} has no search to end early; use input"
            yield "budget.scope", remedy

    def _device_conflicts(self) -> Iterator[tuple[str, str]]:
        """Which process uses which device, and how weights get from one to another."""
        gpus, colocated = self.cluster.gpus, self.cluster.colocated
        if colocated:
            why = "cluster.colocated=true: one engine a device, in turns"
            if self.engine.tensor_parallel_size != 1:
                yield "engine.tensor_parallel_size", f"{why}; use 1"
            if self.schedule.staleness != 0:
                yield "schedule.staleness", f"{why}; use 0"
            adapters = self.learner.adapters is not None
            least = 2 if self.model.precision is Precision.bf16 else 1
            if not least <= self.learner.zero_stage <= (2 if adapters else 3):
                why = "cluster.colocated=true needs states that DeepSpeed can move"
                yield "learner.zero_stage", f"{why}; use 2" + ("" if adapters else " or 3")
        transfer = self.engine.transfer
        if (transfer is Transfer.nccl and not (gpus and not colocated)) or (
            transfer is Transfer.ipc and not (gpus and colocated)
        ):
            remedy = "nccl connects GPUs, ipc both sides of one GPU (cluster.colocated=true)"
            yield "engine.transfer", f"{remedy}; use auto"
        yield from tensor_conflicts(self.model, self.engine.tensor_parallel_size)
