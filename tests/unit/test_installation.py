"""What an installation without the checkout brings along."""

from __future__ import annotations

import zipfile
from pathlib import Path

from wheels import PACKAGES, build


def test_a_wheel_holds_all_files_that_the_programs_read(tmp_path: Path) -> None:
    wheel = build(tmp_path)
    source = tmp_path / "source"
    held = set(zipfile.ZipFile(wheel).namelist())
    shared = f"{'-'.join(wheel.name.split('-')[:2])}.data/data/share/elpo_ray"
    for folder in (*PACKAGES, "conf", "requirements"):
        for file in (source / folder).rglob("*"):
            if file.is_file() and file.suffix not in (".md", ".pyc"):
                name = str(file.relative_to(source))
                assert (name if folder in PACKAGES else f"{shared}/{name}") in held, name
