"""Writes what comes before the data of an AVIF file of one picture, with or without alpha."""

import struct
from collections.abc import Sequence
from typing import NamedTuple

from app.wire.avif.boxes import box

ALPHA = b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha"

_VERSION = bytes(4)  # and flags, of a box whose first form is meant


class Still(NamedTuple):
    """A picture in AV1, all but its data."""

    av1c: bytes
    colours: Sequence[bytes]
    """Contents of colr boxes."""
    length: int
    """Bytes of its data."""


def head_of(width: int, height: int, pictures: Sequence[Still], *, premultiplied: bool = False) -> bytes:
    """The file up to the data, which follow in the pictures' order: the picture, and its alpha where there are two."""
    start = len(_head(width, height, pictures, premultiplied, 0))
    return _head(width, height, pictures, premultiplied, start)


def _head(width: int, height: int, pictures: Sequence[Still], premultiplied: bool, start: int) -> bytes:
    numbers = range(1, 1 + len(pictures))
    entries = [box(b"infe", b"\2\0\0\0", struct.pack(">HH", number, 0), b"av01\0") for number in numbers]
    iinf = box(b"iinf", _VERSION, struct.pack(">H", len(pictures)), *entries)
    references = [box(b"auxl", struct.pack(">HHH", 2, 1, 1))] if len(pictures) > 1 else []
    references += [box(b"prem", struct.pack(">HHH", 1, 1, 2))] if premultiplied else []
    meta = box(
        b"meta",
        _VERSION,
        box(b"hdlr", bytes(8), b"pict", bytes(13)),
        box(b"pitm", _VERSION, struct.pack(">H", 1)),
        _places([picture.length for picture in pictures], start),
        iinf,
        box(b"iref", _VERSION, *references),
        _properties(width, height, pictures),
    )
    length = 8 + sum(picture.length for picture in pictures)
    return box(b"ftyp", b"avif", bytes(4), b"avifmif1miaf") + meta + struct.pack(">I4s", length, b"mdat")


def _places(lengths: Sequence[int], start: int) -> bytes:
    places = []
    for number, length in enumerate(lengths, 1):
        places.append(struct.pack(">HHHII", number, 0, 1, start, length))
        start += length
    return box(b"iloc", _VERSION, struct.pack(">HH", 0x4400, len(places)), *places)  # offsets, lengths of four bytes


def _properties(width: int, height: int, pictures: Sequence[Still]) -> bytes:
    properties = [box(b"ispe", _VERSION, struct.pack(">II", width, height))]
    owners = []
    for number, picture in enumerate(pictures, 1):
        own = [box(b"av1C", picture.av1c), *(box(b"colr", colour) for colour in picture.colours)]
        own += [box(b"auxC", _VERSION, ALPHA, b"\0")] if number > 1 else []
        indices = [1, *range(len(properties) + 1, len(properties) + len(own) + 1)]
        owners.append(struct.pack(">HB", number, len(indices)) + bytes(indices))
        properties += own
    owned = box(b"ipma", _VERSION, struct.pack(">I", len(owners)), *owners)
    return box(b"iprp", box(b"ipco", *properties), owned)
