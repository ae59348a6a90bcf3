"""The one truth for configuration: what may be set, its type, its default and its limits.

YAML under `conf/` holds values only. Every class here checks itself in `__post_init__` and raises
`ValueError` with the key, the value and the remedy; nothing downstream sees OmegaConf.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

CONF_DIR = Path(__file__).resolve().parent.parent / "conf"
"""The configuration groups, beside the package."""


def require(ok: bool, key: str, value: Any, remedy: str) -> None:
    """Raise the one form of a user's configuration error unless `ok`."""
    if not ok:
        raise ValueError(f"{key}={value!r}: {remedy}")


# --- algorithm = growth x credit x clip x loss ----------------------------------------------------


class GrowthRule(Enum):
    """How the budget of one input is spent."""

    bel = "bel"
    independent = "independent"


class CreditRule(Enum):
    """How a finished tree becomes advantages."""

    hierarchical = "hierarchical"
    group = "group"


class ElcScope(Enum):
    """Which nodes get the looser lower clip bound (Eq. 11)."""

    none = "none"
    critical_subtree = "critical_subtree"
    """Every failed leaf through a confirmed critical node, from that step on."""
    searched_only = "searched_only"
    """Only the searched trajectory, from its critical step on."""
    first_wrong_all = "first_wrong_all"
    """Every failed leaf, from the shallowest node on its path with no success below."""


class Aggregation(Enum):
    """How token losses become one number; denominators are global over the mini-batch."""

    seq_mean_token_mean = "seq_mean_token_mean"
    token_mean = "token_mean"
    seq_mean_token_sum_norm = "seq_mean_token_sum_norm"


@dataclass(kw_only=True)
class BelConfig:
    """Binary-search error localization (Algorithm 1)."""

    b_max: int = 3
    """Failures collected before one of them is searched."""
    x_min: int = 1
    """Fewest completions a probe samples."""
    x_max: int = 3
    """Most completions a probe samples."""
    beta: float = 5.0
    """Steepness of the entropy gate (Eq. 5)."""
    entropy_tokens: int = 20
    """Tokens at a turn's start whose mean entropy is the segment's (Eq. 3); -1 = whole turn."""
    verify_final: bool = True
    """Probe the last candidate too, as Figure 4 does; false = Algorithm 1 literally."""

    def __post_init__(self) -> None:
        require(self.b_max >= 1, "algorithm.growth.bel.b_max", self.b_max, "use at least 1")
        require(self.x_min >= 1, "algorithm.growth.bel.x_min", self.x_min, "use at least 1")
        require(
            self.x_max >= self.x_min,
            "algorithm.growth.bel.x_max",
            self.x_max,
            f"use at least x_min={self.x_min}",
        )
        require(
            self.entropy_tokens == -1 or self.entropy_tokens >= 1,
            "algorithm.growth.bel.entropy_tokens",
            self.entropy_tokens,
            "use at least 1, or -1 for the whole turn",
        )


@dataclass(kw_only=True)
class GrowthConfig:
    """How one input's budget becomes a tree."""

    rule: GrowthRule = GrowthRule.bel
    n_total: int = 16
    """Completed trajectories per input: each one is a leaf, always exactly this many."""
    bel: BelConfig = field(default_factory=BelConfig)

    def __post_init__(self) -> None:
        require(
            self.n_total >= 2,
            "algorithm.growth.n_total",
            self.n_total,
            "an advantage needs at least 2 trajectories; use 2 or more",
        )


@dataclass(kw_only=True)
class CreditConfig:
    """How a finished tree becomes one advantage per node."""

    rule: CreditRule = CreditRule.hierarchical
    lam: float = 0.5
    """Weight of the branch level against the trajectory level (Eq. 10)."""
    eps: float = 1e-6
    """Added to the standard deviation."""
    ddof: int = 0
    """0 = population (the paper's), 1 = sample standard deviation."""

    def __post_init__(self) -> None:
        require(0 <= self.lam <= 1, "algorithm.credit.lam", self.lam, "use a value in [0, 1]")
        require(self.eps >= 0, "algorithm.credit.eps", self.eps, "use 0 or more")
        require(self.ddof in (0, 1), "algorithm.credit.ddof", self.ddof, "use 0 or 1")


@dataclass(kw_only=True)
class ClipConfig:
    """Clip bounds of the probability ratio (Eq. 11, 12)."""

    eps_low: float = 0.2
    eps_high: float = 0.315
    eps_elc: float = 0.115
    """Added to eps_low on the critical step and its suffix."""
    scope: ElcScope = ElcScope.critical_subtree

    def __post_init__(self) -> None:
        for key in ("eps_low", "eps_high", "eps_elc"):
            value = getattr(self, key)
            require(value >= 0, f"algorithm.clip.{key}", value, "use 0 or more")
        require(
            self.eps_low + self.eps_elc < 1,
            "algorithm.clip.eps_elc",
            self.eps_elc,
            f"eps_low + eps_elc must stay below 1 (eps_low={self.eps_low})",
        )


@dataclass(kw_only=True)
class LossConfig:
    """The policy-gradient objective (Eq. 1, 12)."""

    aggregation: Aggregation = Aggregation.seq_mean_token_mean
    norm_tokens: int = 20480
    """Divisor C of seq_mean_token_sum_norm."""
    dual_clip: float | None = 10.0
    """Upper bound c on -ρ|A| for A < 0; null turns it off."""
    kl_coef: float = 0.0
    """Weight of the k3 divergence from the reference policy (the weights at the start of RL)."""
    tis_cap: float | None = None
    """Truncated importance sampling: weights min(π_old/π_rollout, cap); null turns it off."""

    def __post_init__(self) -> None:
        require(
            self.norm_tokens >= 1, "algorithm.loss.norm_tokens", self.norm_tokens, "use 1 or more"
        )
        require(
            self.dual_clip is None or self.dual_clip > 1,
            "algorithm.loss.dual_clip",
            self.dual_clip,
            "use a value above 1, or null to turn it off",
        )
        require(self.kl_coef >= 0, "algorithm.loss.kl_coef", self.kl_coef, "use 0 or more")
        require(
            self.tis_cap is None or self.tis_cap > 0,
            "algorithm.loss.tis_cap",
            self.tis_cap,
            "use a value above 0, or null to turn it off",
        )


@dataclass(kw_only=True)
class AlgorithmConfig:
    """An algorithm is these four choices; nothing else in the house knows its name."""

    name: str = "elpo"
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    credit: CreditConfig = field(default_factory=CreditConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    loss: LossConfig = field(default_factory=LossConfig)


# --- model, task ----------------------------------------------------------------------------------


class Precision(Enum):
    """Number format of weights and activations."""

    fp32 = "fp32"
    bf16 = "bf16"


@dataclass(kw_only=True)
class ModelConfig:
    """The policy: a Hugging Face folder or hub name, or a small one built for the task."""

    path: str | None = None
    """Folder or hub name of a causal LM with tokenizer and chat template; null = build `tiny`."""
    max_context: int = 20480
    """Tokens of prompt and episode together; also the engine's context window."""
    precision: Precision = Precision.bf16
    num_parameters: float | None = None
    """Only for the memory lines of `check_only`; null = counted from `tiny`, else unknown."""
    tiny: TinyModelConfig = field(default_factory=lambda: TinyModelConfig())

    def __post_init__(self) -> None:
        require(self.max_context >= 16, "model.max_context", self.max_context, "use 16 or more")


@dataclass(kw_only=True)
class TinyModelConfig:
    """Shape of the Qwen2 model that is built, with its tokenizer, when `model.path` is null."""

    vocab_size: int = 512
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            require(value >= 1, f"model.tiny.{key}", value, "use 1 or more")
        require(
            self.hidden_size % (32 * self.num_heads) == 0,
            "model.tiny.hidden_size",
            self.hidden_size,
            f"must be a multiple of 32 * num_heads={32 * self.num_heads}: vLLM on CPU has no "
            "attention for smaller heads",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            "model.tiny.num_kv_heads",
            self.num_kv_heads,
            f"must divide num_heads={self.num_heads}",
        )


class TaskName(Enum):
    """The task families (`elpo_ray.tasks`)."""

    countdown = "countdown"
    jsonl = "jsonl"


@dataclass(kw_only=True)
class CountdownConfig:
    """Difficulty of stepwise Countdown: combine all numbers, two at a time, into the target."""

    numbers: int = 5
    """How many numbers a problem gives; an episode needs one tool step fewer."""
    low: int = 1
    """Smallest operand."""
    high: int = 9
    """Largest operand."""
    operators: str = "+-*"
    max_value: int = 99
    """Intermediate results and targets stay within [0, max_value]."""
    demonstrations: int = 20000
    """Solved demonstrations for the cold start."""

    def __post_init__(self) -> None:
        require(2 <= self.numbers <= 7, "task.countdown.numbers", self.numbers, "use 2 to 7")
        require(
            1 <= self.low <= self.high,
            "task.countdown.low",
            self.low,
            f"use 1 to high={self.high}",
        )
        require(
            bool(self.operators) and set(self.operators) <= set("+-*"),
            "task.countdown.operators",
            self.operators,
            "use some of '+', '-', '*'",
        )
        require(
            self.max_value >= self.high,
            "task.countdown.max_value",
            self.max_value,
            f"use at least high={self.high}",
        )
        require(
            self.demonstrations >= 0,
            "task.countdown.demonstrations",
            self.demonstrations,
            "use >= 0",
        )


@dataclass(kw_only=True)
class TaskConfig:
    """What is trained and how an episode is bounded."""

    name: TaskName = TaskName.countdown
    train_file: str | None = None
    """JSON-lines file of problems (task `jsonl`); one object a line, see docs/tasks.md. A run
    needs it; `check_only` does not."""
    eval_file: str | None = None
    max_turns: int = 16
    """Assistant turns an episode may take, the answer included."""
    max_turn_tokens: int = 4096
    max_observation_chars: int = 256
    """A longer tool response is cut in the middle, as in the original recipe."""
    eval_problems: int = 200
    """Held-out problems of an evaluation."""
    expected_episode_tokens: int = 8192
    """A typical episode's length, prompt included; only for the batch algebra of `check_only`."""
    countdown: CountdownConfig = field(default_factory=CountdownConfig)

    def __post_init__(self) -> None:
        for key in ("max_turns", "max_turn_tokens", "eval_problems", "expected_episode_tokens"):
            require(getattr(self, key) >= 1, f"task.{key}", getattr(self, key), "use 1 or more")
        require(
            self.max_observation_chars >= 32,
            "task.max_observation_chars",
            self.max_observation_chars,
            "use 32 or more",
        )


# --- rollout, sandbox, learner --------------------------------------------------------------------


@dataclass(kw_only=True)
class SamplingConfig:
    """How the policy is sampled in training."""

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        require(
            0 < self.temperature <= 2,
            "sampling.temperature",
            self.temperature,
            "use a value in (0, 2], as vLLM does",
        )
        require(0 < self.top_p <= 1, "sampling.top_p", self.top_p, "use a value in (0, 1]")


@dataclass(kw_only=True)
class EngineConfig:
    """One vLLM engine of a rollout worker."""

    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.85
    kv_cache_gib: int = 1
    """KV cache on CPU, GiB; on GPU `gpu_memory_utilization` decides."""
    max_num_seqs: int = 256
    """Sequences decoded at once."""
    enforce_eager: bool = False

    def __post_init__(self) -> None:
        for key in ("tensor_parallel_size", "kv_cache_gib", "max_num_seqs"):
            require(getattr(self, key) >= 1, f"engine.{key}", getattr(self, key), "use 1 or more")
        require(
            0 < self.gpu_memory_utilization <= 1,
            "engine.gpu_memory_utilization",
            self.gpu_memory_utilization,
            "use a value in (0, 1]",
        )


@dataclass(kw_only=True)
class SandboxConfig:
    """Limits of the code interpreter, each per call."""

    wall_s: float = 10.0
    cpu_s: float = 10.0
    memory_mib: int = 2048
    output_kib: int = 64
    """Kept per stream; the process is killed at 1 MiB."""
    retries: int = 2
    """Attempts on another session after the sandbox itself failed."""
    max_failure_rate: float = 0.01
    """Share of calls lost to the sandbox above which a step stops loudly."""

    def __post_init__(self) -> None:
        for key in ("wall_s", "cpu_s", "memory_mib", "output_kib"):
            require(getattr(self, key) > 0, f"sandbox.{key}", getattr(self, key), "use above 0")
        require(self.retries >= 0, "sandbox.retries", self.retries, "use 0 or more")
        require(
            0 <= self.max_failure_rate <= 1,
            "sandbox.max_failure_rate",
            self.max_failure_rate,
            "use a value in [0, 1]",
        )


class Schedule(Enum):
    """Learning-rate schedule after the warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    schedule: Schedule = Schedule.constant
    warmup_ratio: float = 0.0
    """Share of the optimizer steps over which the rate grows linearly from 0."""
    grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""

    def __post_init__(self) -> None:
        require(self.lr > 0, "learner.optimizer.lr", self.lr, "use a value above 0")
        require(
            all(0 <= b < 1 for b in self.betas),
            "learner.optimizer.betas",
            tuple(self.betas),
            "use values in [0, 1)",
        )
        require(
            0 <= self.warmup_ratio <= 1,
            "learner.optimizer.warmup_ratio",
            self.warmup_ratio,
            "use a value in [0, 1]",
        )
        require(
            self.grad_norm > 0, "learner.optimizer.grad_norm", self.grad_norm, "use a value above 0"
        )


@dataclass(kw_only=True)
class LearnerConfig:
    """How the policy is trained under DeepSpeed."""

    zero_stage: int = 3
    """ZeRO stage 0-3: what is sharded over the learner's ranks."""
    minibatch_inputs: int = 16
    """Inputs (trees) per optimizer step."""
    epochs: int = 1
    """Passes over the trees of one step."""
    max_tokens_per_pack: int = 32768
    """Token budget of one forward pass on one rank."""
    gradient_checkpointing: bool = False
    offload_optimizer: bool = False
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        require(
            self.zero_stage in (0, 1, 2, 3),
            "learner.zero_stage",
            self.zero_stage,
            "use 0, 1, 2 or 3",
        )
        for key in ("minibatch_inputs", "epochs", "max_tokens_per_pack"):
            require(getattr(self, key) >= 1, f"learner.{key}", getattr(self, key), "use 1 or more")


@dataclass(kw_only=True)
class ColdStartConfig:
    """Supervised training on the task's demonstrations before RL, by the same learner."""

    enabled: bool = False
    epochs: int = 1
    batch_size: int = 32
    """Demonstrations per optimizer step."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            lr=1e-5, betas=(0.9, 0.95), schedule=Schedule.cosine, warmup_ratio=0.1
        )
    )
    cache: str = "runs/cache/cold_start"
    """Folder of finished cold starts, keyed by everything that determines them."""

    def __post_init__(self) -> None:
        for key in ("epochs", "batch_size"):
            require(
                getattr(self, key) >= 1, f"cold_start.{key}", getattr(self, key), "use 1 or more"
            )


# --- trainer, cluster, logging --------------------------------------------------------------------


@dataclass(kw_only=True)
class TrainerConfig:
    """Length, batch, seeds and what is kept."""

    steps: int = 235
    inputs_per_step: int = 128
    seed: int = 0
    checkpoint_every: int = 20
    """Steps between checkpoints; the last step is always kept. 0 = only the last."""
    keep_checkpoints: int = 2
    eval_every: int = 0
    """Steps between held-out evaluations; 0 = only before and after."""
    run_dir: str = "runs"
    run_name: str | None = None
    """Folder under run_dir; null = experiment, algorithm and time."""
    resume: str | None = None
    """Run folder to continue from its newest checkpoint."""

    def __post_init__(self) -> None:
        for key in ("steps", "inputs_per_step", "keep_checkpoints"):
            require(getattr(self, key) >= 1, f"trainer.{key}", getattr(self, key), "use 1 or more")
        for key in ("seed", "checkpoint_every", "eval_every"):
            require(getattr(self, key) >= 0, f"trainer.{key}", getattr(self, key), "use 0 or more")


@dataclass(kw_only=True)
class ClusterConfig:
    """Actors, what each of them asks Ray for, and deadlines."""

    address: str | None = None
    """Ray address to join ("auto" for a running cluster); null = start a local one."""
    rollout_workers: int = 1
    learner_ranks: int = 1
    sandbox_actors: int = 1
    gpus: bool = True
    """Each learner rank takes one GPU, each rollout worker `engine.tensor_parallel_size`."""
    engine_threads: int = 1
    """Threads of an engine on CPU; tools and episodes want the other cores."""
    learner_threads: int = 1
    """Threads of a learner rank on CPU."""
    sandbox_sessions: int = 64
    """Live sessions per sandbox actor; further ones wait."""
    dashboard: bool = True
    """Serve the Ray dashboard from a cluster that the run starts itself."""
    start_timeout_s: float = 900.0
    call_timeout_s: float = 7200.0
    """Deadline of one remote call; a miss names the actor and the phase."""

    def __post_init__(self) -> None:
        for key in (
            "rollout_workers",
            "learner_ranks",
            "sandbox_actors",
            "engine_threads",
            "learner_threads",
            "sandbox_sessions",
        ):
            require(getattr(self, key) >= 1, f"cluster.{key}", getattr(self, key), "use 1 or more")
        for key in ("start_timeout_s", "call_timeout_s"):
            require(getattr(self, key) > 0, f"cluster.{key}", getattr(self, key), "use above 0")


class WandbMode(Enum):
    """Where Weights & Biases writes."""

    offline = "offline"
    online = "online"
    disabled = "disabled"


@dataclass(kw_only=True)
class LoggingConfig:
    """What is written beside `metrics.jsonl`."""

    wandb: WandbMode = WandbMode.offline
    wandb_project: str = "elpo_ray"
    progress: bool = True
    """Progress bars on a terminal."""


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
