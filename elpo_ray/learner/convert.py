"""A training checkpoint as a plain Hugging Face folder, without the ranks that wrote it.

Needs no GPU and no process group: weights are put together on the CPU of one machine, in its memory
twice.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from elpo_ray.config.model import Precision
from elpo_ray.learner import lora
from elpo_ray.learner.checkpoint import StateFiles, read_meta
from elpo_ray.learner.policy import DTYPES

WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".index.json")


def write_model(checkpoint: Path, base: Path, target: Path) -> None:
    """Write the policy saved in `checkpoint` to the existing folder `target`; config, tokenizer and
    chat template come from `base`, a model of the same architecture.

    Raises ValueError if `checkpoint` is none, or of another architecture than `base`.
    """
    meta = read_meta(checkpoint)
    dtype = DTYPES[Precision(meta["precision"])]
    files = StateFiles(checkpoint)
    state = {name: _weight(files, part, meta["scale"]).to(dtype)
             for name, part in lora.parts(meta["parameters"]).items()}  # fmt: skip
    saved = {name: list(tensor.shape) for name, tensor in state.items()}
    shape = AutoConfig.from_pretrained(base)
    model = AutoModelForCausalLM.from_config(shape, dtype=dtype)  # type: ignore[no-untyped-call]
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    if shapes != saved:
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


def _weight(files: StateFiles, part: lora.Parts, scale: float) -> Tensor:
    base = files[f"weight/{part.base}"]
    if part.down is None or part.up is None:
        return base
    down, up = (files[f"weight/{name}"].to(base.dtype) for name in (part.down, part.up))
    return lora.merged(base, down, up, scale)
