"""Files and folders that appear whole: a reader sees the old content or the new one, never a part.

Invariant: what gets its final name is on disk by then, so that a crash of the machine cannot leave
a name without its content.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TRIED = 1 << 16
"""Bytes that are written where it is looked at whether anything can be."""


def write_whole(path: Path, text: str) -> None:
    """Replace the text of a file at once."""
    partial = partial_of(path)
    partial.write_text(text, encoding="utf-8")
    flush(partial)
    partial.replace(path)


def partial_of(final: Path) -> Path:
    """The name beside `final` under which it is being written."""
    return final.with_name(f".partial-{final.name}")


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder, `partial_of(final)`, to write into. When the block ends it becomes
    `final`, in place of a folder of that name; when the block raises it is removed, and `final` is
    what it was."""
    partial = partial_of(final)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for entry in partial.rglob("*"):
            flush(entry)
        flush(partial)
        _rename(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def flush(entry: Path) -> None:
    """Wait until a file, or the list of a folder's entries, is on disk."""
    handle = os.open(entry, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _rename(partial: Path, final: Path) -> None:
    replaced = final.with_name(f".replaced-{final.name}")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)
    flush(final.parent)


def check_writable(folder: Path, key: str, value: str) -> None:
    """Raise ValueError, `key=value: …`, unless `folder` can be written to, or made where it is
    absent. Leaves nothing behind."""
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".elpo-", dir=place) as scratch:
            written = Path(scratch, "written")
            written.write_bytes(bytes(TRIED))  # a full disk has room for folders
            flush(written)
    except OSError as error:
        raise ValueError(
            f"{key}={value!r}: nothing can be written to {place} ({error.strerror}); name a folder "
            "that you may write to, or free disk space"
        ) from None
