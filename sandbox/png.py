"""PNG images that hostile code may have made: what is let through of one, and how large it is.

Nothing is decoded. What is let through has a sound beginning, bounded sides, the parts that make
the picture and nothing else, so that no text, profile or animation travels with it.
"""

from __future__ import annotations

import struct

MAX_PIXELS = 16 << 20
"""Bound of one image, so that whoever decodes it needs at most some 64 MiB."""
MAX_SIDE = 1 << 14
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEAD, _BEGIN = struct.Struct(">I4s"), struct.Struct(">IIBBBBB")
_CRC_BYTES = 4
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
"""Bits of a sample that each type of colours can have."""
_PICTURE = (b"PLTE", b"tRNS", b"IDAT")
_CRITICAL_BIT = 0x20
"""Unset in the first letter of a part without which the picture cannot be shown."""


def size_of(image: bytes) -> tuple[int, int]:
    """Width and height of what `cleaned` let through."""
    width, height, *_ = _BEGIN.unpack_from(image, len(_SIGNATURE) + _HEAD.size)
    return width, height


def cleaned(data: bytes) -> bytes | None:
    """The image with nothing but its picture; None if `data` is no PNG, or too large a one."""
    begin = len(_SIGNATURE)
    if not data.startswith(_SIGNATURE):
        return None
    kept, at, pictured = [_SIGNATURE], begin, False
    while at + _HEAD.size <= len(data):
        length, name = _HEAD.unpack_from(data, at)
        end = at + _HEAD.size + length + _CRC_BYTES
        if end > len(data) or (at == begin) != (name == b"IHDR"):
            return None
        if name == b"IHDR" and not _sound(data[at + _HEAD.size : end - _CRC_BYTES]):
            return None
        if name in (b"IHDR", b"IEND", *_PICTURE):
            kept.append(data[at:end])
        elif not name[0] & _CRITICAL_BIT:
            return None
        pictured |= name == b"IDAT"
        if name == b"IEND":
            return b"".join(kept) if pictured and not length else None
        at = end
    return None


def _sound(begin: bytes) -> bool:
    """Whether an image may begin so."""
    if len(begin) != _BEGIN.size:
        return False
    width, height, depth, colours, packing, filtering, lacing = _BEGIN.unpack(begin)
    bounded = 0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE and width * height <= MAX_PIXELS
    known = depth in _DEPTHS.get(colours, ()) and packing == filtering == 0 and lacing in (0, 1)
    return bounded and known
