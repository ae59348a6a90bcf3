"""Weights as bytes: nothing is lost on the way, and what was damaged is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from elpo_ray.weights.host import Inbox, checkpoint_shapes, to_wire, verify, write_file
from elpo_ray.weights.protocol import WeightSyncError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_survive_bit_by_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.randn(3, 5).to(dtype),
        "transposed": torch.randn(4, 6).to(dtype).t(),
        "scalar": torch.tensor(1.5, dtype=dtype),
    }
    wires = to_wire(tensors)
    for wire in wires:
        wire.data.flags.writeable = False
        verify(wire)
    with (tmp_path / "file").open("wb") as file:
        write_file(file, wires)
    for name, back in load_file(tmp_path / "file").items():
        assert back.dtype is dtype
        assert torch.equal(back, tensors.pop(name))
    assert not tensors


def test_a_flipped_bit_is_noticed() -> None:
    (wire,) = to_wire({"a": torch.zeros(3, 5)})
    wire.data[7] ^= 1
    with pytest.raises(WeightSyncError, match="the bytes that arrived"):
        verify(wire)


@pytest.mark.parametrize("change", [{"shape": (5, 3)}, {"dtype": "int32"}, {"name": "b"}])
def test_a_changed_header_is_noticed(change: dict[str, object]) -> None:
    (wire,) = to_wire({"a": torch.zeros(3, 5)})
    with pytest.raises(WeightSyncError, match="the bytes that arrived"):
        verify(replace(wire, **change))


def test_an_inbox_holds_exactly_what_was_sent(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(2, 3), "b": torch.randn(4), "c": torch.randn(1).bfloat16()}
    save_file(tensors, tmp_path / "model.safetensors")
    inbox = Inbox(checkpoint_shapes(tmp_path))
    inbox.accept(to_wire({"a": tensors["a"]}))
    inbox.accept([])
    with pytest.raises(WeightSyncError, match=r"b: never sent \(2 tensors missing\)"):
        inbox.check_complete()
    inbox.accept(to_wire({"b": tensors["b"], "c": tensors["c"]}))
    inbox.check_complete()
    arrived = {}
    for file in inbox.files:
        arrived |= load_file(file)
    assert arrived.keys() == tensors.keys()
    assert all(torch.equal(arrived[name], tensors[name]) for name in tensors)
    inbox.begin()
    with pytest.raises(WeightSyncError, match="never sent"):
        inbox.check_complete()
    newer = {name: tensor + 1 for name, tensor in tensors.items()}
    inbox.accept(to_wire({"c": newer["c"]}))  # shorter than what the file held before
    inbox.accept(to_wire({"a": newer["a"], "b": newer["b"]}))
    arrived = {}
    for file in inbox.files:
        arrived |= load_file(file)
    assert all(torch.equal(arrived[name], newer[name]) for name in newer)
    files = inbox.files
    inbox.close()
    assert not any(file.exists() for file in files)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \*.safetensors file"):
        checkpoint_shapes(tmp_path)
