"""The trace that a request is part of, as its `traceparent` says: W3C Trace Context, https://www.w3.org/TR/trace-context/."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

LONGEST = 512
"""Bytes: 55 in version 00, and what later versions may append."""

FORM = re.compile(rb"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


@dataclass(frozen=True)
class Parent:
    """The span of the caller."""

    trace_id: str  # 32 hex digits, not all of them 0
    span_id: str  # 16, likewise
    flags: int  # bit 0: the caller's is recorded


def parent_of(headers: Iterable[tuple[bytes, bytes]]) -> Parent | None:
    """What one valid header says; none, several and broken ones begin a new trace, as the standard wants it."""
    given = [value for name, value in headers if name == b"traceparent"]
    if len(given) != 1 or len(given[0]) > LONGEST:
        return None
    found = FORM.fullmatch(given[0])
    if found is None or (found[1] == b"00" and found[5] is not None):
        return None
    return Parent(found[2].decode(), found[3].decode(), int(found[4], 16))
