"""`python -m elpo_ray.new FOLDER`: write a project that trains at once on a tiny model.

It holds tools (a function and an environment with its reward), their data, demonstrations, the
run's file and a test. Exit codes: 0 done; 2 a folder that is not empty or cannot be written.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from elpo_ray.config.arguments import Parser

PROJECT = Path(__file__).parent / "project"
SUFFIX = ".template"
MAKE_DATA = "make_data.py"
"""The project's script that writes its data."""


def write_project(folder: Path) -> None:
    """Write the project. Raises ValueError for a folder that holds something already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: holds something already; name a new or an empty folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for template in sorted(PROJECT.glob(f"*{SUFFIX}")):
            text = template.read_text(encoding="utf-8")
            (folder / template.name.removesuffix(SUFFIX)).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{folder}: {error.strerror}; name another folder") from None
    subprocess.run([sys.executable, MAKE_DATA], cwd=folder, check=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the project and return the exit code."""
    parser = Parser("new", __doc__ or "")
    parser.add_argument("folder", type=Path, help="a new or an empty folder")
    folder: Path = parser.parse_args(argv).folder

    def command() -> None:
        write_project(folder)
        print(f"{folder}: a project; README.md says what is in it. To train:")
        print(f"  cd {shlex.quote(str(folder))} && elpo train agent.yaml")

    return parser.run(command)


if __name__ == "__main__":
    sys.exit(main())
