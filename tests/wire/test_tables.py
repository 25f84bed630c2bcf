"""A film of a thousand bytes does not make a parser fill the memory, and honest ones are let through."""

import io
import struct

import av
import numpy as np
import pytest

from app.errors import MalformedBody, TooLarge
from app.wire.avif.boxes import box
from app.wire.clips.reels import reel_of
from app.wire.clips.tables import MAX_BOXES, MAX_SAMPLES, check_tables

MANY = 70_000_000


def movie(**muxing: str) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options=muxing) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


def lying(name: bytes, at: int, form: str, *numbers: int, **muxing: str) -> bytes:
    body = bytearray(movie(**muxing))
    struct.pack_into(form, body, body.index(name) + 4 + at, *numbers)
    return bytes(body)


@pytest.mark.parametrize("muxing", [{}, {"movflags": "frag_every_frame+empty_moov+default_base_moof"}], ids=str)
def test_honest_films_pass(muxing):
    body = movie(**muxing)
    check_tables(body)
    assert reel_of(body, max_pixels=1 << 10).count == 3


@pytest.mark.parametrize(
    "body",
    [
        lying(b"stsz", 4, ">II", 1, MANY),
        lying(b"stsc", 8, ">II", 1, MANY),
        lying(b"stts", 8, ">I", MANY),
        lying(b"trun", 4, ">I", MANY, movflags="frag_every_frame+empty_moov+default_base_moof"),
        box(b"moov", box(b"dinf", box(b"stsz", bytes(4), struct.pack(">II", 1, MANY)))),
        b"".join(box(b"moov", box(b"stsz", bytes(4), struct.pack(">II", 1, MAX_SAMPLES // 2))) for _ in range(3)),
        box(b"moov", box(b"meta", bytes(4), box(b"stsz", bytes(4), struct.pack(">II", 1, MANY)))),
        box(
            b"moov",
            box(b"stsc", bytes(8 - 1) + b"\1", struct.pack(">III", 1, 1 << 20, 1)),
            box(b"stco", bytes(1 << 16)),
        ),
        struct.pack(">I4sQ", 1, b"moov", 36) + box(b"stsz", bytes(4), struct.pack(">II", 1, MANY)),
    ],
    ids=range(9),
)
def test_tables_that_say_too_much_are_refused(body):
    with pytest.raises(TooLarge, match="samples"):
        check_tables(body)


def test_it_is_asked_before_a_parser_is():
    with pytest.raises(TooLarge, match="70000000 samples"):
        reel_of(lying(b"stsz", 4, ">II", 1, MANY), max_pixels=1 << 10)


def test_boxes_have_an_end():
    with pytest.raises(MalformedBody, match="boxes"):
        check_tables(box(b"free") * (MAX_BOXES + 1))
    with pytest.raises(MalformedBody, match="compressed"):
        check_tables(box(b"moov", box(b"cmov", bytes(9))))
    deep = b""
    for _ in range(5000):
        deep = box(b"moov", deep)
    check_tables(deep)


@pytest.mark.parametrize("body", [b"", bytes(7), struct.pack(">I4s", 4, b"moov"), struct.pack(">I4sQ", 1, b"moov", 0)])
def test_lengths_that_are_none_end_it(body):
    check_tables(body + bytes(64))


def test_a_list_of_edits_does_not_repeat_frames():
    """Each of these entries shows the film once more; FFmpeg would list every frame for each."""
    body = movie()
    entries = 20000
    edits = box(b"edts", box(b"elst", struct.pack(">II", 0, entries), struct.pack(">IiI", 300, 0, 1 << 16) * entries))
    at, old = body.index(b"edts") - 4, struct.unpack_from(">I", body, body.index(b"edts") - 4)[0]
    grown = bytearray(body[:at] + edits + body[at + old :])
    for name in (b"trak", b"moov"):
        place = body.index(name) - 4
        struct.pack_into(">I", grown, place, struct.unpack_from(">I", body, place)[0] + len(edits) - old)
    assert reel_of(bytes(grown), max_pixels=1 << 10).count == 3
