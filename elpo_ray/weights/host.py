"""New weights through host memory, the transport on CPU: full tensors in bounded buckets.

Invariant: an engine's weights change in one piece or not at all; everything is verified and
complete before the first byte is loaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from safetensors import safe_open

from elpo_ray.weights.protocol import Buckets, EngineHandles, WeightSyncError, WireTensor

SAFETENSORS_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""Torch's names and those of the file format."""

# --- the wire -------------------------------------------------------------------------------------


def to_wire(tensors: Mapping[str, torch.Tensor]) -> list[WireTensor]:
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
        buckets = self._buckets(self._max_bytes)
        arrived: Callable[[], None] = lambda: None  # noqa: E731
        try:
            self._engines.begin_update()
            for bucket in buckets:
                before, arrived = arrived, self._engines.receive(to_wire(bucket))
                before()
            arrived()
            self._engines.finish_update(version)
        except Exception:
            # The other ranks are inside the gathers: go through the rest with them.
            for _ in buckets:
                pass
            self._engines.abandon_update()
            raise
