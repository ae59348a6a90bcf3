"""A model's weights under the names and in the shapes of its folder.

transformers runs some models in another layout than it stores: the experts of a layer are one
tensor in memory and many in the files. Engines and exported folders get the files' layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from elpo_ray.weights.host import checkpoint_shapes

SHOWN = 3
"""Names in an error."""


def named_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and persistent buffers under the model's own names, each once; under ZeRO-3 still
    in shards."""
    tied = set(model.all_tied_weights_keys)
    return {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name not in tied
    }


def stored(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Some of the model's tensors as its folder has them: views where the layout differs."""
    if not tensors or getattr(model, "_weight_conversions", None) == []:
        return dict(tensors)
    reverted: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    return reverted


def stored_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a learner of this model hands out. Needs no weights."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in named_weights(model).items():  # one by one, as buckets may come
        parts = stored(model, {name: tensor.detach()})
        shapes |= {part: tuple(value.shape) for part, value in parts.items()}
    return shapes


def check_layout(folder: Path, config: PretrainedConfig, *, complete: bool) -> None:
    """Raise ValueError unless every tensor that the learner will hand to the engines has its
    counterpart in the files of `folder`; with `complete` also the reverse, as engines on CPU take
    all of their weights or none. Other files than safetensors, which only engines on GPUs take, are
    not looked at."""
    if not complete and not any(folder.glob("*.safetensors")):
        return
    files, ours = checkpoint_shapes(folder), stored_shapes(config)
    strange = [name for name, shape in ours.items() if files.get(name) != shape]
    rest = [name for name in files if name not in ours] if complete else []
    problem = None
    if strange:
        problem = f"the learner would send {_some(strange)}, not in its files in that shape"
    elif rest:
        problem = f"its files hold {_some(rest)}, which the learner would not send"
    if problem:
        raise ValueError(
            f"model.path={str(folder)!r}: it cannot be trained: {problem}; load it with "
            "transformers' AutoModelForCausalLM and name the folder that save_pretrained writes"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
