"""AVIF files (AV1 Image File Format over HEIF, ISO/IEC 23008-12): the one picture in them, in a file written anew.

Nothing but the picture's AV1 data, its alpha's and what says how to show them reaches a decoder: a hostile file's
items, tracks and properties end here, where each is counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

from app.errors import InvalidImage, MalformedBody
from app.wire.avif.boxes import Fields, boxes
from app.wire.avif.obu import Sequence, read_still
from app.wire.avif.still import ALPHA, Still, head_of

MAX_ITEMS = 1024
MAX_EXTENTS = 64
"""Pieces that one picture lies in; there is one."""
MAX_TRACKS = 8

_ALPHA = (ALPHA, b"urn:mpeg:hevc:2015:auxid:1")
_AV1C = 4  # bytes of it that say something; headers behind them would be a second statement
_COLOURS = (b"nclx", b"prof", b"rICC")
_LAYERS = {b"a1op", b"lsel"}
_UNSAID, _SRGB = 2, 1
_LIKE_SRGB = {5, 6, 7}  # primaries of older television, which every viewer takes as sRGB's
_HDR = {16, 18}
# EXIF's orientation, by irot (quarter turns against the clock) and imir after it (0: upside down, 1: mirrored).
_TURNS = {
    (0, None): 1,
    (0, 0): 4,
    (0, 1): 2,
    (1, None): 8,
    (1, 0): 5,
    (1, 1): 7,
    (2, None): 3,
    (2, 0): 2,
    (2, 1): 4,
    (3, None): 6,
    (3, 0): 7,
    (3, 1): 5,
}

Parts = dict[bytes, slice]


@dataclass(frozen=True)
class Avif:
    """What an AVIF file says before any pixel is decoded."""

    width: int
    height: int
    orientation: int
    cicp: bytes
    """As the content of a PNG's cICP; empty where it says nothing."""
    frames: int
    parts: tuple[bytes | slice, ...]
    """A file of the picture alone: what was written anew, and pieces of the body."""


@dataclass(frozen=True)
class _Coded:
    """A picture in AV1."""

    properties: Parts
    extents: tuple[slice, ...]
    sequence: Sequence


def read_avif(body: memoryview) -> Avif:
    """The picture of a file, or the one that stands for its sequence.

    Raises MalformedBody for what is no such file or contradicts itself; InvalidImage for pictures of several pieces,
    layers or frames.
    """
    top = _first(body, slice(0, len(body)))
    if b"meta" not in top:
        raise MalformedBody("the AVIF file is truncated, or has no picture of its own: it has no meta box")
    meta = _first(body, _after_version(top[b"meta"]))
    kinds = _kinds(body, _there(meta, b"iinf"))
    owned = _owned(body, _there(meta, b"iprp"))
    pitm = Fields(body, _there(meta, b"pitm"))
    primary = pitm.number(4 if pitm.version()[0] else 2)
    if (kind := kinds.get(primary)) != b"av01":
        named = {b"grid": "a grid of pictures", None: "nothing"}.get(kind, repr(kind)[2:-1])
        raise InvalidImage(f"expected an AVIF file of one AV1 picture, got {named}")
    colour = _coded(body, meta, owned, primary)
    alpha, premultiplied = _alpha(body, meta, owned, primary)
    pictures = [colour, alpha] if alpha else [colour]
    size = colour.sequence.width, colour.sequence.height
    for each in pictures:
        ispe = Fields(body, _there(each.properties, b"ispe"))
        ispe.version()
        if (ispe.number(4), ispe.number(4)) != size or (each.sequence.width, each.sequence.height) != size:
            raise MalformedBody("the AVIF file states two different sizes")
    return Avif(
        *size,
        _orientation(body, colour.properties),
        _cicp(body, colour),
        _frames(body, top),
        _anew(body, pictures, premultiplied),
    )


def _first(body: memoryview, within: slice) -> Parts:
    found: Parts = {}
    for name, where in boxes(body, within):
        found.setdefault(name, where)
    return found


def _there(parts: Parts, name: bytes) -> slice:
    if name not in parts:
        raise MalformedBody(f"the AVIF file is truncated or corrupt: it has no {name.decode()} box")
    return parts[name]


def _after_version(where: slice) -> slice:
    return slice(min(where.start + 4, where.stop), where.stop)


def _count(fields: Fields, size: int) -> int:
    if (count := fields.number(size)) > MAX_ITEMS:
        raise MalformedBody(f"the AVIF file has {count} items; at most {MAX_ITEMS} are looked at")
    return count


def _kinds(body: memoryview, iinf: slice) -> dict[int, bytes]:
    """The type of each item."""
    fields = Fields(body, iinf)
    size = 4 if fields.version()[0] else 2
    _count(fields, size)
    kinds: dict[int, bytes] = {}
    for name, where in boxes(body, slice(iinf.start + 4 + size, iinf.stop)):
        entry = Fields(body, where)
        version, _ = entry.version()
        if name == b"infe" and version in (2, 3):
            item = entry.number(2 if version == 2 else 4)
            entry.take(2)
            kinds.setdefault(item, entry.take(4))
    return kinds


def _coded(body: memoryview, meta: Parts, owned: Mapping[int, Parts], item: int) -> _Coded:
    properties = owned.get(item, {})
    if layers := _LAYERS & properties.keys():
        raise InvalidImage(f"the picture of the AVIF file is one of several layers ({min(layers).decode()})")
    extents = _extents(body, meta, item)
    data = body[extents[0]] if len(extents) == 1 else b"".join(body[extent] for extent in extents)
    return _Coded(properties, extents, read_still(data))


def _owned(body: memoryview, iprp: slice) -> dict[int, Parts]:
    """The properties of each item, the first of each kind; of colr one of each of its own kinds, as nclx and prof."""
    inside = _first(body, iprp)
    every = [
        (bytes(body[where][:4]) if name == b"colr" else name, where)
        for name, where in boxes(body, _there(inside, b"ipco"))
    ]
    fields = Fields(body, _there(inside, b"ipma"))
    version, flags = fields.version()
    found: dict[int, Parts] = {}
    for _ in range(_count(fields, 4)):
        own = found.setdefault(fields.number(4 if version else 2), {})
        for _ in range(fields.number(1)):
            index = fields.number(2) & 0x7FFF if flags & 1 else fields.number(1) & 0x7F
            if 0 < index <= len(every):
                own.setdefault(*every[index - 1])
    return found


def _extents(body: memoryview, meta: Parts, item: int) -> tuple[slice, ...]:
    """Where an item's data lie, cut off where the body ends."""
    fields = Fields(body, _there(meta, b"iloc"))
    version, _ = fields.version()
    sizes = fields.number(2)
    offset_size, length_size, base_size, index_size = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
    for _ in range(_count(fields, 4 if version == 2 else 2)):
        owner = fields.number(4 if version == 2 else 2)
        method = fields.number(2) & 15 if version else 0
        fields.take(2)
        base = fields.number(base_size)
        extents = []
        for _ in range(_extent_count(fields)):
            fields.take(index_size if version else 0)
            offset = base + fields.number(offset_size)
            extents.append((offset, fields.number(length_size)))
        if owner == item:
            return _placed(body, meta, method, extents)
    raise MalformedBody("the AVIF file says nowhere where its picture lies")


def _extent_count(fields: Fields) -> int:
    if (count := fields.number(2)) > MAX_EXTENTS:
        raise MalformedBody(f"a picture of the AVIF file lies in {count} pieces; at most {MAX_EXTENTS} are read")
    return count


def _placed(body: memoryview, meta: Parts, method: int, extents: list[tuple[int, int]]) -> tuple[slice, ...]:
    if method > 1:
        raise InvalidImage("the picture of the AVIF file lies within another item")
    room = _there(meta, b"idat") if method else slice(0, len(body))
    places = [(min(room.start + offset, room.stop), length) for offset, length in extents]
    found = tuple(slice(at, min(at + length, room.stop)) for at, length in places)
    if not found or sum(each.stop - each.start for each in found) > len(body):
        raise MalformedBody("the picture of the AVIF file has no data, or more than the file")
    return found


def _alpha(body: memoryview, meta: Parts, owned: Mapping[int, Parts], primary: int) -> tuple[_Coded | None, bool]:
    """The picture that is the alpha of the primary one, and whether colours are multiplied with it already."""
    alpha, premultiplied = None, False
    iref = meta.get(b"iref", slice(0, 0))
    fields = Fields(body, iref)
    size = 4 if iref.start < iref.stop and fields.version()[0] else 2
    for name, where in boxes(body, _after_version(iref)):
        reference = Fields(body, where)
        source = reference.number(size)
        targets = [reference.number(size) for _ in range(_count(reference, 2))]
        if name == b"auxl" and primary in targets and alpha is None and _is_alpha(body, owned.get(source, {})):
            alpha = _coded(body, meta, owned, source)
        premultiplied |= name == b"prem" and source == primary
    return alpha, premultiplied and alpha is not None


def _is_alpha(body: memoryview, properties: Parts) -> bool:
    kind, _, _ = bytes(body[properties.get(b"auxC", slice(0))][4:68]).partition(b"\0")
    return kind in _ALPHA


def _orientation(body: memoryview, properties: Parts) -> int:
    turn = Fields(body, properties[b"irot"]).number(1) & 3 if b"irot" in properties else 0
    mirror = Fields(body, properties[b"imir"]).number(1) & 1 if b"imir" in properties else None
    return _TURNS[turn, mirror]


def _cicp(body: memoryview, colour: _Coded) -> bytes:
    """What the colours mean, where no ICC profile says it; HDR is said in any case."""
    primaries, transfer = colour.sequence.colour
    if b"nclx" in colour.properties:
        nclx = Fields(body, colour.properties[b"nclx"])
        nclx.take(4)
        primaries, transfer = nclx.number(2), nclx.number(2)
    if transfer not in _HDR and colour.properties.keys() & {b"prof", b"rICC"}:
        return b""
    primaries = _SRGB if primaries in _LIKE_SRGB else primaries
    return b"" if (primaries, transfer) == (_UNSAID, _UNSAID) else bytes([primaries & 255, transfer & 255, 0, 1])


def _frames(body: memoryview, top: Parts) -> int:
    """Of the longest track; a file of one picture has none."""
    most = 1
    tracks = (where for name, where in boxes(body, top.get(b"moov", slice(0, 0))) if name == b"trak")
    for track in islice(tracks, MAX_TRACKS):
        where = track
        for inner in (b"mdia", b"minf", b"stbl", b"stsz"):
            where = _first(body, where).get(inner, slice(0, 0))
        most = max(most, int.from_bytes(body[where][8:12]))
    return most


def _anew(body: memoryview, coded: list[_Coded], premultiplied: bool) -> tuple[bytes | slice, ...]:
    """A file of these pictures alone: what comes before their data, and the data."""
    sequence = coded[0].sequence
    pictures = [
        Still(
            bytes(body[_there(each.properties, b"av1C")][:_AV1C]),
            [bytes(body[each.properties[kind]]) for kind in _COLOURS if kind in each.properties],
            sum(extent.stop - extent.start for extent in each.extents),
        )
        for each in coded
    ]
    head = head_of(sequence.width, sequence.height, pictures, premultiplied=premultiplied)
    return head, *(extent for each in coded for extent in each.extents)
