"""Where the model is: a Hugging Face folder on this node, checked before anything loads it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from elpo_ray.config.rules import require
from elpo_ray.runs.folder import WEIGHT_FILES, RunFolder, run_of


def check_model_path(path: str, key: str = "model.path") -> None:
    """Raise ValueError unless `path` is a usable folder, a run or a checkpoint of one that has
    weights, or looks like a hub name `owner/name`. `key` is where it stands."""
    folder = Path(path)
    run = run_of(folder)
    if run is not None:
        checkpoint_of(run, folder, key)
        return
    if not folder.exists():
        is_hub_name = path.count("/") == 1 and not path.startswith((".", "/", "~"))
        require(
            is_hub_name and folder.parent != Path("runs"),
            key,
            path,
            "name a model's folder, a run's, or a model on the hub: "
            "this is no such folder, and no hub name (owner/name)",
        )
        return
    require(
        (folder / "config.json").is_file(),
        key,
        path,
        "no config.json in it, hence no model, and no config.yaml with checkpoints, hence no run; "
        "name a Hugging Face model folder or a run folder",
    )
    require(
        any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "vocab.json")),
        key,
        path,
        "no tokenizer in it; copy tokenizer.json and tokenizer_config.json beside the weights",
    )


def checkpoint_of(run: RunFolder, path: Path, key: str) -> Path | None:
    """The checkpoint of `run` that `path` names, or its newest; None for a finished cold start,
    which has its model. Raises ValueError, naming `key`, if there is none."""
    named = path != run.path
    if not named and (run.path / "model").is_dir():
        return None
    checkpoint = path if named else run.newest_checkpoint()
    what = "is no complete checkpoint" if named else "has no complete checkpoint yet"
    if checkpoint is None or not (checkpoint / "state.json").is_file():
        raise ValueError(f"{key}={str(path)!r}: {what}; name one under {run.checkpoints}")
    return checkpoint


def check_weights(folder: Path) -> list[Path]:
    """The weight files of a model folder. Raises ValueError if there are none, if one that its
    index names is absent, or if one is damaged: not as long as its own header says."""
    key, index = "model.path", folder / "model.safetensors.index.json"
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(shards - set(names))
        require(
            not missing,
            key,
            str(folder),
            f"{len(missing)} of {len(shards)} weight files absent ({', '.join(missing[:1])}); "
            "download the folder again",
        )
        names = sorted(shards)
    require(bool(names), key, str(folder), "no *.safetensors in it; convert the weights")
    files = [folder / name for name in names]
    for file in files:
        try:
            with safe_open(file, "np"):
                pass
        except SafetensorError as error:
            size = f"{file.stat().st_size:,} bytes"
            raise ValueError(
                f"{key}={str(folder)!r}: {file.name} is damaged, it has {size} ({error}); "
                "download it again"
            ) from None
    return files


def context_limit(folder: Path) -> int | None:
    """The most tokens of context that the model's positions allow. None where `config.json` does
    not say, or scales the positions by a factor, which is left to the engine."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    for key in ("rope_scaling", "rope_parameters"):
        if "factor" in (text.get(key) or {}):
            return None
    limit = text.get("max_position_embeddings")
    return limit if isinstance(limit, int) else None


def check_context(folder: Path, key: str, max_context: int) -> None:
    """Raise ValueError, naming `key`, if the model has fewer positions than `max_context`."""
    limit = context_limit(folder)
    require(
        limit is None or max_context <= limit,
        key,
        max_context,
        f"the model in {folder} has max_position_embeddings={limit}; lower it",
    )


WEIGHTS = ["*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack"]
"""Files of a model on the hub that are large, and needed by what computes with it only."""


def local_folder(path: str | Path, *, weights: bool = True, key: str = "model.path") -> Path:
    """The folder itself, or this node's snapshot of a hub name, if need be without its `weights`.
    ValueError if it is neither."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), ignore_patterns=None if weights else WEIGHTS))
    except (OSError, ValueError) as fault:
        reason = str(fault).strip().split("\n")[0]
        raise ValueError(
            f"{key}={str(path)!r}: not a folder here and not to be had from the hub "
            f"({reason}); download it first and give its folder"
        ) from None


SLICE = 1 << 16
"""Bytes read at each place of a large file for the fingerprint."""
SLICES = 16


def fingerprint(folder: Path) -> str:
    """A digest that changes with the weights, the tokenizer and the template of a model folder.
    Large files are sampled at `SLICES` places, which every optimizer step changes."""
    digest = hashlib.sha256()
    for file in _files(folder):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for place in range(SLICES):
                stream.seek(place * max(0, size - SLICE) // (SLICES - 1))
                digest.update(stream.read(SLICE))
    return digest.hexdigest()[:16]


def texts_fingerprint(folder: Path) -> str:
    """A digest of every byte of a model folder that is not in a weight file: its shape, tokenizer
    and chat template."""
    digest = hashlib.sha256()
    for file in _files(folder):
        if not file.name.endswith(WEIGHT_FILES):
            text = file.read_bytes()
            digest.update(f"{file.name} {len(text)}\n".encode() + text)
    return digest.hexdigest()[:16]


def _files(folder: Path) -> list[Path]:
    return [f for f in sorted(folder.iterdir()) if f.is_file() and not f.name.startswith(".")]
