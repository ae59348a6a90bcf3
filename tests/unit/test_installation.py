"""What an installation without the checkout brings along."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("elpo_ray", "launch", "sandbox")


def test_a_wheel_holds_all_files_that_the_programs_read(tmp_path: Path) -> None:
    source = tmp_path / "source"
    names = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "conf", "requirements")
    for name in (*PACKAGES, *names):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(source)], check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    shared = f"{'-'.join(wheel.name.split('-')[:2])}.data/data/share/elpo_ray"
    for folder in (*PACKAGES, "conf", "requirements"):
        for file in (source / folder).rglob("*"):
            if file.is_file() and file.suffix not in (".md", ".pyc"):
                name = str(file.relative_to(source))
                assert (name if folder in PACKAGES else f"{shared}/{name}") in held, name
