"""Files made wrong on purpose: part by part, so that what is behind a checksum or a length is reached too.

A file is split into the parts that its format has, these are dropped, doubled, swapped, renamed and changed, and the
file is put together again with its lengths and checksums right. Now and then bytes are changed afterwards, and wrong.
"""

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from random import Random
from typing import NamedTuple

MOST = 1 << 20
"""Bytes of a file that comes of it."""

NUMBERS = (0, 1, 2, 7, 127, 128, 255, 256, 4096, 32767, 32768, 65535, 65536, 1 << 20, (1 << 31) - 1, 1 << 31)
LARGE = (*NUMBERS, (1 << 32) - 1, 1 << 32, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


class Part(NamedTuple):
    """A chunk, a segment, a box, a member of an archive, a header."""

    name: bytes
    data: bytes


Parts = list[Part]


def mutated(random: Random, body: bytes) -> bytes:
    """The body with one or a few things wrong."""
    if (form := form_of(body)) is not None and random.random() < 0.8:
        split, join = form
        parts = split(body)
        for _ in range(random.choice((1, 1, 2, 4))):
            parts = _parts_changed(random, parts)
        body = join(parts)
    if form is None or random.random() < 0.3:
        for _ in range(random.choice((1, 2, 8))):
            body = changed(random, body)
    return body[:MOST]


def form_of(body: bytes) -> tuple[Callable[[bytes], Parts], Callable[[Parts], bytes]] | None:
    """How files that begin like this are taken apart and put together."""
    return next((ways for begin, ways in _FORMS.items() if re.match(begin, body, re.DOTALL)), None)


def changed(random: Random, data: bytes) -> bytes:
    """The data with a number, a bit, or a stretch of them wrong."""
    at, length = random.randrange(len(data) + 1), random.choice((1, 2, 4, 16, 256))
    match random.randrange(8):
        case 0:
            size = random.choice((1, 2, 4, 8))
            number = random.choice(LARGE) % (1 << 8 * size)
            return data[:at] + number.to_bytes(size, random.choice(("little", "big"))) + data[at + size :]
        case 1:
            return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :] if at < len(data) else data
        case 2:
            return data[:at]
        case 3:
            return data[:at] + data[at + length :]
        case 4:
            return data[:at] + data[at : at + length] * random.choice((2, 3, 100)) + data[at + length :]
        case 5:
            other = random.randrange(len(data) + 1)
            return data[:at] + data[other : other + length] + data[at + length :]
        case 6:
            return data[:at] + bytes([random.choice((0, 0xFF, 0x20))]) * length + data[at:]
        case _:
            return _digits_changed(random, data)


def _digits_changed(random: Random, data: bytes) -> bytes:
    """A number in text becomes another one."""
    found = list(re.finditer(rb"-?[0-9]+", data[:65536]))
    if not found:
        return data
    where = random.choice(found)
    return data[: where.start()] + str(random.choice((*LARGE, -1, 10**30))).encode() + data[where.end() :]


def _parts_changed(random: Random, parts: Parts) -> Parts:
    if not parts:
        return parts
    at, other = random.randrange(len(parts)), random.randrange(len(parts))
    part = parts[at]
    match random.randrange(7):
        case 0:
            return parts[:at] + parts[at + 1 :]
        case 1:
            return parts[:at] + [part] * random.choice((2, 3, 50)) + parts[at + 1 :]
        case 2:
            swapped = parts[:]
            swapped[at], swapped[other] = parts[other], part
            return swapped
        case 3:
            return [*parts[:at], Part(parts[other].name, part.data), *parts[at + 1 :]]
        case _:
            return [*parts[:at], Part(part.name, changed(random, part.data)), *parts[at + 1 :]]


# ------------------------------------------------------------------------------------------------------------- formats
_PNG = b"\x89PNG\r\n\x1a\n"


def split_png(body: bytes) -> Parts:
    """Its chunks."""
    at, parts = len(_PNG), []
    while at + 12 <= len(body):
        (length,) = struct.unpack_from(">I", body, at)
        parts.append(Part(body[at + 4 : at + 8], body[at + 8 : at + 8 + length]))
        at += 12 + length
    return parts


def join_png(parts: Parts) -> bytes:
    """Lengths and checksums are right."""
    chunks = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    ]
    return _PNG + b"".join(chunks)


def _split_jpeg(body: bytes) -> Parts:
    at, parts = 2, []
    while at + 4 <= len(body) and body[at] == 0xFF and body[at + 1] != 0xDA:
        length = int.from_bytes(body[at + 2 : at + 4])
        parts.append(Part(body[at + 1 : at + 2], body[at + 4 : at + 2 + length]))
        at += 2 + length
    return [*parts, Part(b"", body[at:])]  # scans, and what is between them


def _join_jpeg(parts: Parts) -> bytes:
    segments = [
        b"\xff" + name + ((len(data) + 2) & 0xFFFF).to_bytes(2) + data if name else data for name, data in parts
    ]
    return b"\xff\xd8" + b"".join(segments)


def _split_riff(body: bytes) -> Parts:
    at, parts = 12, []
    while at + 8 <= len(body):
        name, length = struct.unpack_from("<4sI", body, at)
        parts.append(Part(name, body[at + 8 : at + 8 + length]))
        at += 8 + length + length % 2
    return parts


def _join_riff(parts: Parts) -> bytes:
    chunks = b"".join(struct.pack("<4sI", name, len(data)) + data + b"\0" * (len(data) % 2) for name, data in parts)
    return b"RIFF" + struct.pack("<I", (4 + len(chunks)) & 0xFFFFFFFF) + b"WEBP" + chunks


_INSIDE = {b"meta": 4, b"iprp": 0, b"ipco": 0, b"moov": 0, b"trak": 0, b"mdia": 0, b"minf": 0, b"stbl": 0}
"""Boxes that hold boxes, and the bytes of theirs before them."""


def _split_boxes(body: bytes) -> Parts:
    """All boxes, those that hold others as two parts: where they begin and where they end."""
    at, parts = 0, []
    while at + 8 <= len(body):
        length, name = struct.unpack_from(">I4s", body, at)
        data = body[at + 8 : at + length if length >= 8 else len(body)]
        if (head := _INSIDE.get(name)) is not None:
            parts += [Part(b"(" + name, data[:head]), *_split_boxes(data[head:]), Part(b")", b"")]
        else:
            parts.append(Part(name, data))
        at += max(length, 8) if length else len(body)
    return parts


def _join_boxes(parts: Parts) -> bytes:
    open_ones: list[tuple[bytes, bytes]] = [(b"", b"")]
    for name, data in [*parts, *(Part(b")", b""),) * len(parts)]:
        if name[:1] == b"(":
            open_ones.append((name[1:], data))
            continue
        if name == b")":
            if len(open_ones) == 1:
                continue
            name, data = open_ones.pop()  # noqa: PLW2901
        before, inside = open_ones[-1]
        open_ones[-1] = before, inside + struct.pack(">I", 8 + len(data)) + name + data
    return open_ones[0][1]


BROKEN = (zipfile.BadZipFile, ValueError, OSError, EOFError, zlib.error, NotImplementedError, RuntimeError)
"""What zipfile raises for archives that are not sound."""


def _split_zip(body: bytes) -> Parts:
    try:
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            members = [each for each in archive.infolist()[:100] if each.file_size <= MOST]
            return [Part(each.filename.encode(errors="replace"), archive.read(each)) for each in members]
    except BROKEN:
        return [Part(b"x", body)]


def _join_zip(parts: Parts) -> bytes:
    """Stored: the readers of torch.save's files want it so, and the others take it."""
    records, directory = b"", b""
    for name, data in parts:
        here = struct.pack("<5H3I2H", 10, 0, 0, 0, 33, zlib.crc32(data), len(data), len(data), len(name), 0)
        directory += (
            b"PK\x01\x02" + struct.pack("<H", 10) + here + struct.pack("<3H2I", 0, 0, 0, 0, len(records)) + name
        )
        records += b"PK\x03\x04" + here + name + data
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, len(parts), len(parts), len(directory), len(records), 0)
    return records + directory + end


def _split_tensors(body: bytes) -> Parts:
    start = 8 + int.from_bytes(body[:8], "little")
    return [Part(b"header", body[8:start]), Part(b"data", body[start:])]


def _join_tensors(parts: Parts) -> bytes:
    head, *data = [part.data for part in parts] or [b""]
    return len(head).to_bytes(8, "little") + head + b"".join(data)


def _split_npy(body: bytes) -> Parts:
    start = 10 + int.from_bytes(body[8:10], "little")
    return [Part(b"header", body[10:start]), Part(b"data", body[start:])]


def _join_npy(parts: Parts) -> bytes:
    head, *data = [part.data for part in parts] or [b""]
    return b"\x93NUMPY\x01\0" + (len(head) & 0xFFFF).to_bytes(2, "little") + head + b"".join(data)


_FORMS: dict[bytes, tuple[Callable[[bytes], Parts], Callable[[Parts], bytes]]] = {
    re.escape(_PNG): (split_png, join_png),
    rb"\xff\xd8\xff": (_split_jpeg, _join_jpeg),
    rb"RIFF.{4}WEBP": (_split_riff, _join_riff),
    rb".{4}ftyp": (_split_boxes, _join_boxes),
    rb"PK\x03\x04": (_split_zip, _join_zip),
    rb"\x93NUMPY\x01": (_split_npy, _join_npy),
    rb".{4}\0{4}\{": (_split_tensors, _join_tensors),
}
