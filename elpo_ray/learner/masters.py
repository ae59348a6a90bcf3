"""AdamW's state of each parameter, whole and by name, however DeepSpeed has divided it.

A trained parameter has a master copy in fp32 and two moments: under ZeRO in flat pieces
spread over the ranks, in bf16 beside the model's own weights. Invariants: reading and writing are
collectives, in one order on all ranks; what was written is what is read back, bit by bit, whatever
the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


class Masters:
    """The optimizer's state of a DeepSpeed engine, whose AdamW is `basic_optimizer`."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._optimizer = engine.optimizer
        for piece in self._pieces():
            state = engine.basic_optimizer.state[piece]
            if not state:  # AdamW makes it in its first step
                state["step"] = torch.zeros((), device=piece.device)
                state.update({key: torch.zeros_like(piece) for key in MOMENTS})
        link = getattr(self._optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()
        # Without ZeRO, bf16 parameters have a master each.
        narrow = getattr(self._optimizer, "fp16_groups", [])
        wide = getattr(self._optimizer, "fp32_groups", [])
        self._master = {
            id(parameter): master
            for group, of_group in zip(narrow, wide, strict=bool(wide))
            for parameter, master in zip(group, of_group, strict=True)
        }

    def _pieces(self) -> list[Tensor]:
        """The tensors that AdamW steps on this rank."""
        flat = getattr(self._optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3
        if flat is not None:
            return list(flat)
        return [p for group in self._engine.basic_optimizer.param_groups for p in group["params"]]

    @property
    def steps(self) -> float:
        """Steps that AdamW has taken, for its bias correction."""
        return float(self._engine.basic_optimizer.state[self._pieces()[0]]["step"])

    @steps.setter
    def steps(self, value: float) -> None:
        for piece in self._pieces():
            self._engine.basic_optimizer.state[piece]["step"].fill_(value)

    def read(self, parameter: nn.Parameter, moment: str | None = None) -> Tensor:
        """The master copy, or a moment, whole, on the parameter's device. May be live: copy it."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        whole: Tensor
        if self._divided(parameter):
            if moment is None:
                whole = safe_get_full_fp32_param(parameter)
            else:
                whole = safe_get_full_optimizer_state(parameter, moment)
            return whole
        whole = self._master.get(id(parameter), parameter)
        if moment is not None:
            whole = self._engine.basic_optimizer.state[whole][moment]
        return whole.detach()

    def write(self, parameter: Any, value: Tensor, moment: str | None = None) -> None:
        """Replace what `read` gives; `value` is whole. The model's own weights stay."""
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        if hasattr(parameter, "ds_id"):
            part = _part(value.flatten(), parameter.ds_tensor.numel())
            if moment is None:
                safe_set_local_fp32_param(parameter, part)
            else:
                safe_set_local_optimizer_state(parameter, part, moment)
        elif self._divided(parameter):
            if moment is None:
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, moment)
        else:
            self.read(parameter, moment).copy_(value)

    def _divided(self, parameter: nn.Parameter) -> bool:
        return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _part(flat: Tensor, size: int) -> Tensor:
    """This rank's piece of a parameter under ZeRO-3; the last one is padded."""
    part = flat[size * dist.get_rank() : size * (dist.get_rank() + 1)]
    return nn.functional.pad(part, (0, size - len(part)))


def gathered(parameters: list[Tensor], *, written: bool = False) -> AbstractContextManager[Any]:
    """Whole parameters inside. `written`: what rank 0 puts into them is what all ranks keep."""
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if not sharded:
        return nullcontext()
    import deepspeed

    whole: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
        sharded, modifier_rank=0 if written else None
    )
    return whole


def set_weight(parameter: nn.Parameter, value: Tensor) -> None:
    """Replace the weight that the model computes with."""
    with torch.no_grad(), gathered([parameter], written=True):
        if dist.get_rank() == 0 or not hasattr(parameter, "ds_id"):
            parameter.copy_(value)


def state_tensors(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Everything that a checkpoint holds, by key, whole: `weight/NAME` of every parameter (the
    master copy where it is trained), `exp_avg/NAME` and `exp_avg_sq/NAME` of the trained ones.
    Copy each before asking for the next."""
    masters = Masters(engine)
    for name, parameter in engine.module.model.named_parameters():
        if parameter.requires_grad:
            yield f"weight/{name}", masters.read(parameter)
            for moment in MOMENTS:
                yield f"{moment}/{name}", masters.read(parameter, moment)
        else:
            with gathered([parameter]):
                yield f"weight/{name}", parameter.detach()
