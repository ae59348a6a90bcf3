"""A learner rank that leaves its device to others: its states in host memory, and back.

DeepSpeed moves what ZeRO keeps. What it leaves where it is moves here: weights that are not trained
(under adapters) and, since ZeRO-3 moves them for DeepSpeed's own Adam only, master weights and
moments. Every tensor stays the object that DeepSpeed holds, only its memory changes. On CPU all of
it goes from host memory to host memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def leave(engine: Any) -> None:
    """Everything to host memory. Until `enter` the engine is of no use."""
    from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum

    kinds = set(OffloadStateTypeEnum)
    if _moments(engine):
        kinds -= {OffloadStateTypeEnum.hp_params, OffloadStateTypeEnum.optim_states}
    engine.offload_states(include=kinds, pin_memory=False)
    _move(engine, torch.device("cpu"))
    if engine.device.type == "cuda":
        torch.cuda.empty_cache()


def enter(engine: Any) -> None:
    """Back to the engine's device."""
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
