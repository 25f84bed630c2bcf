"""A multipart form in one buffer -> its parts, as views of that buffer: nothing is copied, and nothing goes to disk."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from python_multipart.multipart import parse_options_header

from app.errors import InvalidInput, InvalidParameter, MalformedBody
from app.text import one_line, short
from app.wire.scan import Body, search

MAX_PARTS = 256
MAX_HEAD = 8192
"""Bytes of one part's headers."""


@dataclass(frozen=True, eq=False)
class Part:
    """A file of a request."""

    content: Body
    label: str = ""
    """Which one it is, where it came in a form: its index, and its file name if it has one."""


@contextmanager
def naming(part: Part) -> Iterator[None]:
    """Makes an error within its block say which part it is about."""
    try:
        yield
    except InvalidInput as error:
        if not part.label:
            raise
        raise type(error)(f"{part.label}: {error}") from error


def parts_of(body: Body, content_type: str) -> list[Part]:
    """The parts of a multipart/form-data body, all of which must be named image.

    Raises MalformedBody, and InvalidParameter for parts of other names and for none.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if not 1 <= len(boundary) <= 256:
        raise MalformedBody("the form cannot be read: its Content-Type has no boundary")
    parts: list[Part] = []
    others: set[str] = set()
    for index, (start, end) in enumerate(_spans(body, boundary)):
        if index == MAX_PARTS:
            raise MalformedBody(f"the form cannot be read: it has more than {MAX_PARTS} parts")
        name, label, data = _head(body, start, end, index)
        if name == "image":
            parts.append(Part(body[data:end], label))
        else:
            others.add(name)
    if others:
        raise InvalidParameter(f"form parts are named image; this form has {', '.join(sorted(others))[:200]!r}")
    if not parts:
        raise InvalidParameter("the form has no part named image")
    return parts


def _spans(body: Body, boundary: bytes) -> Iterator[tuple[int, int]]:
    """(start, end) of each part with its headers."""
    delimiter = re.compile(rb"\r\n--" + re.escape(boundary) + rb"(--|[ \t]*\r\n)")
    first = re.compile(rb"--" + re.escape(boundary) + rb"(--|[ \t]*\r\n)")
    found = first.match(body) or search(delimiter, body, 0, len(boundary) + MAX_HEAD)
    while found and found[1] != b"--":
        start = found.end()
        # A part without content ends with the line break that ends its headers.
        found = search(delimiter, body, max(0, start - 2), len(boundary) + MAX_HEAD)
        if found:
            yield start, max(start, found.start())
    if not found:
        raise MalformedBody("the form cannot be read: its last boundary is missing")


def _head(body: Body, start: int, end: int, index: int) -> tuple[str, str, int]:
    """A part's name, its label, and where its content begins."""
    head, blank, _ = bytes(body[start : min(end, start + MAX_HEAD)]).partition(b"\r\n\r\n")
    disposition = re.search(rb"(?im)^content-disposition:(.*?)\r?$", head)
    options = parse_options_header(disposition[1].strip())[1] if disposition else {}
    if not blank or b"name" not in options:
        raise MalformedBody(f"the form cannot be read: part {index} has no headers that name it")
    file = options.get(b"filename", b"").decode(errors="backslashreplace")
    label = f"part {index} ({short(file)})" if file else f"part {index}"
    return one_line(options[b"name"].decode("latin-1")), label, start + len(head) + 4
