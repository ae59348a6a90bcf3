"""What a tool of the user's returned or raised, as the text of an observation."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from enum import Enum
from typing import Any

from elpo_ray.types import ToolResult
from sandbox.results import ACCIDENTAL

MAX_CHARS = 1 << 16
"""A longer result is cut in the middle at once, so that no state or report holds megabytes."""


def as_text(value: Any) -> str:
    """A result as the policy reads it: text as it is, anything else as JSON."""
    if isinstance(value, str):
        return bounded(str(value))
    try:
        text = json.dumps(value, ensure_ascii=False, default=_plain)
    except (TypeError, ValueError):  # a key that JSON does not know, or an object within itself
        text = str(value)
    return bounded(text)


def error_text(error: BaseException) -> str:
    """An exception as the policy reads it."""
    said = str(error)
    return bounded(f"Error: {type(error).__name__}" + (f": {said}" if said else ""))


def bounded(text: str) -> str:
    """`text` with at most about `MAX_CHARS` characters, all of which UTF-8 can hold."""
    if len(text) > MAX_CHARS:
        half = MAX_CHARS // 2
        text = f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[-half:]}"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def digest(result: ToolResult) -> str:
    """Fingerprint of what a repetition of the call must return; memory addresses do not count."""
    masked = ACCIDENTAL.sub("~", result.text)
    said = f"{result.kind.value}\n{masked}".encode()
    return hashlib.blake2b(said, digest_size=8).hexdigest()


def _plain(value: Any) -> Any:
    """What JSON can hold in the place of an object that it does not know."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if isinstance(value, bytes | bytearray):
        return value.decode("utf-8", "backslashreplace")
    for method in ("tolist", "model_dump"):  # arrays; pydantic
        if callable(convert := getattr(value, method, None)):
            return convert()
    return str(value)
