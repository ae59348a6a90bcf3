"""The code blocks of a page, and a folder in which they run as a reader would run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A code block of a page."""

    language: str
    title: str
    text: str


def blocks(page: str) -> Iterator[Block]:
    """The blocks of a page of the documentation, in order."""
    for match in FENCE.finditer((ROOT / page).read_text(encoding="utf-8")):
        yield Block(*(part or "" for part in match.groups()))


@dataclass(frozen=True)
class Reader:
    """Somebody with an empty folder and the commands `elpo` and `python`."""

    folder: Path
    """Where commands are typed."""
    environment: dict[str, str]

    @classmethod
    def beginning(cls, place: Path, also: dict[str, list[str]]) -> Reader:
        """With an empty folder in `place`. `also` are words that are added to a command of `elpo`
        wherever it is typed, so that it is done soon."""
        programs, folder = place / "bin", place / "folder"
        programs.mkdir()
        folder.mkdir()
        lines = ["#!/bin/sh", 'case "$1" in']
        elpo = f'exec "{sys.executable}" -m elpo_ray.cli "$@"'
        for command, words in also.items():
            lines.append(f"{command}) {elpo} {' '.join(words)} ;;")
        lines += [f"*) {elpo} ;;", "esac"]
        (programs / "elpo").write_text("\n".join(lines) + "\n")
        (programs / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        for program in programs.iterdir():
            program.chmod(0o755)
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        also_set = {"PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        return cls(folder, os.environ | also_set)

    def types(self, commands: str, timeout: float = 300) -> str:
        """What the commands print. The first that fails fails the test."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=self.folder, env=self.environment, timeout=timeout,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{commands}\n{done.stdout[-3000:]}"
        return done.stdout

    def writes(self, name: str, text: str) -> None:
        """A file in the folder."""
        (self.folder / name).write_text(text, encoding="utf-8")
