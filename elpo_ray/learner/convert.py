"""A training checkpoint as a plain Hugging Face folder, without the ranks that wrote it.

Needs no GPU and no process group: weights are put together on the CPU of one machine, in its memory
twice.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from elpo_ray.config import Precision
from elpo_ray.learner.checkpoint import META, STATE
from elpo_ray.learner.policy import DTYPES

WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".index.json")


def write_model(checkpoint: Path, base: Path, target: Path) -> None:
    """Write the policy saved in `checkpoint` to the existing folder `target`; config, tokenizer and
    chat template come from `base`, a model of the same architecture.

    Raises ValueError if `checkpoint` is none, or of another architecture than `base`.
    """
    if not (checkpoint / META).is_file():
        raise ValueError(f"checkpoint {checkpoint}: no {META}; name a folder that a run has saved")
    meta: dict[str, Any] = json.loads((checkpoint / META).read_text())
    dtype = DTYPES[Precision(meta["precision"])]
    prefix = "model."  # the policy module holds the model under this name
    state = {
        name.removeprefix(prefix): tensor.to(dtype)
        for name, tensor in _whole(checkpoint, meta["zero_stage"]).items()
        if name.removeprefix(prefix) in meta["parameters"]
    }
    shape = AutoConfig.from_pretrained(base)
    model = AutoModelForCausalLM.from_config(shape, dtype=dtype)  # type: ignore[no-untyped-call]
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    if shapes != meta["parameters"] or shapes.keys() != state.keys():
        raise ValueError(
            f"checkpoint {checkpoint}: it holds a {meta['architecture']} of other shapes than the "
            f"model in {base}; give the model folder that the run began with"
        )
    model.load_state_dict(state, strict=False)  # tied weights are absent
    model.save_pretrained(target)
    for file in base.iterdir():
        own = file.name.endswith(WEIGHT_FILES) or file.name == "config.json"
        if file.is_file() and not own:
            shutil.copyfile(file, target / file.name)


def _whole(checkpoint: Path, stage: int) -> dict[str, torch.Tensor]:
    """All weights by the names of DeepSpeed's module. Below ZeRO-3 every rank has them whole."""
    if stage < 3:
        file = checkpoint / STATE / "mp_rank_00_model_states.pt"
        saved = torch.load(file, map_location="cpu", weights_only=False)
        return dict(saved["module"])
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()):
        return dict(get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=STATE))
