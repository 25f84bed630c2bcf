import io
import struct
import zlib

import pytest
from PIL import Image

from app.errors import MalformedBody, UnsupportedMedia
from app.wire.headers import MAX_PARTS, read_header

FORMATS = ["PNG", "JPEG", "WebP"]
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
@pytest.mark.parametrize("kind", FORMATS)
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
        (b"\0\0\0\x20ftypavif", "AVIF"),
    ],
)
def test_other_formats_are_named(body, named):
    with pytest.raises(UnsupportedMedia, match=f"expected PNG, JPEG or WebP, got .*{named}"):
        read_header(body)
