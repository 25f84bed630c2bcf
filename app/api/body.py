"""Getting a request's body: bounded in bytes and in time, raw or multipart; and noticing that its client has gone."""

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from app.api.errors import ClientGone, SlowBody
from app.errors import InvalidParameter, MalformedBody, TooLarge

BODY_SECONDS = 60.0
"""A body must have arrived this long after its headers."""

MAX_PARTS = 256
DAY_MS = 86_400_000

T = TypeVar("T")


class _Form(MultiPartParser):
    """starlette's parser, which would take what has come of a truncated form for the whole."""

    def __init__(self, headers: Headers, stream: AsyncGenerator[bytes, None], **limits: int) -> None:
        super().__init__(headers, self._to_its_end(stream), **limits)
        self.ended = False

    def on_end(self) -> None:
        self.ended = True

    async def _to_its_end(self, stream: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        async for chunk in stream:
            yield chunk
        if not self.ended:
            raise MultiPartException("its last boundary is missing")


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body. Raises TooLarge, by its announced or its real length, SlowBody and ClientGone."""
    return await _in_time(_join(_chunks(request, limit)))


async def read_pictures(request: Request, limit: int) -> list[bytes]:
    """The files of a request: its body, or the parts named `image` of a multipart form. Raises as `read_body`."""
    content_type = request.headers.get("content-type", "")
    if not content_type.lower().startswith("multipart/form-data"):
        return [await read_body(request, limit)]
    # A part without a file name is text to the parser: in Latin-1, which keeps every byte.
    headers = Headers({"content-type": f"{content_type}; charset=latin-1"})
    parser = _Form(headers, _chunks(request, limit), max_files=MAX_PARTS, max_fields=MAX_PARTS, max_part_size=limit)
    parser.spool_max_size = limit + 1  # never to disk: there may be none to write to
    try:
        form = await _in_time(parser.parse())
    except MultiPartException as error:
        raise MalformedBody(f"the form cannot be read: {error.message}") from None
    try:
        parts = form.multi_items()
        if others := sorted({name for name, _ in parts} - {"image"}):
            raise InvalidParameter(f"form parts are named image; this form has {', '.join(others)[:200]!r}")
        if not parts:
            raise InvalidParameter("the form has no part named image")
        return [await part.read() if isinstance(part, UploadFile) else part.encode("latin-1") for _, part in parts]
    finally:
        await form.close()


def deadline_of(request: Request) -> float | None:
    """The end of the caller's patience on time.monotonic(), from X-Request-Timeout-Ms."""
    header = request.headers.get("x-request-timeout-ms")
    if header is None:
        return None
    if not re.fullmatch("[0-9]{1,8}", header) or not 0 < int(header) <= DAY_MS:
        raise InvalidParameter(f"X-Request-Timeout-Ms is a number of milliseconds up to a day, not {header[:40]!r}")
    return time.monotonic() + int(header) / 1000


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, cancelled with ClientGone when the client closes the connection. The body must be read."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone("the client closed the connection before the answer")
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.wait({working, leaving})


async def _chunks(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    announced = request.headers.get("content-length", "0")
    if len(announced) > 18 or int(announced) > limit:  # digits: the server has seen to that
        raise TooLarge(f"the body has {announced[:40]} bytes; at most {limit} are accepted")
    received, more = 0, True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("the client closed the connection before its body ended")
        chunk = message.get("body", b"")
        received += len(chunk)
        if received > limit:
            raise TooLarge(f"the body has more than {limit} bytes")
        yield chunk
        more = message.get("more_body", False)


async def _join(chunks: AsyncGenerator[bytes, None]) -> bytes:
    return b"".join([chunk async for chunk in chunks])


async def _in_time(reading: Coroutine[Any, Any, T]) -> T:
    try:
        return await asyncio.wait_for(reading, BODY_SECONDS)
    except TimeoutError:
        raise SlowBody(f"the body did not arrive within {BODY_SECONDS:g} s") from None


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
