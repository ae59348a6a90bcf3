"""Tests of one GPU, or of two where they say so. `ELPO_GPU_TESTS=cpu` tries them on CPU instead, as
far as they go there, with smaller models."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.devices import ON_CPU, gpu_count

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if FOLDER in item.path.parents]
    there = gpu_count() if ours and not ON_CPU else 0
    for item in ours:
        needed = 2 if item.get_closest_marker("two_gpus") else 1
        if ON_CPU and needed == 2:
            item.add_marker(pytest.mark.skip(reason="not on CPU: NCCL connects GPUs"))
        elif not ON_CPU and there < needed:
            reason = f"needs {needed} CUDA device{'s' * (needed > 1)}, torch finds {there}"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def freed() -> Iterator[None]:
    """What a test's models leave in torch's cache would be missing to the next test's engine."""
    yield
    gc.collect()
    if not ON_CPU:
        torch.cuda.empty_cache()


Tell = Callable[..., None]


@pytest.fixture
def tell(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Tell:
    """Prints figures at once, as one line of JSON under the test's name."""

    def said(**figures: Any) -> None:
        rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in figures.items()}
        with capsys.disabled():
            print(json.dumps({"test": request.node.name, **rounded}), flush=True)

    return said
