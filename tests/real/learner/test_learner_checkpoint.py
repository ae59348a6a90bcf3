"""Checkpoints of the learner: on with another number of ranks, under another ZeRO stage, and after
a kill."""

from __future__ import annotations

import random
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from elpo_ray.config.learner import LoraConfig
from elpo_ray.config.model import Precision
from elpo_ray.learner.backend import RankProcess
from elpo_ray.learner.rank import LearnerRank
from tests.real.ranks import (
    TOTAL_STEPS,
    build_forest,
    error_of,
    run_ranks,
    settings,
    start_ranks,
    timeless,
    updated,
    weights,
)

pytestmark = pytest.mark.real

STAGES = (0, 1, 2, 3)
STEPS = 8
"""Steps of the run that is not killed."""


def new(process: RankProcess, folder: Path, stage: int, **changes: Any) -> LearnerRank:
    return LearnerRank(folder, settings(stage, **changes), process, total_steps=TOTAL_STEPS)


def three_more(learner: LearnerRank) -> dict[str, Any]:
    updates = [timeless(vars(updated(learner, build_forest(seed=seed)))) for seed in (1, 2, 3)]
    return {"updates": updates, "weights": weights(learner)}


def save_each(process: RankProcess, folder: Path, work: Path) -> dict[Any, Any]:
    """Every stage in both precisions, and adapters: train, save, go on."""
    out: dict[Any, Any] = {}
    for name, stage, changes in CASES:
        learner = new(process, folder, stage, **changes)
        updated(learner, build_forest())
        learner.save(work / name)
        out[name] = three_more(learner)
        again = new(process, folder, stage, **changes)
        again.load(work / name)
        out[name + " again"] = three_more(again)
    for rank_file in sorted((work / "fp32-3").glob("state_*")):
        out[rank_file.name] = rank_file.stat().st_size
    out["background"] = save_in_background(new(process, folder, 2), work)
    learner = new(process, folder, 3)
    out["damaged"] = load_damaged(learner, work / "fp32-3", process.rank)
    return out


def save_in_background(learner: LearnerRank, work: Path) -> dict[str, Any]:
    """Beside an ordinary save of the same state; the learner steps on while it is written."""
    path, out = work / "background", {}
    updated(learner, build_forest())
    learner.save(work / "foreground")
    learner.save(path, background=True)
    out["early"] = path.exists()
    updated(learner, build_forest(seed=1))
    learner.finish_save()
    out["differences"] = [
        key for key, tensor in tensors(work / "foreground").items()
        if not torch.equal(tensor, tensors(path)[key])
    ]  # fmt: skip
    out["meta"] = (path / "meta.json").read_text() == (work / "foreground/meta.json").read_text()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limit[1]))
    try:
        learner.save(path, background=True)
        out["error"] = error_of(learner.finish_save)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    out["kept"] = len(tensors(path))
    learner.finish_save()  # nothing to wait for
    return out


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {k: t for file in path.glob("state_*") for k, t in load_file(file).items()}


def load_damaged(learner: LearnerRank, path: Path, rank: int) -> list[str]:
    """Errors with a file cut short, and with none."""
    file = path / "state_00001_00000.safetensors"
    whole, errors = file.read_bytes(), []
    for damage in (lambda: file.write_bytes(whole[:-8]), file.unlink):
        torch.distributed.barrier()
        if rank == 0:
            damage()
        torch.distributed.barrier()
        errors.append(error_of(lambda: learner.load(path)))
    torch.distributed.barrier()
    if rank == 0:
        file.write_bytes(whole)
    torch.distributed.barrier()
    return errors


CASES: list[tuple[str, int, dict[str, Any]]] = [
    *((f"fp32-{stage}", stage, {}) for stage in STAGES),
    *((f"bf16-{stage}", stage, {"precision": Precision.bf16}) for stage in STAGES),
    ("offload-2", 2, {"offload_optimizer": True}),
    ("offload-3", 3, {"offload_optimizer": True}),
    ("lora-3", 3, {"lora": LoraConfig(rank=4)}),
]


def resume_each(process: RankProcess, folder: Path, work: Path, stage: int) -> dict[Any, Any]:
    """What others saved, on this many ranks under this stage."""
    out: dict[Any, Any] = {}
    for name, _, changes in CASES:
        learner = new(process, folder, stage, **changes)
        learner.load(work / name)
        out[name] = three_more(learner)
    return out


@pytest.fixture(scope="module")
def saved(folder: Path, work: Path) -> list[dict[Any, Any]]:
    return run_ranks(save_each, 2, work, folder, work)


@pytest.mark.parametrize("name", [case[0] for case in CASES])
def test_as_many_ranks_go_on_bit_by_bit(saved: list[dict[Any, Any]], name: str) -> None:
    for rank in saved:
        assert rank[name]["updates"] == rank[name + " again"]["updates"]
        for key, tensor in rank[name]["weights"].items():
            assert torch.equal(tensor, rank[name + " again"]["weights"][key]), key


def test_every_rank_writes_its_share(saved: list[dict[Any, Any]]) -> None:
    sizes = [size for key, size in saved[0].items() if key.startswith("state_")]
    assert len(sizes) == 2
    assert max(sizes) < 1.5 * min(sizes)


def test_a_checkpoint_is_written_in_the_background(saved: list[dict[Any, Any]]) -> None:
    for rank in saved:
        found = rank["background"]
        assert not found["early"], "it has its name when it is complete"
        assert found["differences"] == [] and found["meta"]
        assert found["error"].startswith("OSError") and "was not written" in found["error"]
        assert found["kept"] > 3 * 20


def test_damage_is_named_on_every_rank(saved: list[dict[Any, Any]]) -> None:
    for rank in saved:
        short, missing = rank["damaged"]
        assert short.startswith("ValueError")
        assert "state_00001_00000.safetensors is damaged" in short
        assert missing.startswith("ValueError") and "is missing; take an older one" in missing


@pytest.mark.parametrize(("world_size", "stage"), [(1, 1), (3, 3)])
def test_another_number_of_ranks_under_another_stage_goes_on(
    saved: list[dict[Any, Any]], folder: Path, work: Path, world_size: int, stage: int
) -> None:
    """Sums over ranks round otherwise, hence not bit by bit."""
    target = work / f"resumed_{world_size}"
    resumed = run_ranks(resume_each, world_size, target, folder, work, stage)
    for name, _, _ in CASES:
        there, here = saved[0][name], resumed[0][name]
        loose = name.startswith("bf16")
        for before, after in zip(there["updates"], here["updates"], strict=True):
            assert after["optimizer_steps"] == before["optimizer_steps"] == 2
            for key in ("loss", "grad_norm", "lr", "entropy"):
                tolerance = 0.05 if loose else 1e-5
                assert after[key] == pytest.approx(before[key], rel=tolerance), (name, key)
        for key, tensor in there["weights"].items():
            tolerance = 1e-2 if loose else 1e-5
            torch.testing.assert_close(here["weights"][key], tensor, rtol=tolerance, atol=tolerance)


# --- a kill ---------------------------------------------------------------------------------------


def steps(process: RankProcess, folder: Path, work: Path, first: int, count: int) -> list[Any]:
    """Steps `first`.. with a checkpoint after each; from step_FIRST if `first` is not 0."""
    learner = new(process, folder, 2)
    if first:
        learner.load(work / f"step_{first}")
    losses = []
    for step in range(first, first + count):
        losses.append(timeless(vars(updated(learner, build_forest(seed=step)))))
        learner.save(work / f"step_{step + 1}")
    return losses


def test_a_killed_run_goes_on_bit_by_bit(folder: Path, tmp_path: Path) -> None:
    whole = run_ranks(steps, 2, tmp_path / "whole", folder, tmp_path / "whole", 0, STEPS)[0]
    work, seed = tmp_path / "killed", time.time_ns()
    ranks = start_ranks(steps, 2, work, folder, work, 0, 1000)
    deadline = time.monotonic() + 120
    while not (work / "step_1").exists():
        assert time.monotonic() < deadline and all(rank.is_alive() for rank in ranks)
        time.sleep(0.01)
    time.sleep(random.Random(seed).uniform(0, 0.5))
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.join()
    done = max(int(path.name.removeprefix("step_")) for path in work.glob("step_?"))
    first = min(done, STEPS - 3)
    goes_on = run_ranks(steps, 2, tmp_path / "on", folder, work, first, 3)[0]
    assert goes_on == whole[first : first + 3], f"killed after step {done}, seed {seed}"
