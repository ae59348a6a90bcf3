"""Images that come out of a session: what is let through, and what a hostile reply can carry."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.limits import MAX_FIGURES, MAX_FIGURES_BYTES
from sandbox.png import MAX_PIXELS, MAX_SIDE, cleaned, size_of
from sandbox.results import Kind
from sandbox.wire import Breach, Reply, pack_reply, unpack_reply

NONCE = b"12345678"
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def part(name: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def begin(width: int = 3, height: int = 2, *others: int) -> bytes:
    return part(b"IHDR", struct.pack(">IIBBBBB", width, height, *(others or (8, 2, 0, 0, 0))))


PICTURE = part(b"IDAT", zlib.compress(bytes(20)))
IMAGE = SIGNATURE + begin() + PICTURE + part(b"IEND")


def test_a_sound_image_passes_as_it_is() -> None:
    assert cleaned(IMAGE) == IMAGE and size_of(IMAGE) == (3, 2)


def test_only_the_picture_passes() -> None:
    text, moving = part(b"tEXt", b"Software\0evil"), part(b"acTL", bytes(8))
    data = SIGNATURE + begin() + text + moving + PICTURE + text + part(b"IEND")
    assert cleaned(data + b"<script>") == IMAGE


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GIF89a" + bytes(100),
        SIGNATURE,
        IMAGE[:-1],
        IMAGE[:20],
        SIGNATURE + PICTURE + part(b"IEND"),
        SIGNATURE + PICTURE + begin() + part(b"IEND"),
        SIGNATURE + begin() + begin() + PICTURE + part(b"IEND"),
        SIGNATURE + begin() + part(b"IEND"),
        SIGNATURE + begin() + PICTURE,
        SIGNATURE + begin() + PICTURE + part(b"IEND", b"x"),
        SIGNATURE + begin() + part(b"EVIL") + PICTURE + part(b"IEND"),
        SIGNATURE + part(b"IHDR", bytes(12)) + PICTURE + part(b"IEND"),
        SIGNATURE + struct.pack(">I", 1 << 31) + b"IHDR",
        *(
            SIGNATURE + begin(*sides) + PICTURE + part(b"IEND")
            for sides in [
                (0, 1),
                (1, 0),
                (MAX_SIDE + 1, 1),
                (1, MAX_SIDE + 1),
                (MAX_SIDE, MAX_PIXELS // MAX_SIDE + 1),
                ((1 << 32) - 1, (1 << 32) - 1),
                (1, 1, 3, 2, 0, 0, 0),
                (1, 1, 8, 5, 0, 0, 0),
                (1, 1, 8, 2, 1, 0, 0),
                (1, 1, 8, 2, 0, 1, 0),
                (1, 1, 8, 2, 0, 0, 2),
            ]
        ),
    ],
)
def test_what_is_no_image_or_too_large_a_one_does_not_pass(data: bytes) -> None:
    assert cleaned(data) is None


@given(st.binary(max_size=200), st.integers(0, len(IMAGE)))
def test_no_bytes_harm_the_reader(data: bytes, cut: int) -> None:
    for given_bytes in (data, SIGNATURE + data, IMAGE[:cut] + data):
        image = cleaned(given_bytes)
        assert image is None or (image.startswith(SIGNATURE) and min(size_of(image)) > 0)


def with_figures(*figures: bytes) -> Reply:
    return Reply(Kind.OK, "v", None, "", (), figures)


def test_figures_travel_with_a_reply() -> None:
    reply = replace(with_figures(IMAGE, b"x"), truncated=("figures",))
    data = pack_reply(NONCE, reply)
    assert all(unpack_reply(data[:cut], NONCE, 100) is None for cut in range(len(data)))
    assert unpack_reply(data, NONCE, 100) == reply


@pytest.mark.parametrize(
    "figures",
    [
        (b"x",) * (MAX_FIGURES + 1),
        (bytes(MAX_FIGURES_BYTES + 100),),
        (b"x", b"", b"y"),
    ],
)
def test_more_figures_than_an_honest_session_sends_are_a_breach(figures: tuple[bytes, ...]) -> None:
    with pytest.raises(Breach):
        unpack_reply(pack_reply(NONCE, with_figures(*figures)), NONCE, 100)


@given(st.binary(min_size=1, max_size=60))
def test_any_bytes_in_the_place_of_figures_are_read_or_a_breach(part: bytes) -> None:
    head = pack_reply(NONCE, Reply(Kind.OK, None, None, "", ()))
    data = head[:-4] + struct.pack("!I", len(part)) + part
    try:
        reply = unpack_reply(data, NONCE, 100)
    except Breach:
        return
    assert reply is not None and sum(map(len, reply.figures)) + 4 * len(reply.figures) == len(part)
