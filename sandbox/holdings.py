"""What a session's process keeps in files, with a name or without, as it is counted from outside.

To look at everything takes time. So what nobody can have changed is not looked at again: a file
without a name had one before, and the kernel shows when a folder was last changed.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress

from sandbox.inspection import Sight, nameless_bytes, num_descriptors
from sandbox.limits import Limits
from sandbox.results import WorkFile
from sandbox.wire import WORK_FD
from sandbox.workdir import Contents, contents

_LONE_FOLDER_LINKS = 2
"""Links to a folder that has none below, on file systems that count them."""
_QUOTAS_OPEN, _QUOTAS_MAPPED = 4, 16
"""How much the file system may grow, in quotas of a state, before a process of which the kernel
shows no files is suspected: if it has descriptors for so many files, and if it has not."""
_CLOCK_OF_FILES = 5
"""CLOCK_REALTIME_COARSE: its ticks are the times that changes of files bear, so a change that comes
later than a tick bears that one or a later one."""


class Holdings:
    """What one process keeps; each method is told its id and work folder."""

    def __init__(self) -> None:
        self._state_before: int | None = None
        self._touched = False
        """Whether the last call may have created or removed files."""
        self._before: Contents | None = None
        self._found: Contents | None = None
        """What was in its folder when it was last looked at."""
        self._nameless = 0
        """Bytes of its files without a name, as of the last look at them."""
        self._odd = False
        """Whether it was once seen with other descriptors than those that it was given."""
        self._hidden = False
        """Whether the kernel did not show its files at the last look at those without a name."""
        self._used_before = 0

    def begin(self, folder: str, limits: Limits) -> None:
        """A call is about to run. Raises OSError as `exceed` does."""
        self._state_before = _state_of(folder)
        self._before = contents(folder, limits)
        self._used_before = used_bytes(_root_of(folder))

    def end(self, folder: str) -> None:
        """The call has ended."""
        self._touched = self._state_before is None or _state_of(folder) != self._state_before

    def count(self, folder: str, limits: Limits) -> None:
        """Count the files in its folder anew. Raises OSError as `exceed` does."""
        self._found = contents(folder, limits)

    def exceed(self, pid: int, folder: str, limits: Limits, *, running: bool = False) -> bool:
        """Whether they are too much or too many, those included that it removed and still holds.

        Raises OSError if that cannot be found out for want of something."""
        self.count(folder, limits)
        self._nameless = 0
        if self._found is None:
            return True
        looks = running or self._touched
        with suppress(OSError):  # it is gone
            if not looks and self.have_names(pid):
                return False
        most = limits.file_mib << 20
        nameless = nameless_bytes(pid, _root_of(folder), largest=most if looks else 0)
        self._hidden, self._nameless = nameless is None, nameless or 0
        return self.total_bytes() > most

    def may_hoard(self, pid: int, folder: str, limits: Limits) -> bool:
        """Whether a process that runs, and of which the kernel does not show the files, may be what
        has filled the file system of the work folders since its call began."""
        if not self._hidden or _state_of(folder) == self._state_before is not None:
            return False
        try:
            others = num_descriptors(pid) - (WORK_FD + 1)
        except OSError:  # it is gone
            return False
        quotas = _QUOTAS_OPEN if others > _QUOTAS_OPEN else _QUOTAS_MAPPED
        grown = used_bytes(_root_of(folder)) - self._used_before
        return grown > quotas * limits.file_mib << 20

    def exceed_as_seen(self, sight: Sight | None, limits: Limits) -> bool:
        """Whether they were too much when the process showed itself."""
        nameless = sight.nameless if sight is not None else 0
        return nameless > 0 and self.total_bytes(sight) > limits.file_mib << 20

    def have_names(self, pid: int) -> bool:
        """Whether, as far as everybody can see, the process has no file of its own that has no
        name: nothing but its first descriptors, which were the given ones when it last touched a
        file. Raises OSError if it is gone."""
        return not (self._touched or self._odd) and num_descriptors(pid) == WORK_FD + 1

    def doubt(self) -> None:
        """It was seen with other descriptors than those that it was given."""
        self._odd = True

    def total_bytes(self, sight: Sight | None = None) -> int:
        """Bytes of its files when they were last looked at, with a name or without, or as many as
        `sight` shows if these are more."""
        nameless = max(self._nameless, sight.nameless if sight is not None else 0)
        return nameless + (self._found.total if self._found is not None else 0)

    @property
    def changed(self) -> tuple[WorkFile, ...]:
        """Files that are new or other than before the call."""
        return self._found.changed_from(self._before) if self._found is not None else ()


def used_bytes(path: str) -> int:
    """Bytes in use on the file system that a path lies on; 0 if that is gone."""
    try:
        found = os.statvfs(path)
    except OSError:
        return 0
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def _root_of(folder: str) -> str:
    """The folder that holds all work folders."""
    return os.path.dirname(os.path.dirname(folder))


def _state_of(folder: str) -> int | None:
    """Other than before once something was created or removed in a folder, by the kernel's clock;
    None if that cannot be known, as where folders are below."""
    try:
        found = os.stat(folder)
    except OSError:  # the code removed it
        return None
    lone = found.st_nlink == _LONE_FOLDER_LINKS
    too_soon = time.clock_gettime_ns(_CLOCK_OF_FILES) <= found.st_mtime_ns
    return found.st_mtime_ns if lone and not too_soon else None
