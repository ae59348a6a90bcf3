"""The environment variables that the user's code sees: those that `task.env` names, and what a
process needs to run at all.

Values travel from the driver to the processes as arguments of their start, and are written nowhere.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping, Sequence

from elpo_ray.config.rules import require

NEEDED = frozenset(
    [
        "PATH",
        "HOME",
        "USER",
        "LOGNAME",
        "SHELL",
        "LANG",
        "LANGUAGE",
        "TZ",
        "TERM",
        "PWD",
        "TMPDIR",
        "TMP",
        "TEMP",
        "HOSTNAME",
        "VIRTUAL_ENV",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        "LD_LIBRARY_PATH",
        "LD_PRELOAD",
        "HF_HOME",
        "HF_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "TOKENIZERS_PARALLELISM",
    ]
)
NEEDED_PREFIXES = [
    "LC_",
    "XDG_",
    "PYTHON",
    "CONDA_",
    "RAY_",
    "VLLM_",
    "TORCH_",
    "CUDA_",
    "NVIDIA_",
    "NCCL_",
    "OMP_",
    "MKL_",
    "KMP_",
    "GLOO_",
    "TRANSFORMERS_",
    "ELPO_",
]
SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD", "CREDENTIAL")
"""A name with such a part is never needed."""


def named(names: Sequence[str]) -> dict[str, str]:
    """The driver's values of the variables in `task.env`. ValueError if one is not set."""
    missing = [name for name in names if name not in os.environ]
    require(not missing, "task.env", list(names), f"{', '.join(missing)} not set; export it first")
    return {name: os.environ[name] for name in names}


def keep_only(values: dict[str, str], environment: MutableMapping[str, str]) -> None:
    """Take everything out of `environment` but `values` and what a process needs."""
    for name in [name for name in environment if name not in values and not _needed(name)]:
        del environment[name]
    environment.update(values)


def _needed(name: str) -> bool:
    if any(part in name.upper() for part in SECRET):
        return False
    return name in NEEDED or name.startswith(tuple(NEEDED_PREFIXES))
