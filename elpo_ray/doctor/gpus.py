"""GPUs and their driver, as `nvidia-smi` and torch see them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

from elpo_ray.doctor.finding import Finding, failure, ok, warning
from elpo_ray.doctor.software import pinned, version_of

OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
"""First driver branch that runs programs of a CUDA major version."""
QUERY = ["--query-gpu=driver_version,name,memory.total", "--format=csv,noheader,nounits"]


def gpus(wanted: int) -> Iterator[Finding]:
    """`wanted`: GPUs that this node has to offer; 0 says that none is used."""
    found, fault = visible()
    if not wanted:
        seen = f"{len(found)} here, none asked for" if found else "none, none asked for"
        yield ok("GPUs", seen)
        return
    if fault:
        yield failure("GPUs", fault, "install NVIDIA's driver, or use cluster=local")
        return
    version, name, mib = found[0] if found else ("", "", 0)
    cuda = int(pinned("gpu")["cuda-python"].split(".")[0])  # major version of the GPU set's CUDA
    yield from driver(version, cuda)
    if len(found) < wanted:
        yield failure(
            "GPUs",
            f"{len(found)} visible, {wanted} asked for",
            "ask for fewer (cluster.rollout_workers, cluster.learner_ranks), give the job more, or "
            "correct CUDA_VISIBLE_DEVICES",
        )
    else:
        yield ok("GPUs", f"{len(found)} x {name}, {mib / 1024:.0f} GiB each, {wanted} asked for")
    yield from _torch_build()


def visible() -> tuple[list[tuple[str, str, int]], str]:
    """(driver version, name, MiB) of each GPU that this process may use, and why there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return [], "no nvidia-smi, so no driver"
    try:
        done = subprocess.run([program, *QUERY], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as fault:
        return [], f"nvidia-smi does not answer ({fault})"
    if done.returncode != 0:
        return [], f"nvidia-smi: {(done.stdout + done.stderr).strip().splitlines()[-1][:200]}"
    rows = [line.split(", ") for line in done.stdout.splitlines() if line.count(", ") == 2]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:  # nvidia-smi takes no notice of it
        rows = rows[: len([part for part in chosen.split(",") if part.strip() not in ("", "-1")])]
    return [(version, name, int(float(mib))) for version, name, mib in rows], ""


def driver(version: str, cuda: int) -> Iterator[Finding]:
    """Whether a driver of this version runs programs built for CUDA `cuda`."""
    needed = OLDEST_DRIVER[cuda]
    branch = int(version.split(".")[0]) if version.split(".")[0].isdigit() else 0
    if not version:
        return
    if branch < needed:
        yield failure(
            "driver",
            f"{version}, CUDA {cuda} needs {needed} or newer",
            f"update NVIDIA's driver to {needed} or newer, or install a torch and vLLM built for "
            "an older CUDA",
        )
    else:
        yield ok("driver", f"{version}, enough for CUDA {cuda}")


def _torch_build() -> Iterator[Finding]:
    build = version_of("torch") or "absent"
    if build.endswith("+cpu"):
        yield failure(
            "GPUs", f"torch {build} is built for CPU", "make clean, then make TARGET=gpu install"
        )
        return
    import torch

    if not torch.cuda.is_available():
        yield failure(
            "GPUs",
            "torch.cuda.is_available() is false",
            "check that driver and container runtime (--gpus all, --nv) pass the GPUs through",
        )
    elif torch.cuda.get_device_capability(0) < (8, 0):
        yield warning(
            "GPUs",
            f"compute capability {torch.cuda.get_device_capability(0)}, bf16 needs (8, 0)",
            "use model.precision=fp32 or a GPU of the A100's generation or later",
        )
