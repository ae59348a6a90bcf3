"""Files and folders that appear whole: a reader sees the old content or the new one, never a part."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once: a reader sees the old text or the new one, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def commit(folder: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a partial folder, then give it its final name."""
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    partial.rename(folder)
