"""Low-rank adapters by PEFT, put into the model in place.

Invariants: the model keeps its class and its forward pass, so that tree attention, ZeRO and
checkpointing do not know of adapters; only adapters require gradients; outside the learner
(engines, exported folders) there are only merged weights W + scale * B A under their Hugging Face
names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from elpo_ray.config.learner import LoraConfig

_ADAPTER = "default"
_DOWN, _UP = f".lora_A.{_ADAPTER}.weight", f".lora_B.{_ADAPTER}.weight"


def attach(model: PreTrainedModel, config: LoraConfig) -> None:
    """Freeze the model and add adapters, B = 0, hence the same function.

    Raises ValueError on a target that no module is called, or that is the embedding or the output
    head, whose weights the learner reads directly.
    """
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer

    assert config.rank is not None, "adapters have a rank"
    targets = list(config.target_modules)
    key = f"learner.lora.target_modules={targets}"
    linear = targets == ["all-linear"]
    for target in [] if linear else targets:
        if not any(f".{name}".endswith(f".{target}") for name, _ in model.named_modules()):
            raise ValueError(f"{key}: no module of the model is called {target}")
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules="all-linear" if linear else targets,
    )
    try:
        peft.inject_adapter_in_model(settings, model, adapter_name=_ADAPTER)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    ends = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[no-untyped-call]
    if any(isinstance(module, BaseTunerLayer) for module in ends):
        raise ValueError(f"{key}: embeddings and output head take no adapter; leave them out")


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes without its adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def scale(config: LoraConfig | None) -> float:
    """The factor before B A in a merged weight; 0 without adapters."""
    if config is None:
        return 0.0
    assert config.rank is not None, "adapters have a rank"
    return config.alpha / config.rank


@dataclass(frozen=True)
class WeightSources:
    """Names of the tensors that make up one weight of the merged model."""

    base: str
    down: str | None
    """The name of A, of shape [rank, in]; None where there is no adapter."""
    up: str | None
    """The name of B, of shape [out, rank]."""


def sources(names: Iterable[str]) -> dict[str, WeightSources]:
    """What each weight of the merged model is made of, by its name there and in order, from the
    names of the model with or without adapters."""
    every = dict.fromkeys(names)
    found: dict[str, WeightSources] = {}
    for name in every:
        if name.endswith((_DOWN, _UP)):
            continue
        owner = name.removesuffix(".base_layer.weight")
        down, up = owner + _DOWN, owner + _UP
        adapted = owner != name and down in every
        plain = name.replace(".base_layer.", ".")
        found[plain] = WeightSources(name, down if adapted else None, up if adapted else None)
    return found


def write_adapter(
    folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor], reference: str
) -> None:
    """Write adapters, given under the names of the model with adapters, as PEFT stores them.
    `reference` = the model that they belong to."""
    import peft

    assert config.rank is not None, "adapters have a rank"
    targets = config.target_modules
    if targets == ["all-linear"]:
        owners = {name.removesuffix(_DOWN) for name in tensors if name.endswith(_DOWN)}
        targets = sorted({owner.rpartition(".")[2] for owner in owners})
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=list(targets),
        task_type="CAUSAL_LM",
        base_model_name_or_path=reference,
        inference_mode=True,
    )
    settings.save_pretrained(str(folder))
    stored = {
        f"base_model.model.{name.replace(f'.{_ADAPTER}.', '.')}": tensor.contiguous()
        for name, tensor in tensors.items()
    }
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def merged(base: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """W + scale * B A, added up in fp32 or wider, in W's precision."""
    wide = torch.promote_types(base.dtype, torch.float32)
    return base.to(wide).addmm(up.to(wide), down.to(wide), alpha=scale).to(base.dtype)
