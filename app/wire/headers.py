"""Knows where PNG, JPEG and WebP files keep their size and their EXIF orientation. Decodes no pixel.

A picture file is a row of parts: PNG and WebP call them chunks, JPEG segments. Walking them costs microseconds,
so the size is known before anything is allocated, and a decoder can be given the parts that make pixels and no
others: text, EXIF, animation and thumbnails never reach it. The scans of a JPEG are counted, which takes a look at all
of its bytes: a file of kilobytes may hold hundreds, and a decoder goes over every pixel for each.
"""

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from app.errors import InvalidImage, MalformedBody
from app.wire.avif.read import read_avif
from app.wire.colour import check_colour
from app.wire.scan import Body, search
from app.wire.sniff import PICTURES, sniff

MAX_PARTS = 1 << 14
"""Room for 128 MiB of libpng's 8 KiB chunks; a body of millions of empty parts would keep a thread busy."""

MAX_SCANS = 64
"""Of a JPEG; libjpeg writes 10, or 18 where there are four components."""
FREE_SCANS = 20
SCAN_PIXELS = 1 << 30
"""Scans beyond `FREE_SCANS`, times pixels: about ten seconds of a decoder."""

MAX_JUNK = 1 << 20
"""Bytes of a JPEG before its pixels that belong to no segment."""
MAX_EXIF = 1 << 16
MAX_PALETTE = 256


WORK = 24
"""Bytes for each pixel: a CMYK JPEG's coefficients, pixels, their conversion and the result. Others take less."""

COLOUR = {b"iCCP": 1 << 24, b"cICP": 4, b"gAMA": 4, b"sRGB": 1}
"""Chunks of a PNG that say what its numbers mean, and the most bytes that are taken of each."""


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
    kept: tuple[slice | bytes, ...]
    """The parts of the body that make pixels and their colours; bytes where they are written anew."""
    colour: dict[bytes, bytes]
    """The contents of a PNG's chunks in `COLOUR`, a profile still deflated; an AVIF has its CICP numbers here as well.
    Profiles of others are among `kept`."""
    frames: int
    """More than one: an animation, of which the first is read."""

    @property
    def work(self) -> int:
        """Bytes of memory that decoding takes at most: the file again, and `WORK` for each pixel."""
        parts = (len(part) if isinstance(part, bytes) else int(part.stop - part.start) for part in self.kept)
        return sum(parts) + self.width * self.height * WORK

    @property
    def shown(self) -> tuple[int, int]:
        """(width, height) of the picture the right way up."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def read_header(file: Body) -> PictureHeader:
    """The header of a PNG, JPEG, WebP or AVIF file.

    Raises UnsupportedMedia for other formats, MalformedBody where no size is found, and InvalidImage for a JPEG of so
    many scans that they are an attack, for an AVIF of several pieces, and for colours that cannot become sRGB.
    """
    name = sniff(file, PICTURES)
    return _avif(memoryview(file)) if name == "AVIF" else _of_parts(memoryview(file), name)


def _avif(body: memoryview) -> PictureHeader:
    found = read_avif(body)
    colour = {b"cICP": found.cicp} if found.cicp else {}
    check_colour(colour, "AVIF")
    return PictureHeader("AVIF", found.width, found.height, found.orientation, found.parts, colour, found.frames)


def _of_parts(body: memoryview, name: str) -> PictureHeader:
    """The header of a file that is one part after the other."""
    layout = _LAYOUTS[name]
    size = orientation = None
    colour: dict[bytes, bytes] = {}
    kept = []
    parts = scans = frames = 0
    palette, indexed = MAX_PALETTE, False
    for part in islice(layout.parts(body), MAX_PARTS):
        parts += 1
        data = body[part.data]
        if size is None:
            size = layout.size(part.name, bytes(data[:16]))
        if orientation is None and part.name == layout.exif:
            orientation = _orientation(bytes(data[:MAX_EXIF]))
        scans += part.name == _SCAN
        if part.name == b"acTL":
            frames = int.from_bytes(data[:4])
        elif part.name == b"ANMF":
            frames += 1
        elif part.name == b"IHDR":
            indexed = data[9:10] == _INDEXED
        elif part.name == b"PLTE":
            palette = len(data) // 3
        elif part.name in COLOUR:
            colour[part.name] = bytes(data[: COLOUR[part.name]])
        if part.name == b"tRNS" and len(data) > (palette if indexed else _COLOUR_KEY):
            continue  # libpng passes over one that is longer than its palette, and viewers with it
        if layout.keeps is None or part.name in layout.keeps:
            kept.append(slice(part.whole.start, min(part.whole.stop, len(body))))
    if parts == MAX_PARTS:
        raise MalformedBody(f"the {name} file is cut into more than {MAX_PARTS} parts")
    if size is None or 0 in size:
        raise MalformedBody(f"the {name} file has no width and height in its header")
    _check_scans(scans, *size)
    check_colour(colour, name)
    parts_kept = (slice(0, len(body)),) if layout.keeps is None else tuple(kept)
    return PictureHeader(name, *size, orientation or 1, parts_kept, colour, max(1, frames))


def _check_scans(scans: int, width: int, height: int) -> None:
    if scans > MAX_SCANS:
        raise InvalidImage(f"the JPEG file has {scans} scans; at most {MAX_SCANS} are read")
    if (scans - FREE_SCANS) * width * height > SCAN_PIXELS:
        most = FREE_SCANS + SCAN_PIXELS // (width * height)
        raise InvalidImage(f"the JPEG file has {scans} scans of {width}x{height} pixels; at most {most} are read")


_INDEXED = b"\x03"
_COLOUR_KEY = 6  # bytes of tRNS where there is no palette: three numbers of 16 bits


def _png_parts(body: memoryview) -> Iterator[_Part]:
    at = len(b"\x89PNG\r\n\x1a\n")
    yield _Part(b"signature", slice(0, at), slice(0))
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
_WITHIN = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")  # ends a stretch of pixels, which restarts do not
_FRAMES = {bytes([code]) for code in range(0xC0, 0xD0)} - {b"\xc4", b"\xc8", b"\xcc"}
_TABLES = {b"\xc4", b"\xcc", b"\xdb", b"\xdd"}
_COLOUR = {b"\xe0", b"\xe2", b"\xee"}  # JFIF, ICC, Adobe: they say what the components are


def _jpeg_parts(body: memoryview) -> Iterator[_Part]:
    at = junk = 0
    while found := _MARKER.search(body, at, min(len(body), at + MAX_JUNK - junk)):
        name, start, junk = found[1], found.start(), junk + found.start() - at
        at = found.end()
        if name in _ALONE:
            yield _Part(name, slice(start, at), slice(0))
            continue
        if name in (_SCAN, _END):  # from here on it is pixels, which the decoder reads by itself
            yield _Part(name, slice(start, len(body)), slice(0))
            break
        if at + 2 > len(body):
            return
        data, at = at + 2, at + int.from_bytes(body[at : at + 2])
        yield _Part(name, slice(start, at), slice(data, at))
    else:
        return
    while name != _END and (found := search(_WITHIN, body, at, 2)):
        name, at = found[1], found.end()
        yield _Part(name, slice(0, 0), slice(0))  # within what the first scan's part holds
        if name not in _ALONE:
            at += int.from_bytes(body[at : at + 2])


def _jpeg_size(name: bytes, data: bytes) -> tuple[int, int] | None:
    if name not in _FRAMES or len(data) < 5:
        return None
    height, width = struct.unpack_from(">HH", data, 1)
    return width, height


def _webp_parts(body: memoryview) -> Iterator[_Part]:
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
    parts: Callable[[memoryview], Iterator[_Part]]
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
