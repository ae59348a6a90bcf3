"""A model folder is checked before anything loads it."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from elpo_ray.models.folder import check_weights


def test_weights_are_whole_or_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.path='.*no \*\.safetensors in it"):
        check_weights(tmp_path)
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for file in (first, second):
        save_file({"weight": np.ones((4, 4), np.float32)}, file)
    index = {"weight_map": {"x": first.name, "y": second.name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert check_weights(tmp_path) == [first, second]
    whole = second.read_bytes()
    for damaged in (whole[:-1], whole + b"\0", whole[:20], b"", b"<!doctype html><html></html>"):
        second.write_bytes(damaged)
        said = rf"b\.safetensors is damaged, it has {len(damaged)} bytes .*; download it again"
        with pytest.raises(ValueError, match=said):
            check_weights(tmp_path)
    second.unlink()
    with pytest.raises(ValueError, match="1 of 2 weight files absent"):
        check_weights(tmp_path)
