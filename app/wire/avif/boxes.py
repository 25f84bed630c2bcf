"""The boxes of ISO base media files (ISO/IEC 14496-12): read without believing a length, and written."""

import struct
from collections.abc import Iterator

from app.errors import MalformedBody

MAX_BOXES = 1024
"""Side by side in one place."""


def boxes(body: memoryview, within: slice) -> Iterator[tuple[bytes, slice]]:
    """The type of each box in a part of the body, and where its contents lie, cut off where the part ends.

    Raises MalformedBody for a length that is none, and for more than `MAX_BOXES`.
    """
    at, end, count = within.start, within.stop, 0
    while at + 8 <= end:
        count += 1
        if count > MAX_BOXES:
            raise MalformedBody(f"the AVIF file has more than {MAX_BOXES} boxes side by side")
        length, name = struct.unpack_from(">I4s", body, at)
        start = at + 8
        if length == 1 and start + 8 <= end:
            (length,) = struct.unpack_from(">Q", body, start)
            start += 8
        elif length == 0:
            length = end - at
        if at + length < start:
            raise MalformedBody(f"the AVIF file has a box of {length} bytes, which is less than its own header")
        at += length
        yield name, slice(start, min(at, end))


def box(name: bytes, *parts: bytes) -> bytes:
    """A box with these contents."""
    content = b"".join(parts)
    return struct.pack(">I4s", 8 + len(content), name) + content


class Fields:
    """The numbers of a box, big-endian, one after the other."""

    def __init__(self, body: memoryview, within: slice) -> None:
        self._data = body[within]
        self._at = 0

    def take(self, size: int) -> bytes:
        """The next so many bytes. Raises MalformedBody at the end."""
        found = bytes(self._data[self._at : self._at + size])
        if len(found) < size:
            raise MalformedBody("the AVIF file is truncated or corrupt: a box ends too early")
        self._at += size
        return found

    def number(self, size: int) -> int:
        """The next so many bytes as a number; none are 0."""
        return int.from_bytes(self.take(size))

    def version(self) -> tuple[int, int]:
        """(version, flags), with which some boxes begin."""
        return self.number(1), self.number(3)
