"""Getting a request's body: bounded in bytes and in time, raw or a form; and noticing that its client has gone."""

import asyncio
import re
import time
from collections.abc import Coroutine
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import Any, TypeVar

from fastapi import Request

from app.api.context import Context
from app.api.errors import ClientGone, SlowBody
from app.api.form import Part, parts_of
from app.api.room import Held
from app.errors import InvalidParameter, TooLarge, TooManyBytes
from app.wire.scan import Body

BODY_SECONDS = 60.0
"""A body must have arrived this long after its headers."""

SILENT_SECONDS = 15.0
"""Its next bytes must come so soon: until it is whole, it keeps others out of the room that it was promised."""

CHUNK = 1 << 16
"""Bytes of the least buffer."""

DAY_MS = 86_400_000

T = TypeVar("T")


async def read_body(request: Request, shared: Context) -> Body:
    """The whole body, in one buffer that is counted until the request has its answer.

    Raises TooLarge, by its announced or its real length, TooManyBytes, SlowBody and ClientGone.
    """
    try:
        return await received(request, shared.limits.body_bytes, request.state.held)
    except TooManyBytes:
        shared.metrics.rejected.labels("too_many_bytes").inc()
        raise


async def read_pictures(request: Request, shared: Context) -> list[Part]:
    """The files of a request: its body, or the parts named `image` of a multipart form. Raises as `read_body`."""
    content_type = request.headers.get("content-type", "")
    body = await read_body(request, shared)
    if not content_type.lower().startswith("multipart/form-data"):
        return [Part(body)]
    return await asyncio.to_thread(parts_of, body, content_type)


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


async def received(request: Request, limit: int, held: Held) -> Body:
    """As `read_body`, of at most `limit` bytes."""
    header = request.headers.get("content-length", "0")
    if len(header) > 18 or int(header) > limit:  # digits: the server has seen to that
        raise TooLarge(f"the body has {header[:40]} bytes; at most {limit} are accepted")
    counted = int(header)  # 0: it comes in chunks, counted as they come
    held.take(counted)
    # Pages of the system's own: there when they are written to, never copied as it grows, gone with the request.
    buffer = mmap(-1, max(counted, CHUNK), MAP_PRIVATE | MAP_ANONYMOUS)
    size = 0
    clock = asyncio.get_running_loop()
    end = clock.time() + BODY_SECONDS
    try:
        async with asyncio.timeout_at(end) as patience:
            more = True
            while more:
                patience.reschedule(min(end, clock.time() + SILENT_SECONDS))
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone("the client closed the connection before its body ended")
                chunk = message.get("body", b"")
                start, size = size, size + len(chunk)
                if size > limit:
                    raise TooLarge(f"the body has more than {limit} bytes")
                if size > counted:
                    held.take(size - counted)
                    counted = size
                if size > len(buffer):
                    buffer.resize(max(size, 2 * len(buffer)))
                buffer[start:size] = chunk
                more = message.get("more_body", False)
    except TimeoutError:
        raise SlowBody(
            f"the body did not arrive within {BODY_SECONDS:g} s, or stopped for {SILENT_SECONDS:g} s"
        ) from None
    return memoryview(buffer)[:size]


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
