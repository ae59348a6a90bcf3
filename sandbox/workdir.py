"""The folders of sessions, looked at and removed from outside while hostile code may own them."""

from __future__ import annotations

import os
import shutil

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
    """Remove the folder of sessions that have ended, whatever its modes."""
    for folder, names, _ in os.walk(path):
        for name in names:
            inner = os.path.join(folder, name)
            if not os.path.islink(inner):
                os.chmod(inner, 0o700)
    shutil.rmtree(path, ignore_errors=True)
