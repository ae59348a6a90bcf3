"""What an engine tells vLLM's process before it starts."""

from __future__ import annotations

from pathlib import Path

from elpo_ray.config.model import ModelConfig, Precision
from elpo_ray.config.rollout import EngineConfig, Transfer
from elpo_ray.config.run import ClusterConfig
from elpo_ray.rollout.engine import Engine


def variables(precision: Precision, transfer: Transfer, *, gpus: bool) -> dict[str, str]:
    engine = Engine(
        Path("unused"),
        ModelConfig(path="unused", precision=precision),
        EngineConfig(transfer=transfer),
        ClusterConfig(gpus=gpus, colocated=True),
        0,
    )
    return engine._variables()


def test_engines_spawn_their_process_wherever_they_are() -> None:
    for gpus in (True, False):
        found = variables(Precision.bf16, Transfer.host, gpus=gpus)
        assert found["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
        assert found["ELPO_RAY_ENGINE"] == "1"
        assert ("OMP_WAIT_POLICY" in found) == (not gpus)


def test_an_fp32_engine_on_a_gpu_multiplies_in_fp32() -> None:
    wide = variables(Precision.fp32, Transfer.nccl, gpus=True)
    assert wide["TRITON_F32_DEFAULT"] == "ieee"
    assert "TRITON_F32_DEFAULT" not in variables(Precision.bf16, Transfer.nccl, gpus=True)
    assert "TRITON_F32_DEFAULT" not in variables(Precision.fp32, Transfer.host, gpus=False)


def test_only_shared_gpu_memory_needs_pickled_handles() -> None:
    for transfer in (Transfer.ipc, Transfer.nccl, Transfer.host):
        found = variables(Precision.bf16, transfer, gpus=True)
        assert ("VLLM_ALLOW_INSECURE_SERIALIZATION" in found) == (transfer is Transfer.ipc)
