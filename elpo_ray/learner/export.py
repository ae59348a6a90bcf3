"""The policy's weights under their Hugging Face names: in bounded buckets, or as a folder, from the
running ranks or from a checkpoint.

Invariants: all ranks iterate in lockstep (gathering shards is a collective); a bucket holds at most
`max_bytes`, or a single larger tensor; a tied tensor appears once, under the name that
`save_pretrained` keeps; experts are separate tensors, as Hugging Face stores them; adapters are
merged into their weights, and the model stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from elpo_ray.config.learner import LoraConfig
from elpo_ray.config.model import Precision
from elpo_ray.learner import lora
from elpo_ray.learner.checkpoint import SHARD_BYTES, StateFiles, read_meta, shared_folder
from elpo_ray.learner.masters import gathered
from elpo_ray.learner.policy import DTYPES
from elpo_ray.models.layout import named_weights, stored
from elpo_ray.runs.folder import copy_but_weights


def weight_buckets(
    model: PreTrainedModel, max_bytes: int, scale: float, *, materialize: bool
) -> Iterator[dict[str, Tensor]]:
    """Full tensors by name, on the learner's device; empty dicts on a rank that does not
    `materialize` them.

    `scale` multiplies the adapters' products (`lora.scale`). The tensors may be views of live
    weights: use them up before the next bucket or update.
    """
    for bucket in _split(_sources(named_weights(model)), max_bytes):
        every = [t for sources in bucket.values() for t in sources]
        sharded = any(hasattr(t, "ds_id") for t in every)
        full: dict[str, Tensor] = {}
        with gathered(every):
            if materialize:
                for name, (base, *adapter) in bucket.items():
                    whole = base.detach()
                    if adapter:
                        down, up = (t.detach() for t in adapter)
                        full[name] = lora.merged(whole, down, up, scale)
                    else:
                        full[name] = whole.clone() if sharded else whole
        yield stored(model, full)


def _sources(weights: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """What each weight of the merged model is made of: a weight, then its adapter's A and B if it
    has one."""
    return {
        name: [weights[part] for part in (s.base, s.down, s.up) if part is not None]
        for name, s in lora.sources(weights).items()
    }


def _split(weights: dict[str, list[Tensor]], max_bytes: int) -> Iterator[dict[str, list[Tensor]]]:
    bucket: dict[str, list[Tensor]] = {}
    size = 0
    for name, sources in weights.items():
        nbytes = _whole_bytes(sources[0])
        if bucket and size + nbytes > max_bytes:
            yield bucket
            bucket, size = {}, 0
        bucket[name] = sources
        size += nbytes
    if bucket:
        yield bucket


def _whole_bytes(tensor: Tensor) -> int:
    """Under ZeRO-3 those of the whole parameter, not of this rank's shard."""
    count: int = getattr(tensor, "ds_numel", tensor.numel())
    return count * tensor.element_size()


def largest_weight(model: PreTrainedModel) -> int:
    """Bytes of the largest tensor of `weight_buckets`; nothing is gathered."""
    return max(_whole_bytes(s[0]) for s in _sources(named_weights(model)).values())


def export(
    model: PreTrainedModel, source: Path, target: Path, scale: float, *, materialize: bool
) -> None:
    """Write a plain Hugging Face folder: the weights, and every other file of `source` (config,
    tokenizer, chat template). One rank, which must `materialize` the weights, writes; all take
    part. Raises OSError on all ranks if the disk is full."""
    shards: list[dict[str, Any]] = []
    with shared_folder(target) as (folder, attempts):
        for bucket in weight_buckets(model, SHARD_BYTES, scale, materialize=materialize):
            if materialize:
                attempts.run(partial(_write_shard, folder, bucket, shards))
        if materialize:
            dtype = next(model.parameters()).dtype
            attempts.run(lambda: _finish(source, folder, shards, dtype))


def _write_shard(folder: Path, bucket: dict[str, Tensor], shards: list[dict[str, Any]]) -> None:
    name = f"shard-{len(shards):05d}"
    tensors = {key: tensor.contiguous().cpu() for key, tensor in bucket.items()}
    save_file(tensors, folder / name, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    shards.append({"file": name, "keys": list(tensors), "bytes": size})


def _finish(source: Path, folder: Path, shards: list[dict[str, Any]], dtype: torch.dtype) -> None:
    """Name the shards as Hugging Face does, index them, and bring the other files along."""
    if len(shards) == 1:
        (folder / shards[0]["file"]).rename(folder / "model.safetensors")
    else:
        index: dict[str, str] = {}
        for i, shard in enumerate(shards, start=1):
            name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            (folder / shard["file"]).rename(folder / name)
            index |= dict.fromkeys(shard["keys"], name)
        total = sum(shard["bytes"] for shard in shards)
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": index})
        )
    copy_but_weights(source, folder)
    config = json.loads((source / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def convert_checkpoint(checkpoint: Path, base: Path, target: Path) -> None:
    """Write the policy saved in `checkpoint` to the existing folder `target`; config, tokenizer and
    chat template come from `base`, a model of the same architecture.

    Needs no GPU and no process group: weights are put together on the CPU of one machine, as many
    at a time as one file holds. Raises ValueError if `checkpoint` is none, or of another
    architecture than `base`.
    """
    meta = read_meta(checkpoint)
    dtype = DTYPES[Precision(meta["precision"])]
    files, sources = StateFiles(checkpoint), lora.sources(meta["parameters"])
    with torch.device("meta"):
        shape = AutoConfig.from_pretrained(base)
        model = AutoModelForCausalLM.from_config(shape, dtype=dtype)  # type: ignore[no-untyped-call]
    saved = {name: meta["parameters"][source.base] for name, source in sources.items()}
    if {name: list(parameter.shape) for name, parameter in model.named_parameters()} != saved:
        raise ValueError(
            f"checkpoint {checkpoint}: it holds a {meta['architecture']} of other shapes than the "
            f"model in {base}; give the model folder that the run began with"
        )
    shards: list[dict[str, Any]] = []
    for bucket in _split({name: [p] for name, p in model.named_parameters()}, SHARD_BYTES):
        whole = {n: _saved_weight(files, sources[n], meta["scale"]).to(dtype) for n in bucket}
        _write_shard(target, stored(model, whole), shards)
    _finish(base, target, shards, dtype)


def convert_adapter(checkpoint: Path, base: Path, target: Path) -> None:
    """Write the adapters saved in `checkpoint` to the existing folder `target`, as PEFT does, with
    the tokenizer and chat template of `base`. They belong to the weights that the phase began with,
    which `adapter_config.json` names. Raises ValueError if there are none."""
    meta = read_meta(checkpoint)
    if meta["lora"] is None:
        raise ValueError(
            f"adapter=only: {checkpoint} has no adapters, all weights were trained; use "
            "adapter=merged"
        )
    dtype, files = DTYPES[Precision(meta["precision"])], StateFiles(checkpoint)
    names = [
        name
        for source in lora.sources(meta["parameters"]).values()
        for name in (source.down, source.up)
        if name is not None
    ]
    copy_but_weights(base, target)
    for name in ("config.json", "generation_config.json"):  # a folder with them is a whole model
        (target / name).unlink(missing_ok=True)
    tensors = {name: files[f"weight/{name}"].to(dtype) for name in names}
    lora.write_adapter(target, LoraConfig(**meta["lora"]), tensors, meta["reference"])


def _saved_weight(files: StateFiles, sources: lora.WeightSources, scale: float) -> Tensor:
    base = files[f"weight/{sources.base}"]
    if sources.down is None or sources.up is None:
        return base
    down, up = (files[f"weight/{name}"].to(base.dtype) for name in (sources.down, sources.up))
    return lora.merged(base, down, up, scale)
