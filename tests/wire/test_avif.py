import io
import resource
import struct
import time

import numpy as np
import pytest
from PIL import Image, ImageOps

from app.errors import InvalidImage, MalformedBody, ServiceError
from app.wire.avif.boxes import box
from app.wire.avif.read import MAX_EXTENTS, MAX_ITEMS, read_avif
from app.wire.avif.still import ALPHA, Still, head_of
from app.wire.headers import read_header
from app.wire.images import read_image
from tests.wire.av1 import FRAME, SEQUENCE, frame, reduced, unit, whole

WIDTH, HEIGHT = 61, 43
MEBIBYTE = 1 << 20
SECONDS = 2.0


def picture(mode: str = "RGB") -> Image.Image:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    image = Image.fromarray(np.stack([4 * x, 5 * y, 128 + 0 * x], axis=-1).astype(np.uint8))
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def saved(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "AVIF", **options)
    return file.getvalue()


def read(body: bytes) -> np.ndarray:
    return read_image(body, read_header(body), background=(0, 0, 0), max_pixels=MEBIBYTE)


def by_pillow(body: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(body)) as file:
        image = ImageOps.exif_transpose(file).convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0)), image).convert("RGB"))


def of(data: bytes, width: int = WIDTH, height: int = HEIGHT) -> bytes:
    """A file of one picture around a bitstream."""
    return head_of(width, height, [Still(b"\x81\x00\x0c\0", [], len(data))]) + data


def full(name: bytes, *parts: bytes, version: int = 0) -> bytes:
    return box(name, bytes([version, 0, 0, 0]), *parts)


def file(**changes: bytes) -> bytes:
    """A file whose boxes within meta are given, or else sound."""
    data = unit(SEQUENCE, reduced(WIDTH, HEIGHT)) + unit(FRAME, b"")
    sound = {
        "pitm": full(b"pitm", b"\0\1"),
        "iloc": full(b"iloc", b"\x44\0\0\1", struct.pack(">HHHII", 1, 0, 1, 0, len(data)), version=0),
        "iinf": full(b"iinf", b"\0\1", full(b"infe", b"\0\1\0\0av01\0", version=2)),
        "iprp": iprp([box(b"av1C", b"\x81\0\x0c\0"), full(b"ispe", struct.pack(">II", WIDTH, HEIGHT))], {1: [1, 2]}),
    }
    parts = [value for value in (sound | changes).values() if value]
    top = box(b"ftyp", b"avif" + bytes(4) + b"avif") + box(b"mdat", data)
    body = top + full(b"meta", *parts)
    at = body.index(data)
    place = struct.pack(">HHHII", 1, 0, 1, 0, len(data))
    return body.replace(place, struct.pack(">HHHII", 1, 0, 1, at, len(data)))


def iprp(properties: list[bytes], owned: dict[int, list[int]]) -> bytes:
    owners = [struct.pack(">HB", item, len(own)) + bytes(own) for item, own in owned.items()]
    return box(b"iprp", box(b"ipco", *properties), full(b"ipma", struct.pack(">I", len(owners)), *owners))


def refused(body: bytes, error: type[Exception], match: str) -> None:
    """In the time, and in the memory, that a body of a MiB may take."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    with pytest.raises(error, match=match):
        read(body)
    assert time.process_time() - start < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10


# ------------------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"subsampling": "4:4:4", "quality": 100},
        {"subsampling": "4:0:0"},
        {"range": "limited"},
        {"alpha_premultiplied": True},
        {"save_all": True},
        {"tile_rows": 1, "tile_cols": 1},
    ],
)
def test_it_is_what_pillow_makes_of_the_whole_file(mode, options):
    body = saved(picture(mode), **options)
    np.testing.assert_array_equal(read(body), by_pillow(body))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turns_are_those_of_pillow(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    body = saved(picture(), exif=exif)
    assert read_avif(memoryview(body)).orientation == orientation
    np.testing.assert_array_equal(read(body), by_pillow(body))


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_of_a_sequence_it_is_the_first_frame(mode):
    body = saved(picture(mode), save_all=True, append_images=[picture(mode).rotate(180)])
    np.testing.assert_array_equal(read(body), by_pillow(body))


def test_frames_of_a_sequence_are_counted():
    assert read_header(saved(picture(), save_all=True, append_images=[picture()] * 4)).frames == 5
    assert read_header(saved(picture())).frames == 1


def test_an_icc_profile_says_more_than_cicp():
    body = saved(picture(), icc_profile=b"x" * 200)
    assert b"prof" in body
    assert read_avif(memoryview(body)).cicp == b""
    assert read_avif(memoryview(saved(picture()))).cicp == bytes([1, 13, 0, 1])


def test_where_the_file_says_nothing_the_bitstream_says_the_colours():
    data = unit(SEQUENCE, reduced(WIDTH, HEIGHT, colour=(9, 16))) + unit(FRAME, b"")
    assert read_avif(memoryview(of(data))).cicp == bytes([9, 16, 0, 1])
    with pytest.raises(InvalidImage, match=r"AVIF is HDR \(PQ\)"):
        read_header(of(data))


def test_nothing_else_of_the_file_reaches_the_decoder():
    body = saved(picture("RGBA"), exif=Image.Exif(), xmp=b"<secret/>", save_all=True, append_images=[picture("RGBA")])
    header = read_header(body)
    kept = b"".join(part if isinstance(part, bytes) else body[part] for part in header.kept)
    assert b"moov" in body
    assert b"secret" in body
    assert not any(word in kept for word in (b"moov", b"secret", b"Exif"))
    assert len(kept) < len(body)


def test_the_first_bytes_of_a_file_say_its_size():
    body = saved(picture(), quality=100, subsampling="4:4:4")
    cut = body[: len(body) - 200]
    assert read_header(cut).shown == (WIDTH, HEIGHT)
    with pytest.raises(MalformedBody, match="truncated or corrupt"):
        read(cut)


def test_data_in_pieces_and_within_meta():
    data = unit(SEQUENCE, reduced(WIDTH, HEIGHT)) + unit(FRAME, b"")
    pieces = struct.pack(">HHHHIIII", 1, 1, 0, 2, 0, 7, 7, len(data) - 7)
    body = file(iloc=full(b"iloc", b"\x44\0\0\1", pieces, version=1), idat=box(b"idat", data))
    found = read_avif(memoryview(body))
    assert b"".join(body[part] for part in found.parts if isinstance(part, slice)) == data


# ------------------------------------------------------------------------------------------------------------- hostile


def test_the_sound_file_of_these_tests_is_sound():
    assert read_header(file()).shown == (WIDTH, HEIGHT)
    refused(file(), MalformedBody, "Failed to decode")  # it has no pixels


@pytest.mark.parametrize("side", [1, 65536])
def test_sizes_that_contradict_each_other(side):
    refused(of(unit(SEQUENCE, reduced(side, side))), MalformedBody, "two different sizes")
    refused(of(unit(SEQUENCE, reduced(WIDTH, HEIGHT)), side, side), MalformedBody, "two different sizes")
    both = unit(SEQUENCE, reduced(WIDTH, HEIGHT)) + unit(SEQUENCE, reduced(side, side))
    refused(of(both), MalformedBody, "two different sizes")


def test_a_size_of_the_frame_s_own_never_reaches_the_decoder():
    data = unit(SEQUENCE, whole(WIDTH, HEIGHT)) + unit(FRAME, frame(override=1))
    refused(of(data), InvalidImage, "states a size beside")


def test_alpha_of_another_size():
    colour, alpha = (unit(SEQUENCE, reduced(side, side)) + unit(FRAME, b"") for side in (64, 8192))
    stills = [Still(b"\x81\x00\x0c\0", [], len(data)) for data in (colour, alpha)]
    refused(head_of(64, 64, stills) + colour + alpha, MalformedBody, "two different sizes")


def test_a_picture_over_the_limit_is_not_decoded():
    data = unit(SEQUENCE, reduced(65536, 65536)) + unit(FRAME, b"")
    refused(of(data, 65536, 65536), ServiceError, "more than the limit")


def test_a_megabyte_of_hidden_frames():
    frames = unit(FRAME, b"\0" * 1000)
    data = unit(SEQUENCE, reduced(8192, 8192)) + frames * (MEBIBYTE // len(frames))
    refused(of(data, 8192, 8192), ServiceError, "more than 1024 parts|frames or layers")


@pytest.mark.parametrize("name", ["pitm", "iloc", "iinf", "iprp"])
def test_a_box_that_is_missing_or_empty(name):
    for value in (b"", box(name.encode()), full(name.encode())):
        refused(file(**{name: value}), ServiceError, "AVIF")


@pytest.mark.parametrize(
    "body",
    [
        b"\0\0\0\x10ftypavif\0\0\0\0",
        b"\0\0\0\x10ftypavis\0\0\0\0" + box(b"moov", box(b"trak")),
        b"\0\0\0\x10ftypavif\0\0\0\0" + b"\xff\xff\xff\xffmeta",
        b"\0\0\0\x10ftypavif\0\0\0\0" + b"\0\0\0\1meta" + b"\xff" * 8,
        b"\0\0\0\x10ftypavif\0\0\0\0" + b"\0\0\0\7meta",
        b"\0\0\0\x10ftypavif\0\0\0\0" + box(b"free") * (MEBIBYTE // 8),
    ],
)
def test_files_without_a_picture(body):
    refused(body, MalformedBody, "AVIF file")


def test_boxes_in_boxes():
    deep = b""
    for _ in range(10_000):
        deep = box(b"meta", bytes(4), deep)
    refused(box(b"ftyp", b"avif" + bytes(4)) + deep, MalformedBody, "has no")


def test_places_outside_and_over_again():
    for offset, length in ((2**32 - 1, 10), (0, 2**32 - 1), (2**31, 0)):
        place = struct.pack(">HHHII", 1, 0, 1, offset, length)
        refused(file(iloc=full(b"iloc", b"\x44\0\0\1", place)), MalformedBody, "AVIF file")
    every = struct.pack(">II", 0, 2**32 - 1)
    for count in (2, MAX_EXTENTS, MAX_EXTENTS + 1, 65535):
        place = struct.pack(">HHH", 1, 0, count) + every * count
        refused(file(iloc=full(b"iloc", b"\x44\0\0\1", place)), MalformedBody, "AVIF file")


def test_a_picture_within_another_item():
    place = struct.pack(">HHHHII", 1, 2, 0, 1, 0, 10)
    refused(file(iloc=full(b"iloc", b"\x44\0\0\1", place, version=1)), InvalidImage, "within another item")


@pytest.mark.parametrize("count", [MAX_ITEMS + 1, 50_000])
def test_thousands_of_items(count):
    items = [full(b"infe", struct.pack(">HH", item + 2, 0), b"av01\0", version=2) for item in range(count)]
    many = struct.pack(">H", count)
    refused(file(iinf=full(b"iinf", many, *items)), MalformedBody, "at most")
    refused(file(iinf=full(b"iinf", b"\0\1", *items)), MalformedBody, "more than")
    places = struct.pack(">HHHII", 2, 0, 1, 0, 10) * count
    refused(file(iloc=full(b"iloc", b"\x44\0", many, places)), MalformedBody, "at most")


def test_properties_by_the_thousand_for_items_by_the_thousand():
    """A MiB of the most that is let in: each is looked at once, whoever refers to it."""
    owned = {item + 2: [1] * 255 for item in range(MAX_ITEMS)}
    properties = [full(b"auxC", ALPHA, b"x")] * 127
    references = [box(b"auxl", struct.pack(">HHH", item + 2, 1, 1)) for item in range(MAX_ITEMS)]
    body = file(iprp=iprp(properties, owned), iref=full(b"iref", *references))
    assert len(body) < MEBIBYTE
    refused(body, MalformedBody, "AVIF")


def test_references_by_the_thousand():
    many = box(b"auxl", struct.pack(">HH", 9, MAX_ITEMS), b"\0\2" * MAX_ITEMS)
    body = file(iref=full(b"iref", *[many] * (MEBIBYTE // len(many))))
    start = time.process_time()
    assert read_header(body).shown == (WIDTH, HEIGHT)
    assert time.process_time() - start < SECONDS


@pytest.mark.parametrize("seed", range(4))
def test_bytes_that_are_changed_are_read_or_refused(seed):
    random = np.random.default_rng(seed)
    body = saved(picture("RGBA"), save_all=True, append_images=[picture("RGBA")])
    for _ in range(200):
        changed = bytearray(body)
        for at in random.integers(0, 700, random.integers(1, 5)):
            changed[at] = random.choice([0, 1, 0x7F, 0x80, 0xFF, int(random.integers(256))])
        try:
            read(bytes(changed))
        except ServiceError:
            continue
