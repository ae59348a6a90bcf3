"""How new weights travel from the learner to the engines.

One protocol, two transports. On every rank of the learner a publisher is called in lockstep; rank 0
drives the engines (`Engine.begin_update`, receive, `Engine.finish_update`), the others only take
part in the learner's gathers.

* Host memory (CPU): full tensors in bounded buckets. Invariant: an engine's weights change in one
  piece or not at all; everything is verified and complete before the first byte is loaded.
* NCCL or IPC (GPU): `gpu_transfer`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from safetensors import safe_open

Buckets = Callable[[int], Iterator[dict[str, torch.Tensor]]]
"""The learner's `weight_buckets`: full tensors under Hugging Face names, at most so many bytes at
a time; a collective, so every rank iterates it to its end (all but rank 0 get empty dicts)."""


class WeightSyncError(RuntimeError):
    """Weights did not arrive as sent, or are not this model's. The engine keeps its old ones."""


class EngineHandles(Protocol):
    """All engines, as the learner reaches them."""

    def send(self, method: str, *args: Any) -> Callable[[], None]:
        """Begin `Engine.method(*args)` on every engine. The arguments may change on return; what is
        returned waits for the answers and raises what any of them raised."""
        ...

    def call(self, method: str, *args: Any) -> None:
        """Call `Engine.method(*args)` on every engine and wait; raises what any of them raised."""
        ...

    def call_each(self, method: str, args: Sequence[Any]) -> None:
        """Call `Engine.method(args[i])` on engine i and wait."""
        ...


class Publisher(Protocol):
    """Hands the learner's weights to every engine."""

    def publish(self, version: int) -> None:
        """Every engine serves `version` on return. Called on all learner ranks in lockstep."""
        ...


SAFETENSORS_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""Torch's names and those of the file format."""

# --- the wire -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WireTensor:
    """A tensor as bytes, so that it passes an object store without a copy, bfloat16 included."""

    name: str
    dtype: str
    """Torch's name, such as `bfloat16`."""
    shape: tuple[int, ...]
    data: NDArray[np.uint8]
    digest: str
    """XXH3 of name, dtype, shape and data: finds damage at memory speed, is no seal."""


def pack(tensors: Mapping[str, torch.Tensor]) -> list[WireTensor]:
    """Full tensors as bytes with digests; contiguous ones on CPU are not copied."""
    packed = []
    for name, tensor in tensors.items():
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        packed.append(WireTensor(name, dtype, shape, data, _digest(name, dtype, shape, data)))
    return packed


def verify(wire: WireTensor) -> None:
    """Raises WeightSyncError if the tensor's bytes changed on the way."""
    if _digest(wire.name, wire.dtype, wire.shape, wire.data) != wire.digest:
        raise WeightSyncError(f"{wire.name}: the bytes that arrived are not the bytes sent")


def write_file(file: BinaryIO, tensors: Sequence[WireTensor]) -> None:
    """A safetensors file, straight from the bytes: its own writer would copy them before."""
    header: dict[str, Any] = {}
    end = 0
    for wire in tensors:
        begin, end = end, end + wire.data.nbytes
        dtype = SAFETENSORS_DTYPES[wire.dtype]
        header[wire.name] = {
            "dtype": dtype,
            "shape": list(wire.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.seek(0)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for wire in tensors:
        file.write(wire.data.data)
    file.truncate()
    file.flush()


def _digest(name: str, dtype: str, shape: tuple[int, ...], data: NDArray[np.uint8]) -> str:
    state = xxhash.xxh3_128(f"{name} {dtype} {shape} ".encode())
    state.update(data.data)
    return state.hexdigest()


# --- the engine's side of the host transport ------------------------------------------------------


def checkpoint_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model folder, from its safetensors headers alone.

    Raises ValueError if the folder holds no safetensors file.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    if not shapes:
        raise ValueError(f"model.path={str(folder)!r}: no *.safetensors file; convert the weights")
    return shapes


class Inbox:
    """Collects one version of the weights as files in memory, verified as it goes.

    The files have no name that could be left behind by a killed process. They are kept from version
    to version, as fresh pages cost more than the copy: an engine on CPU holds its weights twice.
    """

    def __init__(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        self._expected = expected
        self._seen: set[str] = set()
        self._files: list[BinaryIO] = []
        self._used = 0

    def begin(self) -> None:
        """Another version comes."""
        self._seen, self._used = set(), 0

    @property
    def files(self) -> list[Path]:
        """One safetensors file a bucket, in order of arrival, for processes of this user."""
        own = Path("/proc") / str(os.getpid()) / "fd"
        return [own / str(file.fileno()) for file in self._files[: self._used]]

    def accept(self, bucket: Sequence[WireTensor]) -> None:
        """Verify and keep one bucket. Raises WeightSyncError, naming the tensor."""
        for wire in bucket:
            if wire.name not in self._expected:
                raise WeightSyncError(f"{wire.name}: the engine's model has no such tensor")
            if wire.name in self._seen:
                raise WeightSyncError(f"{wire.name}: sent twice")
            if wire.shape != self._expected[wire.name]:
                raise WeightSyncError(
                    f"{wire.name}: shape {wire.shape}, the engine's model has "
                    f"{self._expected[wire.name]}"
                )
            verify(wire)
            self._seen.add(wire.name)
        if bucket:
            if self._used == len(self._files):
                self._files.append(os.fdopen(os.memfd_create("weights"), "r+b"))
            write_file(self._files[self._used], bucket)
            self._used += 1

    def check_complete(self) -> None:
        """Raises WeightSyncError, naming a tensor, unless everything has arrived."""
        missing = [name for name in self._expected if name not in self._seen]
        if missing:
            raise WeightSyncError(f"{missing[0]}: never sent ({len(missing)} tensors missing)")

    def close(self) -> None:
        """Give the memory back."""
        for file in self._files:
            file.close()
        self._files, self._used = [], 0


# --- the learner's side ---------------------------------------------------------------------------


class HostPublisher:
    """Sends weights through host memory, bucket by bucket: while the engines take one, the next is
    gathered and sent."""

    def __init__(self, rank: int, engines: EngineHandles, buckets: Buckets, max_bytes: int) -> None:
        self._rank = rank
        self._engines = engines
        self._buckets = buckets
        self._max_bytes = max_bytes

    def publish(self, version: int) -> None:
        """See `Publisher`. A failure is raised only after this rank has left the collective."""
        if self._rank != 0:
            for _ in self._buckets(self._max_bytes):
                pass
            return
        failure: Exception | None = None
        buckets = self._buckets(self._max_bytes)
        try:
            self._engines.call("begin_update")
            arrived: Callable[[], None] | None = None
            for bucket in buckets:
                before, arrived = arrived, self._engines.send("receive", pack(bucket))
                if before is not None:
                    before()
            if arrived is not None:
                arrived()
            self._engines.call("finish_update", version)
        except Exception as error:
            # The other ranks are inside the gathers: go through the rest with them.
            failure = error
            for _ in buckets:
                pass
        if failure is not None:
            self._engines.call("abandon_update")
            raise failure
