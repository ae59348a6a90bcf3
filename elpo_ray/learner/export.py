"""The policy's weights under their Hugging Face names: in bounded buckets, or as a folder.

Invariants: all ranks iterate in lockstep (gathering shards is a collective); a bucket holds at most
`max_bytes`, or a single larger tensor; a tied tensor appears once, under the name that
`save_pretrained` keeps; adapters are merged into their weights, and the model stays as it is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from elpo_ray.learner import lora
from elpo_ray.learner.checkpoint import write_folder
from elpo_ray.learner.masters import gathered

SHARD_BYTES = 4 << 30


def named_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and persistent buffers, each once; under ZeRO-3 still in shards.

    Raises ValueError on models that Hugging Face stores in another layout than it runs.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions:
        raise ValueError(
            f"{type(model).__name__}: its checkpoint layout differs from its modules (fused "
            "experts), which cannot be exported yet; choose a dense model"
        )
    tied = set(model.all_tied_weights_keys)
    return {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name not in tied
    }


Sources = list[Tensor]
"""A weight, then its adapter's A and B if it has one."""


def weight_buckets(
    model: PreTrainedModel, rank: int, max_bytes: int, scale: float
) -> Iterator[dict[str, Tensor]]:
    """Full tensors by name, on the learner's device; rank 0 gets them, others empty dicts. A rank
    that gives itself out for 0 gets them too.

    `scale` multiplies the adapters' products (`lora.scale`). The tensors may be views of live
    weights: use them up before the next bucket or update.
    """
    for bucket in _split(_sources(named_weights(model)), max_bytes):
        every = [t for sources in bucket.values() for t in sources]
        sharded = any(hasattr(t, "ds_id") for t in every)
        full: dict[str, Tensor] = {}
        with gathered(every):
            if rank == 0:
                for name, (base, *adapter) in bucket.items():
                    whole = base.detach()
                    if adapter:
                        down, up = (t.detach() for t in adapter)
                        full[name] = lora.merged(whole, down, up, scale)
                    else:
                        full[name] = whole.clone() if sharded else whole
        yield full


def _sources(weights: dict[str, Tensor]) -> dict[str, Sources]:
    """What each weight of the merged model is made of."""
    return {
        name: [weights[part] for part in (p.base, p.down, p.up) if part is not None]
        for name, p in lora.parts(weights).items()
    }


def _split(weights: dict[str, Sources], max_bytes: int) -> Iterator[dict[str, Sources]]:
    bucket: dict[str, Sources] = {}
    size = 0
    for name, sources in weights.items():
        tensor = sources[0]
        nbytes = getattr(tensor, "ds_numel", tensor.numel()) * tensor.element_size()
        if bucket and size + nbytes > max_bytes:
            yield bucket
            bucket, size = {}, 0
        bucket[name] = sources
        size += nbytes
    if bucket:
        yield bucket


def export(model: PreTrainedModel, source: Path, target: Path, rank: int, scale: float) -> None:
    """Write a plain Hugging Face folder: the weights, and every other file of `source` (config,
    tokenizer, chat template). Raises OSError on all ranks if the disk is full."""
    write_folder(target, lambda partial: _write(model, source, partial, rank, scale))


def _write(
    model: PreTrainedModel, source: Path, partial: Path, rank: int, scale: float
) -> str | None:
    error: str | None = None
    shards: list[dict[str, Any]] = []
    for bucket in weight_buckets(model, rank, SHARD_BYTES, scale):
        if rank != 0 or error:
            continue
        try:
            name = f"shard-{len(shards):05d}"
            tensors = {key: tensor.contiguous().cpu() for key, tensor in bucket.items()}
            save_file(tensors, partial / name, metadata={"format": "pt"})
            shards.append({"file": name, "keys": list(tensors), "bytes": _nbytes(tensors)})
        except (OSError, SafetensorError) as failure:
            error = f"{partial}: {failure}"
    if rank == 0 and error is None:
        try:
            _finish(source, partial, shards, next(model.parameters()).dtype)
        except OSError as failure:
            error = str(failure)
    return error


def _finish(source: Path, partial: Path, shards: list[dict[str, Any]], dtype: torch.dtype) -> None:
    """Name the shards as Hugging Face does, index them, and bring the other files along."""
    if len(shards) == 1:
        (partial / shards[0]["file"]).rename(partial / "model.safetensors")
    else:
        index: dict[str, str] = {}
        for i, shard in enumerate(shards, start=1):
            name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            (partial / shard["file"]).rename(partial / name)
            index |= dict.fromkeys(shard["keys"], name)
        total = sum(shard["bytes"] for shard in shards)
        (partial / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": index})
        )
    for file in source.iterdir():
        weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth")
        if file.is_file() and not weights and not file.name.endswith(".index.json"):
            shutil.copyfile(file, partial / file.name)
    config = json.loads((partial / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    config.pop("torch_dtype", None)
    (partial / "config.json").write_text(json.dumps(config, indent=2))


def _nbytes(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())
