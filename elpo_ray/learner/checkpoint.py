"""Checkpoints of the learner, and folders that all ranks write together.

Invariants: such a folder appears whole or not at all (`runs.atomic`); an error on any rank (a full
disk) is raised on every rank and leaves whatever was there before untouched; no rank leaves a
collective early.

A checkpoint holds whole tensors by name (`masters.state_tensors`), every rank a share of them in
files of its own, so that any number of ranks under any ZeRO stage can go on from it: equal numbers
of ranks bit by bit.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial as partial_call
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from elpo_ray.learner.masters import MOMENTS, Masters, set_weight, state_tensors
from elpo_ray.runs.atomic import flush, new_folder, partial_of

META = "meta.json"
SHARD_BYTES = 4 << 30
"""Most bytes of one file, unless a single tensor is larger."""


class Attempts:
    """Runs what may fail on one rank while the others go on to the next collective."""

    error: str | None = None
    """What went wrong first."""

    def run(self, action: Callable[[], object]) -> None:
        """Call `action` unless something has gone wrong already; keep the text of an OSError."""
        if self.error is None:
            try:
                action()
            except (OSError, SafetensorError) as error:
                self.error = str(error)


@contextmanager
def shared_folder(path: Path) -> Iterator[tuple[Path, Attempts]]:
    """`atomic.new_folder` on all ranks together: yield the folder to write into, and the attempts
    by which to write. Raises OSError on all ranks if any rank failed."""
    writing, renaming = Attempts(), Attempts()
    with ExitStack() as stack:
        if dist.get_rank() == 0:
            writing.run(lambda: stack.enter_context(new_folder(path)))
        _agree(path, writing)
        yield partial_of(path), writing
        _agree(path, writing)
        renaming.run(stack.close)
    _agree(path, renaming)


def _agree(path: Path, attempts: Attempts) -> None:
    """Raise on every rank if any of them has an error; also a barrier."""
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, attempts.error)
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(errors) if text is not None]
    if failed:
        raise OSError(f"{path} was not written; what it held before is untouched ({failed[0]})")


def signature(model: nn.Module) -> dict[str, Any]:
    """What a checkpoint must agree with: architecture and parameter shapes."""
    shapes = {n: list(getattr(p, "ds_shape", p.shape)) for n, p in model.named_parameters()}
    return {"architecture": type(model).__name__, "parameters": shapes}


def save(engine: Any, path: Path, meta: Mapping[str, Any]) -> None:
    """Weights, optimizer and RNG of every rank, and `meta`. Raises OSError on all ranks."""
    rest = _Rest(engine, meta)
    with shared_folder(path) as (folder, attempts):
        for number, shard in enumerate(_own_shards(engine)):
            attempts.run(partial_call(_write_shard, folder, number, shard))
        attempts.run(lambda: rest.write(folder))


class BackgroundSave:
    """`save` in two parts: this rank's share is copied to host memory here and written by a thread;
    `finish`, on all ranks, waits for the files and gives the folder its name.

    Until then, and after a kill, there is only the partial folder.
    """

    def __init__(self, engine: Any, path: Path, meta: Mapping[str, Any]) -> None:
        """Raises OSError on all ranks."""
        self._stack = ExitStack()
        self._folder, self._attempts = self._stack.enter_context(shared_folder(path))
        self._rest = _Rest(engine, meta)
        self._shards = list(_own_shards(engine))
        self._thread = threading.Thread(target=self._write, name="checkpoint")
        self._thread.start()

    def _write(self) -> None:
        """No collective: the other ranks' threads are elsewhere."""
        for number, shard in enumerate(self._shards):
            self._attempts.run(partial_call(_write_shard, self._folder, number, shard))
            shard.clear()
        self._attempts.run(lambda: self._rest.write(self._folder))

    def finish(self) -> None:
        """Raises OSError on all ranks if any of them could not write."""
        self._thread.join()
        self._stack.close()


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


def _write_shard(folder: Path, number: int, shard: dict[str, Tensor]) -> None:
    file = folder / f"state_{dist.get_rank():05d}_{number:05d}.safetensors"
    save_file(shard, file)
    flush(file)


class _Rest:
    """What a rank writes besides tensors, as it is now."""

    def __init__(self, engine: Any, meta: Mapping[str, Any]) -> None:
        self._meta = json.dumps({**meta, "adam_steps": Masters(engine).steps})
        self._rng = _rng_state()

    def write(self, folder: Path) -> None:
        file = folder / f"rng_{dist.get_rank()}.pt"
        try:
            torch.save(self._rng, file)
        except RuntimeError as error:
            raise OSError(str(error)) from error
        flush(file)
        if dist.get_rank() == 0:
            (folder / META).write_text(self._meta)


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
