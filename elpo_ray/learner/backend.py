"""Process group and DeepSpeed engine of one learner rank.

Every rank loads the whole model into host memory once; ZeRO-3 shards it afterwards.

DeepSpeed is imported inside the functions: it picks its accelerator when imported, and
`join_group` must have said which one by then.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from elpo_ray.collector import importing
from elpo_ray.config import LearnerConfig, ModelConfig, OptimizerConfig, Precision
from elpo_ray.learner import lora
from elpo_ray.learner.attention import choose_backend
from elpo_ray.learner.batching import Form
from elpo_ray.learner.policy import DTYPES, PolicyModule, load_policy
from elpo_ray.learner.settings import LearnerSettings


@dataclass(frozen=True, kw_only=True)
class RankProcess:
    """Where this process stands among the learner's."""

    rank: int = 0
    world_size: int = 1
    master_address: str = "127.0.0.1"
    master_port: int
    gpu: bool = False
    """Use the one visible CUDA device and nccl, not CPU and gloo."""
    threads: int = 1
    """Intra-operation threads on CPU."""
    timeout_s: float = 1800.0
    """Of a collective; a rank that died is noticed after this long."""


def join_group(process: RankProcess) -> torch.device:
    """Enter the process group, unless this process has, and return this rank's device."""
    os.environ.update(
        RANK=str(process.rank),
        WORLD_SIZE=str(process.world_size),
        LOCAL_RANK="0",
        MASTER_ADDR=process.master_address,
        MASTER_PORT=str(process.master_port),
        DS_ACCELERATOR="cuda" if process.gpu else "cpu",
    )
    torch.set_num_threads(process.threads)
    device = torch.device("cuda", 0) if process.gpu else torch.device("cpu")
    if process.gpu:
        torch.cuda.set_device(device)
    if torch.distributed.is_initialized():
        return device
    torch.distributed.init_process_group(
        "nccl" if process.gpu else "gloo",
        init_method=f"tcp://{process.master_address}:{process.master_port}",
        rank=process.rank,
        world_size=process.world_size,
        timeout=timedelta(seconds=process.timeout_s),
    )
    with importing():
        import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Its shared-memory reduction serves inference only and would be compiled at start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if process.gpu else "gloo", auto_mpi_discovery=False, verbose=False
    )
    return device


def clips_itself(model: ModelConfig, learner: LearnerConfig) -> bool:
    """Whether DeepSpeed runs the bare optimizer (stage 0, fp32): it then neither reports the
    gradient norm nor refuses one that is not finite, so the learner clips."""
    return learner.zero_stage == 0 and model.precision is Precision.fp32


def deepspeed_config(
    model: ModelConfig, learner: LearnerConfig, grad_norm: float, parameters: int
) -> dict[str, Any]:
    """DeepSpeed's configuration; `parameters`, how many are trained, bounds its buffers."""
    bucket = min(parameters, 500_000_000)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0 if clips_itself(model, learner) else grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "zero_optimization": {
            "stage": learner.zero_stage,
            "contiguous_gradients": True,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
    }
    if learner.zero_stage == 3:
        config["zero_optimization"]["stage3_prefetch_bucket_size"] = min(bucket, 50_000_000)
    if learner.offload_optimizer:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if model.precision is Precision.bf16:
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if learner.zero_stage > 0:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def build_engine(
    folder: Path, model: ModelConfig, learner: LearnerConfig, optimizer: OptimizerConfig
) -> Any:
    """The trainable policy under DeepSpeed, its AdamW in `basic_optimizer`. With `lora.rank`
    only the adapters are trained."""
    import deepspeed

    policy = load_policy(folder, model.precision, checkpointing=learner.gradient_checkpointing)
    if learner.adapters is not None:
        lora.attach(policy.model, learner.adapters)
    trained = [p for p in policy.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(
        trained,
        lr=optimizer.lr,
        betas=(optimizer.betas[0], optimizer.betas[1]),
        weight_decay=optimizer.weight_decay,
        fused=True,
    )
    engine, *_ = deepspeed.initialize(
        model=policy,
        optimizer=adamw,
        config=deepspeed_config(model, learner, optimizer.grad_norm, _numel(trained)),
    )
    return engine


def build_reference(
    folder: Path, model: ModelConfig, learner: LearnerConfig, device: torch.device
) -> Any:
    """A frozen policy; under ZeRO-3 sharded over the ranks like the trained one."""
    policy = load_policy(folder, model.precision, checkpointing=False).requires_grad_(False)
    if learner.zero_stage < 3:
        return policy.to(device)
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=policy, config=deepspeed_config(model, learner, 0.0, _numel(policy.parameters()))
    )
    return engine


def _numel(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def form_of(policy: PolicyModule, settings: LearnerSettings, device: torch.device) -> Form:
    """How this policy's packs are laid out. Raises ValueError on a backend that cannot run here."""
    dtype = DTYPES[settings.model.precision]
    if not policy.takes_trees:
        return Form(device, None, dtype)
    asked = settings.learner.attention
    return Form(device, choose_backend(asked, policy.head_dim, device, dtype), dtype)
