"""The node: memory, shared memory, limits, disk, processors."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from elpo_ray.doctor.finding import Finding, failure, ok, warning

GIB = 1 << 30
SHM = Path("/dev/shm")
LEAST_SHM = 1 * GIB
"""Ray's object store goes to the disk below about this, and each sync of weights passes it."""
FILES, LEAST_FILES = 65536, 4096
"""Descriptors that Ray recommends, and without which it fails under load."""
HEADROOM = 2 * GIB
"""Bytes of memory and disk that must be free beside what a model needs."""
_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


def memory(needed: int) -> Iterator[Finding]:
    """`needed`: bytes of model states that this configuration puts into host memory."""
    free, total = available_memory()
    detail = f"{_gib(free)} available of {_gib(total)}, model states take {_gib(needed)}"
    if free < needed + HEADROOM // 2:
        yield failure(
            "memory",
            detail,
            "use a smaller model, fewer cluster.rollout_workers or cluster.learner_ranks, or a "
            "node (or container limit) with more memory",
        )
    elif free < needed + 2 * HEADROOM:
        yield warning("memory", detail, "leave more for trees, caches and the sandbox's snapshots")
    else:
        yield ok("memory", detail)


def available_memory() -> tuple[int, int]:
    """Bytes that can still be had and bytes in all, of the host or of the container's limit."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    host = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
    free, total = host["MemAvailable"], host["MemTotal"]
    for limit, usage in _CGROUPS:
        if limit.is_file() and (text := limit.read_text().strip()).isdigit() and int(text) < total:
            total = int(text)
            free = min(free, total - int(usage.read_text()))
    return free, total


def shared_memory(needed: int) -> Iterator[Finding]:
    """`needed`: bytes of the weights, which pass it at every sync on CPU."""
    if not SHM.is_dir():
        yield failure("shared memory", f"no {SHM}", f"mount a tmpfs at {SHM}")
        return
    free = shutil.disk_usage(SHM).free
    detail = f"{_gib(free)} free in {SHM}, {_gib(needed)} needed by a sync of weights"
    remedy = (
        f"make it larger: docker run --shm-size=16g, a memory-backed emptyDir at {SHM} in a pod, "
        f"or mount -o remount,size=16g {SHM}; or remove what lies in it"
    )
    if free < max(needed, 128 << 20):
        yield failure("shared memory", detail, remedy)
    elif free < needed + LEAST_SHM:
        yield warning("shared memory", detail, remedy)
    else:
        yield ok("shared memory", detail)


def limits(gpus: bool) -> Iterator[Finding]:
    """Descriptors and processes, pinned memory where there are GPUs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    detail = f"{soft} open files, {hard} at most"
    remedy = f"raise it: ulimit -n {FILES} (limits.conf, LimitNOFILE=, --ulimit nofile={FILES})"
    if hard < LEAST_FILES:
        yield failure("open files", detail, remedy)
    elif hard < FILES:
        yield warning("open files", detail, remedy)
    else:
        yield ok("open files", detail)
    processes = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if processes != resource.RLIM_INFINITY and processes < 4096 and os.geteuid() != 0:
        yield warning(
            "processes",
            f"{processes} of this user, threads included",
            "raise it: ulimit -u 16384; Ray and the sandbox start many",
        )
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if gpus and locked != resource.RLIM_INFINITY:
        yield warning(
            "locked memory",
            f"{locked >> 10} KiB",
            "ulimit -l unlimited, or NCCL cannot use InfiniBand",
        )


def disk(name: str, folder: Path, needed: int) -> Iterator[Finding]:
    """`needed`: bytes that will be written there."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    detail = f"{_gib(free)} free at {there}, {_gib(needed)} needed"
    remedy = "free some, or name a folder on a larger disk"
    if free < needed:
        yield failure(name, detail, remedy)
    elif free < needed + HEADROOM:
        yield warning(name, detail, remedy)
    else:
        yield ok(name, detail)


def writable(name: str, folder: Path, key: str) -> Iterator[Finding]:
    """Write, flush and rename a file in `folder`, which is made if need be; nothing stays."""
    made = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".check-", dir=folder) as scratch:
            partial = Path(scratch, "partial")
            with partial.open("w", encoding="utf-8") as file:
                file.write("check")
                file.flush()
                os.fsync(file.fileno())
            partial.rename(Path(scratch, "whole"))
    except OSError as fault:
        reason = fault.strerror or str(fault)
        yield failure(name, f"{folder}: {reason}", f"name a folder you may write to with {key}=…")
        return
    finally:
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
    yield ok(name, f"{folder} can be written to")


def ray_folder() -> Path:
    """Where Ray keeps its logs and what it spills."""
    return Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())


def processor() -> Iterator[Finding]:
    """What vLLM's CPU kernels need."""
    count = len(os.sched_getaffinity(0))
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    flags = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    if os.uname().machine == "x86_64" and " avx2" not in flags:
        yield failure(
            "processor", f"{count} cores without AVX2", "vLLM on CPU needs AVX2: use a newer node"
        )
    elif count < 2:
        yield warning("processor", f"{count} core", "give the job two cores or more")
    else:
        yield ok("processor", f"{count} cores, {'AVX-512' if ' avx512f' in flags else 'AVX2'}")


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
