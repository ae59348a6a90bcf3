"""Where the model is: a Hugging Face folder on this node, checked before anything loads it."""

from __future__ import annotations

from pathlib import Path

from elpo_ray.config import require


def check_model_path(path: str) -> None:
    """Raise ValueError unless `path` is a usable folder or looks like a hub name `owner/name`."""
    folder = Path(path)
    if not folder.exists():
        is_hub_name = path.count("/") == 1 and not path.startswith((".", "/", "~"))
        require(is_hub_name, "model.path", path, "no such folder, and no hub name (owner/name)")
        return
    require(
        (folder / "config.json").is_file(),
        "model.path",
        path,
        "no config.json in it; name a Hugging Face model folder",
    )
    require(
        any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "vocab.json")),
        "model.path",
        path,
        "no tokenizer in it; copy tokenizer.json and tokenizer_config.json beside the weights",
    )


def local_folder(path: str | Path) -> Path:
    """The folder itself, or this node's snapshot of a hub name. ValueError if it is neither."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as fault:
        reason = str(fault).strip().split("\n")[0]
        raise ValueError(
            f"model.path={str(path)!r}: not a folder here and not to be had from the hub "
            f"({reason}); download it first and give its folder"
        ) from None
