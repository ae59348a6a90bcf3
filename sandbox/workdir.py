"""The folders of sessions, looked at and removed from outside while hostile code may own them."""

from __future__ import annotations

import itertools
import os
import secrets
from contextlib import suppress

from sandbox.limits import Limits


def over_quota(path: str, limits: Limits) -> bool:
    """Whether a session left too much in its folder. Looks at a bounded number of entries.

    A folder that cannot be listed counts as too much: only hostile code makes one.
    """
    count, total, pending = 0, 0, [path]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    count += 1
                    total += entry.stat(follow_symlinks=False).st_size
                    if count > limits.files or total > limits.file_mib << 20:
                        return True
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
        except FileNotFoundError:  # removed in between
            continue
        except OSError:
            return True
    return False


def remove(path: str) -> None:
    """Remove the folder of sessions that have ended, whatever its modes and however deep it is."""
    token = secrets.token_hex(8)
    free_names = (os.path.join(path, f"{token}-{number}") for number in itertools.count())
    with suppress(OSError):  # it is gone already, or a mount point that its outer process removes
        while folders := _remove_files(path):
            for folder in folders:
                os.chmod(folder, 0o700)
                for inner in _remove_files(folder):
                    os.chmod(inner, 0o700)
                    os.rename(inner, next(free_names))
                os.rmdir(folder)
        os.rmdir(path)


def _remove_files(path: str) -> list[str]:
    """Remove what is in a folder, but for the folders in it: their paths."""
    with os.scandir(path) as entries:
        found = list(entries)
    folders = [entry.path for entry in found if entry.is_dir(follow_symlinks=False)]
    for entry in found:
        if not entry.is_dir(follow_symlinks=False):
            os.unlink(entry.path)
    return folders
