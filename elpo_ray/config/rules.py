"""The one form of a configuration error."""

from __future__ import annotations

from typing import Any


def require(ok: bool, key: str, value: Any, remedy: str) -> None:
    """Raise the one form of a user's configuration error unless `ok`."""
    if not ok:
        raise ValueError(f"{key}={value!r}: {remedy}")
