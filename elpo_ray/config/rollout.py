"""Sampling, the engine that decodes, the sandbox that runs the tool calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Annotated

from elpo_ray.config.rules import (
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Section,
    at_least,
    between,
)

Temperature = Annotated[float, between(0, 2, "use a value in (0, 2], as vLLM does", ends="(]")]


@dataclass(kw_only=True)
class SamplingConfig(Section, key="sampling"):
    """How the policy is sampled in training."""

    temperature: Temperature = 1.0
    """Temperature at which the engine samples. The learner's probabilities use it too."""
    top_p: PositiveFraction = 1.0
    """Each token is sampled from the likeliest tokens that together have this probability."""


class Transfer(Enum):
    """How weights travel from the learner to the engines."""

    auto = "auto"
    """host on CPU, ipc if `cluster.colocated`, else nccl."""
    host = "host"
    """Through host memory and Ray's object store: anywhere, also between hosts."""
    nccl = "nccl"
    """Weights travel from GPU to GPU."""
    ipc = "ipc"
    """Within one GPU, whose memory both sides map."""


@dataclass(kw_only=True)
class EngineConfig(Section, key="engine"):
    """One vLLM engine of a rollout worker."""

    tensor_parallel_size: PositiveInt = 1
    """GPUs over which the layers of one engine are divided."""
    gpu_memory_utilization: PositiveFraction = 0.85
    """Share of a GPU's memory that the engine takes: weights, activations and KV cache."""
    kv_cache_gib: PositiveInt = 1
    """Size of the KV cache on CPU, GiB; on GPU `gpu_memory_utilization` decides."""
    max_num_seqs: PositiveInt = 256
    """Most sequences that are decoded at once."""
    enforce_eager: bool = False
    """The engine neither compiles the model nor captures CUDA graphs: it starts sooner and decodes
    more slowly."""
    transfer: Transfer = Transfer.auto
    """How new weights come; `auto` = host on CPU, ipc if `cluster.colocated`, else nccl."""
    endpoint: str | None = None
    """Base URL of an OpenAI-compatible server that samples instead of vLLM; never in training."""
    served_model: str | None = None
    """The model to ask `endpoint` for."""


class Preload(Enum):
    """What sessions find imported, as far as it is installed (`sandbox.supervisor.PRELOADS`)."""

    none = "none"
    """Nothing."""
    math = "math"
    """numpy and sympy."""
    sci = "sci"
    """scipy and pandas too; each call costs some milliseconds more."""


class Isolation(Enum):
    """The least tier that an actor starts with, see `docs/isolation.md`."""

    strong = "strong"
    """What `standard` has, and namespaces with a root of their own."""
    standard = "standard"
    """Landlock, a seccomp filter and limits; works without root in an ordinary container."""


class LastLine(Enum):
    """How the policy gets to see the value of a cell's last line."""

    value = "value"
    """The last expression's `repr`, as in a notebook."""
    printed = "printed"
    """The last line's text in `print(...)`, as the original recipe does with any line that does
    not begin with "print": an assignment or a block there is a syntax error."""


SnapshotMemory = Annotated[
    int, at_least(1, "use 1 or more, or null for a share of the host's memory")
]
ReplayBelow = Annotated[float, at_least(0, "use 0 to keep every state, or a few milliseconds")]


@dataclass(kw_only=True)
class SandboxConfig(Section, key="sandbox"):
    """The code interpreter. The limits apply to each call."""

    wall_s: PositiveFloat = 10.0
    """Seconds that a call may take by the clock."""
    cpu_s: PositiveFloat = 10.0
    """Processor seconds that a call may use."""
    memory_mib: PositiveInt = 2048
    """Size of a process's address space."""
    output_kib: PositiveInt = 64
    """How much of each output stream is kept; at 1 MiB the process is killed."""
    preload: Preload = Preload.math
    isolation: Isolation = Isolation.standard
    allow_degraded: bool = False
    """Sandboxes start with fewer layers where the machine lacks some: for code you trust."""
    bubblewrap: bool = False
    """`bwrap` makes the namespaces of `strong`, where ordinary users may make none but a setuid
    `bwrap` may."""
    stateless: bool = False
    """Every call starts from the setup: nothing is kept from call to call."""
    last_line: LastLine = LastLine.value
    endpoint: str | None = None
    """URL of a SandboxFusion service that runs the code instead; branches are then replayed, and
    isolation and preloaded modules are the service's."""
    snapshot_mib: SnapshotMemory | None = None
    """Memory per sandbox actor for kept states; null = its share of a quarter of the host's."""
    replay_below_ms: ReplayBelow = 0.0
    """Calls that took less since the last kept state are repeated where a branch starts, so that
    their states need not be kept: saves a fork a call, for deterministic code. 0 = keep all."""
    retries: NonNegativeInt = 2
    """How often a call is tried again on another session after the sandbox itself failed."""
    max_failure_rate: Fraction = 0.01
    """Largest share of calls that the sandbox may lose for good; above it a step stops the run."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.endpoint is not None and not self.endpoint.startswith(("http://", "https://")):
            remedy = "begin with http:// or https://, or use null for the cluster's own sandboxes"
            yield "endpoint", remedy
