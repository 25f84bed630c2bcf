"""Searches bodies of hundreds of megabytes piece by piece.

One search of it all would hold the interpreter's lock for as long as it takes, and the event loop with it.
"""

import re
from collections.abc import Iterator

Body = bytes | bytearray | memoryview
"""A file's bytes: of their own, or within the buffer that they came in."""

PIECE = 1 << 20


def search(pattern: re.Pattern[bytes], body: Body, at: int, longest: int) -> re.Match[bytes] | None:
    """The first match from `at` on, of at most `longest` bytes."""
    for start in range(at, len(body), PIECE):
        if found := pattern.search(body, start, min(start + PIECE + longest, len(body))):
            return found
    return None


def count(needle: bytes, body: Body) -> int:
    """How often a needle that does not overlap itself is there."""
    return sum(bytes(piece).count(needle) for piece in _pieces(body, len(needle) - 1))


def _pieces(body: Body, more: int) -> Iterator[memoryview]:
    view = memoryview(body)
    for start in range(0, len(body), PIECE):
        yield view[start : start + PIECE + more]
