"""Folders that appear whole or not at all, written by all ranks together; checkpoints.

Invariants: files go to a sibling `NAME.partial`, are flushed to disk, and become NAME by a rename;
an error on any rank (a full disk) is raised on every rank, removes the partial folder, and leaves
whatever NAME held before untouched; no rank leaves a collective early.

A checkpoint holds whole tensors by name (`masters.state_tensors`), every rank a share of them in
files of its own, so that any number of ranks under any ZeRO stage can go on from it: equal numbers
of ranks bit by bit.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial as partial_call
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from elpo_ray.learner.masters import MOMENTS, Masters, set_weight, state_tensors

META = "meta.json"
SHARD_BYTES = 4 << 30
"""Of one file."""


def write_folder(path: Path, write: Callable[[Path], str | None]) -> None:
    """Call `write(partial folder)` on every rank and move the result to `path`.

    `write` may use collectives, so it must not raise OSError but return what went wrong. Raises
    OSError on all ranks if any rank failed.
    """
    partial = begin_folder(path)
    commit_folder(path, partial, write(partial))


def begin_folder(path: Path) -> Path:
    """The empty folder that will become `path`. Raises OSError on all ranks."""
    partial = path.with_name(path.name + ".partial")
    _agree(path, partial, _attempt(lambda: _fresh(partial)) if dist.get_rank() == 0 else None)
    return partial


def commit_folder(path: Path, partial: Path, error: str | None) -> None:
    """Move a folder to `path` that all ranks have filled, or raise OSError on all of them if this
    or another rank has an error."""
    _agree(path, partial, error)
    # Not before all have written: what is being written comes and goes.
    _agree(path, partial, _attempt(lambda: _flush(partial)))
    _agree(path, partial, _attempt(lambda: _move(partial, path)) if dist.get_rank() == 0 else None)


def _attempt(action: Callable[[], object]) -> str | None:
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
        _sync(entry)


def _sync(entry: Path) -> None:
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
    _sync(path.parent)


def signature(model: nn.Module) -> dict[str, Any]:
    """What a checkpoint must agree with: architecture and parameter shapes."""
    shapes = {n: list(getattr(p, "ds_shape", p.shape)) for n, p in model.named_parameters()}
    return {"architecture": type(model).__name__, "parameters": shapes}


def save(engine: Any, path: Path, meta: Mapping[str, Any]) -> None:
    """Weights, optimizer and RNG of every rank, and `meta`. Raises OSError on all ranks."""
    rest = _Rest(engine, meta)

    def write(partial: Path) -> str | None:
        error: str | None = None
        for number, shard in enumerate(_own_shards(engine)):
            if error is None:  # after a failure the gathers go on with the other ranks
                error = _attempt(partial_call(_write_shard, partial, number, shard))
        return error or _attempt(lambda: rest.write(partial))

    write_folder(path, write)


class BackgroundSave:
    """`save` in two parts: this rank's share is copied to host memory here and written by a thread;
    `finish`, on all ranks, waits for the files and gives the folder its name.

    Until then, and after a kill, there is only the partial folder.
    """

    def __init__(self, engine: Any, path: Path, meta: Mapping[str, Any]) -> None:
        """Raises OSError on all ranks."""
        self._path, self._partial = path, begin_folder(path)
        self._rest = _Rest(engine, meta)
        self._shards = list(_own_shards(engine))
        self._error: str | None = None
        self._thread = threading.Thread(target=self._write, name="checkpoint")
        self._thread.start()

    def _write(self) -> None:
        """No collective: the other ranks' threads are elsewhere."""
        self._error = _attempt(self._write_all)

    def _write_all(self) -> None:
        for number, shard in enumerate(self._shards):
            _sync(_write_shard(self._partial, number, shard))
            shard.clear()
        self._rest.write(self._partial)

    def finish(self) -> None:
        """Raises OSError on all ranks if any of them could not write."""
        self._thread.join()
        commit_folder(self._path, self._partial, self._error)


def _own_shards(engine: Any) -> Iterator[dict[str, Tensor]]:
    """This rank's share of the state in host memory, at most `SHARD_BYTES` (or one tensor) each.
    A collective: all ranks must iterate to the end."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    shard: dict[str, Tensor] = {}
    size = 0
    for index, (key, tensor) in enumerate(state_tensors(engine)):
        if index % world_size != rank:
            continue
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[key] = torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)
        shard[key].copy_(tensor)
        size += tensor.nbytes
    yield shard


def _write_shard(partial: Path, number: int, shard: dict[str, Tensor]) -> Path:
    file = partial / f"state_{dist.get_rank():05d}_{number:05d}.safetensors"
    try:
        save_file(shard, file)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    return file


class _Rest:
    """What a rank writes besides tensors, as it is now."""

    def __init__(self, engine: Any, meta: Mapping[str, Any]) -> None:
        self._meta = json.dumps({**meta, "adam_steps": Masters(engine).steps})
        self._rng = _rng_state()

    def write(self, partial: Path) -> None:
        rank = dist.get_rank()
        try:
            torch.save(self._rng, partial / f"rng_{rank}.pt")
        except RuntimeError as error:
            raise OSError(str(error)) from error
        if rank == 0:
            (partial / META).write_text(self._meta)


def read_meta(path: Path) -> dict[str, Any]:
    """Raises ValueError where `path` holds no checkpoint."""
    if not (path / META).is_file():
        raise ValueError(f"checkpoint {path}: no {META}; name a folder that a run has saved")
    meta: dict[str, Any] = json.loads((path / META).read_text())
    return meta


class StateFiles:
    """A checkpoint's tensors, read one by one."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError on a damaged file."""
        self._path = path
        self._of: dict[str, Any] = {}
        for file in sorted(path.glob("state_*.safetensors")):
            try:
                opened = safe_open(file, "pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"checkpoint {path}: {file.name} is damaged ({error})") from error
            self._of |= dict.fromkeys(opened.keys(), opened)  # type: ignore[no-untyped-call]

    def __getitem__(self, key: str) -> Tensor:
        """Raises ValueError if the checkpoint lacks it."""
        if key not in self._of:
            raise ValueError(f"checkpoint {self._path}: {key} is missing; take an older one")
        tensor: Tensor = self._of[key].get_tensor(key)
        return tensor


def load(engine: Any, path: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """Restore what `save` wrote, on any number of ranks, and return its meta.

    `expected` = the entries of meta that must agree. Raises ValueError where `path` holds no
    checkpoint, or a damaged one, or one of another model or precision.
    """
    meta = read_meta(path)
    for key, want in expected.items():
        if meta.get(key) != want:
            raise ValueError(_difference(path, key, meta.get(key), want))
    files, masters = StateFiles(path), Masters(engine)
    for name, parameter in engine.module.model.named_parameters():
        weight = files[f"weight/{name}"]
        set_weight(parameter, weight)
        if parameter.requires_grad:
            masters.write(parameter, weight)
            for moment in MOMENTS:
                masters.write(parameter, files[f"{moment}/{name}"], moment)
    masters.steps = meta["adam_steps"]
    rng = path / f"rng_{dist.get_rank()}.pt"
    if rng.is_file():
        _restore_rng(torch.load(rng, weights_only=True))
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
