"""DeepSpeed as one learner rank uses it: process group, engine, AdamW, and moving to host memory.

Every rank loads the whole model into host memory once; ZeRO-3 shards it afterwards. Every tensor
stays the object that DeepSpeed holds, whatever is done to its memory here.

DeepSpeed is imported inside the functions: it picks its accelerator when imported, and
`join_group` must have said which one by then.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from elpo_ray.config.algorithm import ClipConfig, LossConfig
from elpo_ray.config.learner import LearnerConfig, LrSchedule, OptimizerConfig
from elpo_ray.config.model import ModelConfig, Precision
from elpo_ray.learner import lora
from elpo_ray.learner.policy import load_policy


@dataclass(kw_only=True)
class LearnerSettings:
    """The parts of the configuration that the learner reads."""

    model: ModelConfig = field(default_factory=ModelConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    temperature: float = 1.0
    """Temperature of the rollouts: the surrogate's policy is the distribution that was sampled."""


@dataclass(frozen=True, kw_only=True)
class RankProcess:
    """The place of this process among those of the learner."""

    rank: int = 0
    world_size: int = 1
    master_address: str = "127.0.0.1"
    master_port: int
    gpu: bool = False
    """Use the one visible CUDA device and nccl, not CPU and gloo."""
    threads: int = 1
    """Intra-operation threads on CPU."""
    timeout_s: float = 1800.0
    """Longest wait in a collective; a rank that died is noticed after this long."""


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

    policy = load_policy(
        folder,
        model.precision,
        max_context=model.max_context,
        checkpointing=learner.gradient_checkpointing is True,
    )
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
    policy = load_policy(
        folder, model.precision, max_context=model.max_context, checkpointing=False
    ).requires_grad_(False)
    if learner.zero_stage < 3:
        return policy.to(device)
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=policy, config=deepspeed_config(model, learner, 0.0, _numel(policy.parameters()))
    )
    return engine


def _numel(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


# --- optimizer ----------------------------------------------------------------------------------


def learning_rate(cfg: OptimizerConfig, step: int, total_steps: int) -> float:
    """The rate of optimizer step `step`, counted from 0, of `total_steps`.

    Grows linearly over the first warmup_ratio * total_steps steps, then stays (constant) or falls
    to 0 at `total_steps` (linear, cosine); beyond the last step it stays at its end value.
    """
    warmup = round(cfg.warmup_ratio * total_steps)
    if step < warmup:
        return cfg.lr * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if cfg.schedule is LrSchedule.linear:
        return cfg.lr * (1 - progress)
    if cfg.schedule is LrSchedule.cosine:
        return cfg.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return cfg.lr


def restart(optimizer: torch.optim.Optimizer, cfg: OptimizerConfig) -> None:
    """Zero moments and step counts, in place, and give every parameter group the settings of
    `cfg`."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()
    for group in optimizer.param_groups:
        group.update(lr=cfg.lr, betas=tuple(cfg.betas), weight_decay=cfg.weight_decay)


def apply_gradients(engine: Any, rate: float, clip_to: float | None) -> float | None:
    """Clip and step at learning rate `rate`; returns the gradient norm before clipping, or None if
    it is not finite and the gradients were thrown away. `clip_to`: the norm, where DeepSpeed does
    not clip by itself (`clips_itself`)."""
    for group in engine.basic_optimizer.param_groups:
        group["lr"] = rate
    if clip_to is None:
        engine.step()
        return float(engine.get_global_grad_norm()) if engine.was_step_applied() else None
    norm = torch.nn.utils.clip_grad_norm_(engine.module.parameters(), clip_to)
    if not torch.isfinite(norm):
        engine.zero_grad()
        return None
    engine.step()
    return float(norm)


# --- device memory ------------------------------------------------------------------------------


def offload(engine: Any) -> None:
    """Move all states to host memory. Until `onload` the engine is of no use.

    DeepSpeed moves what ZeRO keeps. What it leaves where it is moves here: weights that are not
    trained (under adapters) and, since ZeRO-3 moves them for DeepSpeed's own Adam only, master
    weights and moments. On CPU all of it goes from host memory to host memory.
    """
    from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum

    kinds = set(OffloadStateTypeEnum)
    if _moments(engine):
        kinds -= {OffloadStateTypeEnum.hp_params, OffloadStateTypeEnum.optim_states}
    engine.offload_states(include=kinds, pin_memory=False)
    _move(engine, torch.device("cpu"))
    if engine.device.type == "cuda":
        torch.cuda.empty_cache()


def onload(engine: Any) -> None:
    """Move everything back to the engine's device."""
    _move(engine, engine.device)
    engine.reload_states()
    # Its new links from parameters to their master weights lack the moments until made again.
    engine.optimizer._hp_optimizer_states_linked = False


def _move(engine: Any, device: torch.device) -> None:
    frozen = [p for p in engine.module.parameters() if not p.requires_grad and p.numel()]
    for tensor in [*frozen, *_moments(engine)]:
        tensor.data = tensor.data.to(device)


def _moments(engine: Any) -> list[Tensor]:
    """ZeRO-3's master weights and what AdamW keeps of them, unless they live in host memory."""
    masters = getattr(engine.optimizer, "fp32_partitioned_groups_flat", [])
    if engine.zero_offload_optimizer() is not None:
        return []
    states = (engine.basic_optimizer.state[master].values() for master in masters)
    return [*masters, *(t for values in states for t in values if isinstance(t, Tensor))]
