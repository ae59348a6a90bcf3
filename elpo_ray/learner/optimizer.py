"""AdamW under DeepSpeed: its settings, its learning-rate schedule, and a fresh start of it."""

from __future__ import annotations

import math
from typing import Any

import torch

from elpo_ray.config.learner import LrSchedule, OptimizerConfig


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


def apply_config(optimizer: torch.optim.Optimizer, cfg: OptimizerConfig) -> None:
    """Give every parameter group the settings of `cfg`."""
    for group in optimizer.param_groups:
        group.update(lr=cfg.lr, betas=tuple(cfg.betas), weight_decay=cfg.weight_decay)


def apply_gradients(engine: Any, clip_to: float | None) -> float | None:
    """Clip and step under DeepSpeed; returns the gradient norm before clipping, or None if it is
    not finite and the gradients were thrown away. `clip_to`: the norm, where DeepSpeed does not
    clip by itself (`backend.clips_itself`)."""
    if clip_to is None:
        engine.step()
        return float(engine.get_global_grad_norm()) if engine.was_step_applied() else None
    norm = torch.nn.utils.clip_grad_norm_(engine.module.parameters(), clip_to)
    if not torch.isfinite(norm):
        engine.zero_grad()
        return None
    engine.step()
    return float(norm)


def forget(optimizer: torch.optim.Optimizer) -> None:
    """Zero moments and step counts in place: DeepSpeed keeps references to these tensors."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                value.zero_()
