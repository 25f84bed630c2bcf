"""Knows where PNG, JPEG and WebP files keep their size and their EXIF orientation. Decodes no pixel.

A picture file is a row of parts: PNG and WebP call them chunks, JPEG segments. Walking them costs microseconds,
so the size is known before anything is allocated, and a decoder can be given the parts that make pixels and no
others: text, EXIF, animation and thumbnails never reach it.
"""

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from app.errors import MalformedBody
from app.wire.sniff import PICTURES, sniff

MAX_PARTS = 1 << 14
"""Room for 128 MiB of libpng's 8 KiB chunks; a body of millions of empty parts would keep the event loop busy."""


class _Part(NamedTuple):
    name: bytes
    whole: slice
    data: slice


@dataclass(frozen=True)
class PictureHeader:
    """What a picture file says before any pixel is decoded."""

    format: str
    width: int
    height: int
    """Pixels as stored; see `shown`."""
    orientation: int
    """EXIF: 1 is upright, 5 to 8 lie on their side."""
    kept: tuple[slice, ...]
    """The parts of the body that make pixels and their colours."""
    png_profile: slice | None
    """The content of iCCP, still deflated; the profiles of the other formats are among `kept`."""

    @property
    def shown(self) -> tuple[int, int]:
        """(width, height) of the picture the right way up."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def read_header(body: bytes) -> PictureHeader:
    """The header of a PNG, JPEG or WebP file.

    Raises UnsupportedMedia for other formats, and MalformedBody where no size is found.
    """
    name = sniff(body, PICTURES)
    layout = _LAYOUTS[name]
    size = orientation = png_profile = None
    kept = []
    parts = 0
    for part in islice(layout.parts(body), MAX_PARTS):
        parts += 1
        if size is None:
            size = layout.size(part.name, body[part.data][:16])
        if orientation is None and part.name == layout.exif:
            orientation = _orientation(body[part.data])
        if part.name == b"iCCP":
            png_profile = part.data
        if layout.keeps is None or part.name in layout.keeps:
            kept.append(part.whole)
    if parts == MAX_PARTS:
        raise MalformedBody(f"the {name} file is cut into more than {MAX_PARTS} parts")
    if size is None or 0 in size:
        raise MalformedBody(f"the {name} file has no width and height in its header")
    whole = (slice(len(body)),)
    return PictureHeader(name, *size, orientation or 1, whole if layout.keeps is None else tuple(kept), png_profile)


def _png_parts(body: bytes) -> Iterator[_Part]:
    at = len(b"\x89PNG\r\n\x1a\n")
    yield _Part(b"signature", slice(at), slice(0))
    while at + 8 <= len(body):
        length, name = struct.unpack_from(">I4s", body, at)
        data, end = at + 8, at + 12 + length
        yield _Part(name, slice(at, end), slice(data, data + length))
        at = end


def _png_size(name: bytes, data: bytes) -> tuple[int, int] | None:
    return struct.unpack_from(">II", data) if name == b"IHDR" and len(data) >= 8 else None


_MARKER = re.compile(rb"\xff([^\x00\xff])", re.DOTALL)
_ALONE = {bytes([code]) for code in (0x01, *range(0xD0, 0xD9))}  # TEM, RST0..7, SOI: no length follows
_SCAN, _END = b"\xda", b"\xd9"
_FRAMES = {bytes([code]) for code in range(0xC0, 0xD0)} - {b"\xc4", b"\xc8", b"\xcc"}
_TABLES = {b"\xc4", b"\xcc", b"\xdb", b"\xdd"}
_COLOUR = {b"\xe0", b"\xe2", b"\xee"}  # JFIF, ICC, Adobe: they say what the components are


def _jpeg_parts(body: bytes) -> Iterator[_Part]:
    at = 0
    while found := _MARKER.search(body, at):
        name, start, at = found[1], found.start(), found.end()
        if name in _ALONE:
            yield _Part(name, slice(start, at), slice(0))
            continue
        if name in (_SCAN, _END):  # from here on it is pixels, which the decoder reads by itself
            yield _Part(name, slice(start, len(body)), slice(0))
            return
        if at + 2 > len(body):
            return
        data, at = at + 2, at + int.from_bytes(body[at : at + 2])
        yield _Part(name, slice(start, at), slice(data, at))


def _jpeg_size(name: bytes, data: bytes) -> tuple[int, int] | None:
    if name not in _FRAMES or len(data) < 5:
        return None
    height, width = struct.unpack_from(">HH", data, 1)
    return width, height


def _webp_parts(body: bytes) -> Iterator[_Part]:
    at = len(b"RIFF....WEBP")
    while at + 8 <= len(body):
        name, length = struct.unpack_from("<4sI", body, at)
        data, end = at + 8, at + 8 + length + length % 2
        yield _Part(name, slice(at, end), slice(data, data + length))
        at = end


def _webp_size(name: bytes, data: bytes) -> tuple[int, int] | None:
    if name == b"VP8X" and len(data) >= 10:
        return int.from_bytes(data[4:7], "little") + 1, int.from_bytes(data[7:10], "little") + 1
    if name == b"VP8L" and len(data) >= 5:
        bits = int.from_bytes(data[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if name == b"VP8 " and len(data) >= 10:
        width, height = struct.unpack_from("<HH", data, 6)
        return width & 0x3FFF, height & 0x3FFF
    return None


def _orientation(exif: bytes) -> int | None:
    """Tag 0x0112 of a TIFF structure's first directory, 1 if it is not there or not sound; None for other data."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return None
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for at in range(directory + 2, directory + 2 + 12 * entries, 12):
            tag, kind, count, value = struct.unpack_from(order + "HHIH", tiff, at)
            if (tag, kind, count) == (0x0112, 3, 1):  # one SHORT
                return value if 1 <= value <= 8 else 1
    except struct.error:  # a directory that points out of the data: upright, as viewers have it
        return 1
    return 1


@dataclass(frozen=True)
class _Layout:
    parts: Callable[[bytes], Iterator[_Part]]
    size: Callable[[bytes, bytes], tuple[int, int] | None]
    exif: bytes
    keeps: frozenset[bytes] | None
    """Names of the parts that make pixels; None keeps the file as it is."""


_LAYOUTS = {
    "PNG": _Layout(
        _png_parts,
        _png_size,
        b"eXIf",
        frozenset({b"signature", b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}),
    ),
    "JPEG": _Layout(
        _jpeg_parts,
        _jpeg_size,
        b"\xe1",
        frozenset({b"\xd8", _SCAN, _END} | _FRAMES | _TABLES | _COLOUR),
    ),
    "WebP": _Layout(_webp_parts, _webp_size, b"EXIF", None),
}
