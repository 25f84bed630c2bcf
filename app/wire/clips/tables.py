"""Knows how many samples the tables of an MP4 or QuickTime file say there are, before a parser makes room for them.

A table of samples of one size is twelve bytes, whatever their number, and FFmpeg makes sixty for each (ISO/IEC
14496-12, 8.7.3.2 and 8.8.8). Every place in which it looks for boxes is looked into.
"""

import struct
from collections.abc import Iterator

from app.errors import MalformedBody, TooLarge
from app.wire.scan import Body

MAX_SAMPLES = 1 << 21
"""Of all tracks together: a day of film, or with it three quarters of a minute of sound that is not compressed."""
MAX_BOXES = 1 << 18
MAX_DEPTH = 10

_WITHIN = frozenset(
    b"clip dinf edts ilst iprp ipco mdia meta minf moof moov mvex stbl strk trak traf tref udta wave wide".split()
)
_COUNTS = {b"stsz": 8, b"stz2": 8, b"trun": 4}
"""Where in a box's contents the number of its samples stands."""
_TIMES = (b"stts", b"ctts")
"""Tables of (samples, time), which are made one entry for each sample."""
_CHUNKS = {b"stco": 4, b"co64": 8}
"""Tables of chunks, each of as many samples as `stsc` says; bytes of an entry."""
SOUND = 1 << 10
"""Samples of sound that FFmpeg takes together."""


def check_tables(body: Body) -> None:
    """Raises TooLarge for more samples than `MAX_SAMPLES`, and MalformedBody for boxes without end."""
    view = memoryview(body)
    samples = chunks = chunk = 0
    for number, (name, start, stop) in enumerate(_boxes(view, 0, len(view), 0)):
        if number >= MAX_BOXES or name == b"cmov":  # boxes that are compressed, which nobody has written for long
            raise MalformedBody(f"the film has more than {MAX_BOXES} boxes, or compressed ones")
        said = 0
        if name in _COUNTS and start + _COUNTS[name] + 4 <= stop:
            said = struct.unpack_from(">I", view, start + _COUNTS[name])[0]
            samples += said
        elif name in _TIMES:
            said = sum(_numbers(view, start, stop, 8, 0))
        elif name == b"stsc":
            said = max(_numbers(view, start, stop, 12, 4), default=0)
            chunk = max(chunk, said)
        elif name in _CHUNKS:
            chunks += (stop - start) // _CHUNKS[name]
        said = max(said, samples, chunks * chunk // SOUND)
        if said > MAX_SAMPLES:
            raise TooLarge(f"the film says that it has {said} samples, more than {MAX_SAMPLES}")


def _boxes(view: memoryview, at: int, end: int, depth: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, where its contents begin, and end) of each box, those in others too."""
    while at + 8 <= end:
        length, name = struct.unpack_from(">I4s", view, at)
        start = at + 8
        if length == 1 and start + 8 <= end:
            (length,) = struct.unpack_from(">Q", view, start)
            start += 8
        stop = end if length == 0 else min(end, at + length)
        if stop < start:
            return  # where parsers end, too
        yield name, start, stop
        if name in _WITHIN and depth < MAX_DEPTH:
            # Of ISO's `meta` the boxes come after four bytes, of QuickTime's at once.
            skipped = 4 if name == b"meta" and bytes(view[start : start + 4]) == bytes(4) else 0
            yield from _boxes(view, start + skipped, stop, depth + 1)
        at = stop


def _numbers(view: memoryview, start: int, stop: int, size: int, at: int) -> Iterator[int]:
    """One number of each entry of a table, whose length stands after four bytes; of those that are there."""
    if start + 8 <= stop:
        (count,) = struct.unpack_from(">I", view, start + 4)
        for index in range(min(count, (stop - start - 8) // size, MAX_SAMPLES)):
            yield struct.unpack_from(">I", view, start + 8 + size * index + at)[0]
