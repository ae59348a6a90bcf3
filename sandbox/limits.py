"""What one session may use."""

from __future__ import annotations

from dataclasses import dataclass, fields

OUTPUT_KILL_BYTES = 1 << 20
"""A call that prints more than this, stdout and stderr together, is killed."""

MAX_CODE_BYTES = 8 << 20
"""Longer cells are refused."""

MAX_FIGURES, MAX_FIGURES_BYTES = 8, 2 << 20
"""What one call may show, and the size of all its images together."""


_LEAST = {"memory_mib": 64, "open_files": 16}
"""With less a session cannot start, even if it imports nothing beforehand."""
_MOST = 1 << 31
"""No limit is larger: the kernel's numbers have an end."""


def check_number(name: str, value: object, *, whole: bool, least: float | None = None) -> None:
    """Raise ValueError unless it is a number, and not below `least`; without that, above 0."""
    wanted = ""
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        wanted = "a whole number" if whole else "a number"
    elif not (value > 0 if least is None else value >= least):  # as NaN is not
        wanted = "a value above 0" if least is None else f"{least:g} or more"
    elif value > _MOST:
        wanted = f"at most {_MOST}"
    if wanted:
        raise ValueError(f"{name}={value!r:.100}: use {wanted}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits per call, except where a field says otherwise."""

    wall_s: float = 10.0
    """Seconds by the clock."""
    cpu_s: float = 10.0
    """Processor seconds of all threads together."""
    memory_mib: int = 2048
    """Address space of one process (RLIMIT_AS)."""
    output_kib: int = 64
    """Kept of each of stdout, stderr, value and traceback: half head, half tail."""
    file_mib: int = 16
    """Size of one file, and of all files of a state together."""
    files: int = 64
    """Files and folders in a working directory."""
    open_files: int = 64
    """Open files of the process."""
    threads: int = 64
    """Threads and processes of the session."""
    snapshots: int = 128
    """Kept states of one tree; above that the least recently used ones are given up."""

    def __post_init__(self) -> None:
        for field in fields(self):
            whole = field.type == "int"
            check_number(f"limits.{field.name}", getattr(self, field.name), whole=whole)
        for name, least in _LEAST.items():
            check_number(f"limits.{name}", getattr(self, name), whole=True, least=least)
        if self.output_kib > OUTPUT_KILL_BYTES >> 10:
            raise ValueError(
                f"limits.output_kib={self.output_kib!r}: use at most {OUTPUT_KILL_BYTES >> 10}, "
                "the amount at which a call is killed"
            )
