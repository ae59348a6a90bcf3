"""Folders that appear whole or not at all, written by all ranks together.

Invariants: files go to a sibling `NAME.partial`, are flushed to disk, and become NAME by a rename;
an error on any rank (a full disk) is raised on every rank, removes the partial folder, and leaves
whatever NAME held before untouched; no rank leaves a collective early.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

META = "meta.json"
STATE = "state"
"""DeepSpeed's tag: the folder of its own files."""


def write_folder(path: Path, write: Callable[[Path], str | None]) -> None:
    """Call `write(partial folder)` on every rank and move the result to `path`.

    `write` may use collectives, so it must not raise OSError but return what went wrong. Raises
    OSError on all ranks if any rank failed.
    """
    partial = path.with_name(path.name + ".partial")
    _agree(path, partial, _attempt(lambda: _fresh(partial)) if dist.get_rank() == 0 else None)
    error = write(partial)
    _agree(path, partial, error or _attempt(lambda: _flush(partial)))
    _agree(path, partial, _attempt(lambda: _move(partial, path)) if dist.get_rank() == 0 else None)


def _attempt(action: Callable[[], None]) -> str | None:
    try:
        action()
    except OSError as error:
        return str(error)
    return None


def _agree(path: Path, partial: Path, error: str | None) -> None:
    """Raise on every rank if any of them has an error; also a barrier."""
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(errors) if text]
    if failed:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{path} was not written; what it held before is untouched ({failed[0]})")


def _fresh(partial: Path) -> None:
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)


def _flush(folder: Path) -> None:
    """fsync every file and folder below, so that the rename cannot outlive the data."""
    for entry in (*folder.rglob("*"), folder):
        handle = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _move(partial: Path, path: Path) -> None:
    replaced = path.with_name(path.name + ".replaced")
    if path.exists():
        path.rename(replaced)
    partial.rename(path)
    shutil.rmtree(replaced, ignore_errors=True)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _PatientWriter:
    """DeepSpeed's checkpoint writer, but a failed write is remembered instead of raised: a rank
    that raised would leave the others waiting in the save's last collective."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self.error: str | None = None

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        try:
            self._writer.save(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
            self.error = f"{path}: {error}"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)


def signature(model: nn.Module) -> dict[str, Any]:
    """What a checkpoint must agree with: architecture and parameter shapes."""
    shapes = {n: list(getattr(p, "ds_shape", p.shape)) for n, p in model.named_parameters()}
    return {"architecture": type(model).__name__, "parameters": shapes}


def save(engine: Any, path: Path, meta: dict[str, Any]) -> None:
    """Weights, optimizer and RNG of every rank, and `meta`. Raises OSError on all ranks."""
    rank = dist.get_rank()

    def write(partial: Path) -> str | None:
        writer = _PatientWriter(engine.checkpoint_engine)
        engine.checkpoint_engine = writer
        # Rank 0 alone would copy its conversion scripts, and on a full disk raise alone.
        engine._copy_recovery_script = lambda _: None
        try:
            engine.save_checkpoint(str(partial), tag=STATE, save_latest=False)
        finally:
            engine.checkpoint_engine = writer._writer
            del engine._copy_recovery_script
        return writer.error or _attempt(lambda: _write_own(partial, rank, meta))

    write_folder(path, write)


def _write_own(partial: Path, rank: int, meta: dict[str, Any]) -> None:
    try:
        torch.save(_rng_state(), partial / f"rng_{rank}.pt")
    except RuntimeError as error:
        raise OSError(str(error)) from error
    if rank == 0:
        (partial / META).write_text(json.dumps(meta))


def load(engine: Any, path: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """Restore what `save` wrote and return its meta.

    `expected` = the entries of meta that must agree. Raises ValueError where `path` holds no
    checkpoint, or one of another model, precision, ZeRO stage or number of ranks.
    """
    if not (path / META).is_file():
        raise ValueError(f"checkpoint {path}: no {META}; name a folder that a run has saved")
    meta: dict[str, Any] = json.loads((path / META).read_text())
    for key, want in expected.items():
        if meta[key] != want:
            raise ValueError(_difference(path, key, meta[key], want))
    engine.load_checkpoint(str(path), tag=STATE)
    _restore_rng(torch.load(path / f"rng_{dist.get_rank()}.pt", weights_only=True))
    return meta


def _difference(path: Path, key: str, found: Any, want: Any) -> str:
    if key == "parameters":
        name = next(n for n in (found | want) if found.get(n) != want.get(n))
        found, want = f"{name} {found.get(name)}", f"{name} {want.get(name)}"
    return (
        f"checkpoint {path} was saved with {key} {found}, but this learner has {want}; "
        "continue with the model and learner settings of the saved run"
    )


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_rng(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
