import io
import struct
import time
import zlib

import pytest
from PIL import Image

from app.errors import InvalidImage, MalformedBody, UnsupportedMedia
from app.wire import headers
from app.wire.headers import MAX_PARTS, MAX_SCANS, read_header

FORMATS = ["PNG", "JPEG", "WebP", "AVIF"]
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def picture(kind, mode="RGB", size=(20, 12), **options):
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind, **options)
    return file.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def chunk(name, data=b""):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("size", [(1, 1), (20, 12), (300, 7)])
def test_size(kind, size):
    header = read_header(picture(kind, size=size))
    assert (header.format, header.width, header.height) == (kind, *size)
    assert header.shown == size


@pytest.mark.parametrize(
    ("mode", "options"),
    [("RGB", {}), ("RGBA", {}), ("RGB", {"lossless": True}), ("RGBA", {"lossless": True}), ("RGB", {"exif": exif(1)})],
)
def test_size_of_every_webp_layout(mode, options):
    assert read_header(picture("WebP", mode, (301, 77), **options)).shown == (301, 77)


def test_size_of_a_progressive_jpeg():
    assert read_header(picture("JPEG", progressive=True)).shown == (20, 12)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(kind, orientation):
    header = read_header(picture(kind, exif=exif(orientation)))
    assert header.orientation == orientation
    assert header.shown == ((12, 20) if orientation >= 5 else (20, 12))


def test_big_endian_exif_after_the_pixels():
    tiff = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)
    body = picture("PNG")
    assert read_header(body[:-12] + chunk(b"eXIf", tiff) + body[-12:]).orientation == 6


@pytest.mark.parametrize(
    "tiff",
    [
        b"",
        b"II",
        b"XX*\0" + bytes(20),
        b"II*\0" + struct.pack("<I", 2**32 - 1),  # a directory far outside
        b"II*\0" + struct.pack("<IH", 8, 65535),  # that many entries, and none there
        b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, 9, 0, 0),  # no such orientation
        b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 2, 1, 6, 0, 0),  # text
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WebP"])
def test_broken_exif_is_upright(kind, tiff):
    body = picture(kind, exif=b"Exif\0\0" + tiff)
    assert read_header(body).orientation == 1


def test_only_parts_that_make_pixels_are_kept():
    body = picture("JPEG", exif=exif(6), comment=b"hello")
    kept = b"".join(body[part] for part in read_header(body).kept)
    assert b"Exif" not in kept
    assert b"hello" not in kept
    assert Image.open(io.BytesIO(kept)).size == (20, 12)


def test_jpeg_with_fill_bytes_and_junk():
    body = picture("JPEG")
    assert read_header(body[:20] + b"junk\xff\xff\xff" + body[20:]).shown == (20, 12)


@pytest.mark.parametrize(
    "body",
    [
        SIGNATURE,
        SIGNATURE + b"this is a text file",
        SIGNATURE + chunk(b"IHDR", bytes(13)),
        SIGNATURE + chunk(b"IDAT", bytes(13)),
        b"\xff\xd8\xff",
        b"\xff\xd8\xff\xe0\x00",
        b"\xff\xd8\xff\xc0\x00\x03\x08",
        b"\xff\xd8\xff\xd9",
        b"RIFF\0\0\0\0WEBP",
        b"RIFF\0\0\0\0WEBPVP8L\5\0\0\0",
        b"RIFF\0\0\0\0WEBPVP8 \xff\xff\xff\xff",
    ],
)
def test_no_size_is_malformed(body):
    with pytest.raises(MalformedBody, match="no width and height"):
        read_header(body)


@pytest.mark.parametrize("body", [SIGNATURE + chunk(b"none") * (MAX_PARTS + 1), b"\xff\xd8" + b"\xff\x01" * MAX_PARTS])
def test_endless_parts_are_refused(body):
    with pytest.raises(MalformedBody, match="more than"):
        read_header(body)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"", "an empty body"),
        (b"just some text", "just some te"),
        (b"GIF89a....", "GIF"),
        (b"\x93NUMPY\1\0", "npy"),
        (b"\0\0\0\x20ftypheic", "HEIC"),
    ],
)
def test_other_formats_are_named(body, named):
    with pytest.raises(UnsupportedMedia, match=f"expected PNG, JPEG, WebP or AVIF, got .*{named}"):
        read_header(body)


def scans(number, side=64):
    """A grey JPEG of so many scans, all of them refinements of nothing."""

    def segment(code, data):
        return b"\xff" + bytes([code]) + struct.pack(">H", len(data) + 2) + data

    frame = struct.pack(">BHHB3B", 8, side, side, 1, 1, 0x11, 0)
    body = b"\xff\xd8" + segment(0xDB, b"\0" + b"\1" * 64) + segment(0xC2, frame)
    body += segment(0xC4, b"\x10" + bytes([1] + [0] * 15) + b"\xe0")
    first, other = (segment(0xDA, b"\1\1\0" + bytes([1, 63, bits])) + b"\x55\xff\0\xff\xd0" for bits in (1, 0x10))
    return body + first + other * (number - 1) + b"\xff\xd9"


@pytest.mark.parametrize(("number", "side"), [(MAX_SCANS, 64), (20, 65535), (36, 8192)])
def test_scans_that_are_read(number, side):
    assert read_header(scans(number, side)).shown == (side, side)


@pytest.mark.parametrize(
    ("number", "side", "most"), [(MAX_SCANS + 1, 64, MAX_SCANS), (5000, 8192, MAX_SCANS), (37, 8192, 36)]
)
def test_scans_beyond_what_pictures_have(number, side, most):
    with pytest.raises(InvalidImage, match=rf"has {number} scans.* at most {most} are read"):
        read_header(scans(number, side))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"progressive": True, "restart_marker_blocks": 1}])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_scans_of_real_files(mode, options, monkeypatch):
    monkeypatch.setattr(headers, "MAX_SCANS", 18 if options else 1)
    read_header(picture("JPEG", mode, (200, 120), **options))


def test_large_bodies_of_nothing_are_given_up(monkeypatch):
    body = memoryview(b"\xff\xd8" + b"\xff" * (64 << 20))
    at = time.perf_counter()
    with pytest.raises(MalformedBody, match="no width and height"):
        read_header(body)
    assert time.perf_counter() - at < 0.5


def test_junk_is_bounded_altogether():
    junk = b"\0" * (headers.MAX_JUNK // 4) + b"\xff\x01"
    frame = b"\xff\xc0\0\x0b\x08\0\x05\0\x07\1\1\x11\0"
    assert read_header(b"\xff\xd8\xff\x01" + junk * 3 + frame).shown == (7, 5)
    with pytest.raises(MalformedBody):
        read_header(b"\xff\xd8\xff\x01" + junk * 5 + frame)


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WebP", {"lossless": True}), ("AVIF", {})])
def test_frames_are_counted(kind, options):
    frames = [Image.new("RGB", (20, 12), colour) for colour in ("red", "green", "blue")]
    assert read_header(picture(kind, **options)).frames == 1
    assert read_header(picture(kind, save_all=True, append_images=frames, **options)).frames == 4


def test_work_is_no_more_than_is_there():
    body = SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", 10, 10, 8, 2, 0, 0, 0))
    body += struct.pack(">I", 2**31 - 1) + b"IDAT"
    assert read_header(body).work == len(body) + 100 * headers.WORK


@pytest.mark.parametrize(
    ("primaries", "transfer", "match"), [(9, 16, "PQ"), (9, 18, "HLG"), (1, 16, "PQ"), (9, 1, "9")]
)
def test_colours_that_cannot_become_srgb(primaries, transfer, match):
    body = picture("PNG")
    with pytest.raises(InvalidImage, match=match):
        read_header(body[:33] + chunk(b"cICP", bytes([primaries, transfer, 0, 1])) + body[33:])
