"""The parts of an answer without an end, multipart/x-mixed-replace: bytes in as they come, pictures out. No I/O."""

import re

import httpx

from latentd_client.errors import UnexpectedAnswer, error_of
from latentd_client.results import Decoded

MIXED = "multipart/x-mixed-replace"
MOST = 64 << 20
"""Bytes of a part, and of its head."""


def endless(response: httpx.Response) -> bool:
    """Whether an answer is one of parts; any other is read whole."""
    came: str = response.headers.get("content-type", "")
    return response.status_code == httpx.codes.OK and came.partition(";")[0].strip() == MIXED


class Parts:
    """Of one answer, which has been read if it is not one of parts."""

    def __init__(self, response: httpx.Response) -> None:
        """Raises LatentdError for an answer of another type."""
        if error := error_of(response, frozenset({MIXED})):
            raise error
        found = re.search(r'boundary="?([^";]+)', response.headers["content-type"])
        self._delimiter = b"--%s\r\n" % (found.group(1).encode() if found else b"")
        self._rest = b""
        self._begun = False
        self._last: str | None = None

    def feed(self, data: bytes) -> list[Decoded]:
        """The pictures that are whole now; the service sends some twice, which are told once.

        Raises UnexpectedAnswer for what is not latentd's.
        """
        self._rest += data
        found = []
        while (picture := self._next()) is not None:
            if picture.request_id != self._last:
                found.append(picture)
            self._last = picture.request_id
        return found

    def _next(self) -> Decoded | None:
        if not self._begun:
            if len(self._rest) < len(self._delimiter):
                return None
            self._skip(self._delimiter)
            self._begun = True
        head, ends, rest = self._rest.partition(b"\r\n\r\n")
        if not ends:
            self._check(len(head))
            return None
        try:
            headers = httpx.Headers(dict(line.split(": ", 1) for line in head.decode().split("\r\n")))
            size = int(headers["content-length"])
        except (ValueError, KeyError) as error:
            raise UnexpectedAnswer(f"a part with the head {head[:80]!r}") from error
        self._check(size)
        end = b"\r\n" + self._delimiter
        if len(rest) < size + len(end):
            return None
        content, self._rest = rest[:size], rest[size:]
        self._skip(end)
        return Decoded.of(httpx.Response(200, headers=headers, content=content))

    def _skip(self, expected: bytes) -> None:
        if not self._rest.startswith(expected):
            raise UnexpectedAnswer(f"expected the boundary of a part, got {self._rest[:80]!r}")
        self._rest = self._rest[len(expected) :]

    def _check(self, size: int) -> None:
        if not 0 <= size <= MOST:
            raise UnexpectedAnswer(f"a part of {size} bytes; at most {MOST} are read")
