"""The environment variables that the user's code sees: those that `task.env` names, and what a
process needs to run at all.

Values travel from the driver to the processes as arguments of their start, and are written nowhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from elpo_ray.config.rules import require

NEEDED = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|LANG|LANGUAGE|TZ|TERM|PWD|TMPDIR|TMP|TEMP|HOSTNAME|VIRTUAL_ENV"
    r"|SSL_CERT_FILE|SSL_CERT_DIR|LD_LIBRARY_PATH|LD_PRELOAD|HF_HOME|HF_HUB_CACHE|HF_HUB_OFFLINE"
    r"|(LC|XDG|CONDA|VLLM|TORCH|CUDA|NVIDIA|NCCL|OMP|MKL|KMP|GLOO|TOKENIZERS)_.*|PYTHON.*"
    r"|(TRANSFORMERS|ELPO)_.*"
)
"""What Python, Ray, vLLM and the system need."""
SECRET = re.compile(r"TOKEN(_|$)|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
"""A name with such a part is never needed."""


def named(names: Sequence[str]) -> dict[str, str]:
    """The driver's values of the variables in `task.env`. ValueError if one is not set."""
    missing = [name for name in names if name not in os.environ]
    require(not missing, "task.env", list(names), f"{', '.join(missing)} not set; export it first")
    return {name: os.environ[name] for name in names}


def keep_only(values: Mapping[str, str]) -> None:
    """Take everything out of this process's environment but `values` and what it needs."""
    for name in [name for name in os.environ if name not in values and not _needed(name)]:
        del os.environ[name]
    os.environ.update(values)


@contextmanager
def restored(environment: Mapping[str, str]) -> Iterator[None]:
    """This process's environment is `environment` in the body, and afterwards what it was."""
    before = dict(os.environ)
    try:
        os.environ.clear()
        os.environ.update(environment)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _needed(name: str) -> bool:
    if name.startswith("RAY_"):  # also the token by which the process speaks with its cluster
        return True
    return NEEDED.fullmatch(name) is not None and SECRET.search(name) is None
