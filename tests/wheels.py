"""The package as a user installs it: a wheel of this checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("elpo_ray", "launch", "sandbox")
OTHERS = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "conf", "requirements")


def build(folder: Path) -> Path:
    """Build the wheel in `folder` from a copy of the sources there, `folder/source`."""
    source = folder / "source"
    source.mkdir()
    for name in (*PACKAGES, *OTHERS):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    make = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*make, "--wheel-dir", str(folder), str(source)], check=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    return wheel
