"""Sampling, the engine that decodes, the sandbox that runs the tool calls."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from elpo_ray.config.rules import require


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


class Transfer(Enum):
    """How weights travel from the learner to the engines."""

    auto = "auto"
    host = "host"
    """Through host memory and Ray's object store: anywhere, also between hosts."""
    nccl = "nccl"
    """From GPU to GPU."""
    ipc = "ipc"
    """Within one GPU, whose memory both sides map."""


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
    transfer: Transfer = Transfer.auto
    """How new weights come; `auto`: host on CPU, ipc where `cluster.colocated`, else nccl."""
    endpoint: str | None = None
    """Base URL of an OpenAI-compatible server that samples instead of vLLM; never in training."""
    served_model: str | None = None
    """The model to ask `endpoint` for."""

    def __post_init__(self) -> None:
        for key in ("tensor_parallel_size", "kv_cache_gib", "max_num_seqs"):
            require(getattr(self, key) >= 1, f"engine.{key}", getattr(self, key), "use 1 or more")
        require(
            0 < self.gpu_memory_utilization <= 1,
            "engine.gpu_memory_utilization",
            self.gpu_memory_utilization,
            "use a value in (0, 1]",
        )


class Preload(Enum):
    """What sessions find imported, as far as it is installed (`sandbox.supervisor.PRELOADS`)."""

    none = "none"
    math = "math"
    """numpy and sympy."""
    sci = "sci"
    """scipy and pandas too; each call costs some milliseconds more."""


class Isolation(Enum):
    """The least tier that an actor starts with, see `docs/isolation.md`."""

    strong = "strong"
    standard = "standard"


class LastLine(Enum):
    """How the policy comes to see what a cell's last line is worth."""

    value = "value"
    """The last expression's `repr`, as in a notebook."""
    printed = "printed"
    """The last line's text in `print(...)`, as the original recipe does with any line that does
    not begin with "print": an assignment or a block there is a syntax error."""


@dataclass(kw_only=True)
class SandboxConfig:
    """The code interpreter. Limits are per call."""

    wall_s: float = 10.0
    cpu_s: float = 10.0
    memory_mib: int = 2048
    """Address space of a process."""
    output_kib: int = 64
    """Kept per stream; the process is killed at 1 MiB."""
    preload: Preload = Preload.math
    isolation: Isolation = Isolation.standard
    allow_degraded: bool = False
    """Start with less where the machine lacks layers: for code you trust."""
    bubblewrap: bool = False
    """Have `bwrap` make the namespaces of `strong`: where ordinary users may make none, but a
    setuid `bwrap` may."""
    stateless: bool = False
    """Every call starts from the setup: nothing is kept from call to call."""
    last_line: LastLine = LastLine.value
    endpoint: str | None = None
    """URL of a SandboxFusion service that runs the code instead; branches are then replayed, and
    isolation and preloaded modules are the service's."""
    snapshot_mib: int | None = None
    """Memory per sandbox actor for kept states; null = its share of a quarter of the host's."""
    replay_below_ms: float = 0.0
    """Calls that took less, since the last kept state, are repeated where a branch starts instead
    of kept: saves a fork a call, for tasks whose code always does the same. 0 = keep them all."""
    retries: int = 2
    """Attempts on another session after the sandbox itself failed."""
    max_failure_rate: float = 0.01
    """Share of calls lost to the sandbox for good above which a step stops loudly."""

    def __post_init__(self) -> None:
        for key in ("wall_s", "cpu_s", "memory_mib", "output_kib"):
            require(getattr(self, key) > 0, f"sandbox.{key}", getattr(self, key), "use above 0")
        require(
            self.snapshot_mib is None or self.snapshot_mib > 0,
            "sandbox.snapshot_mib",
            self.snapshot_mib,
            "use above 0, or null for a share of the host's memory",
        )
        require(
            self.endpoint is None or self.endpoint.startswith(("http://", "https://")),
            "sandbox.endpoint",
            self.endpoint,
            "begin with http:// or https://, or use null for sandboxes of the cluster's own",
        )
        require(
            self.replay_below_ms >= 0,
            "sandbox.replay_below_ms",
            self.replay_below_ms,
            "use 0 to keep every state, or a few milliseconds",
        )
        require(self.retries >= 0, "sandbox.retries", self.retries, "use 0 or more")
        require(
            0 <= self.max_failure_rate <= 1,
            "sandbox.max_failure_rate",
            self.max_failure_rate,
            "use a value in [0, 1]",
        )
