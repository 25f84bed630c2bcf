"""Getting a request's body: bounded in bytes and in time, raw or a form; and noticing that its client has gone."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Coroutine
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import Any, TypeVar

from fastapi import Request

from app.api.door.form import Part, parts_of
from app.api.door.room import Held
from app.api.errors import ClientGone, SlowBody
from app.errors import InvalidParameter, MalformedBody, TooLarge
from app.wire.arrays.npy import npy_length
from app.wire.scan import Body

BODY_SECONDS = 60.0
"""A body must have arrived this long after its headers."""

SILENT_SECONDS = 15.0
"""Its next bytes must come so soon: until it is whole, it keeps others out of the room that it was promised."""

CHUNK = 1 << 16
"""Bytes of the least buffer."""

DAY_MS = 86_400_000

T = TypeVar("T")


async def read_body(request: Request, limit: int) -> Body:
    """The whole body, of at most `limit` bytes, in one buffer that is counted until the request has its answer.

    Raises TooLarge, by its announced or its real length, TooManyBytes, SlowBody and ClientGone.
    """
    held: Held = request.state.held
    header = request.headers.get("content-length", "0")
    if len(header) > 18 or int(header) > limit:  # digits: the server has seen to that
        raise TooLarge(f"the body has {header[:40]} bytes; at most {limit} are accepted")
    counted = int(header)  # 0: it comes in chunks, counted as they come
    held.take(counted)
    # Pages of the system's own: there when they are written to, never copied as it grows, gone with the request.
    buffer = mmap(-1, max(counted, CHUNK), MAP_PRIVATE | MAP_ANONYMOUS)
    size = 0
    async for piece in pieces_of(request, BODY_SECONDS, "body"):
        start, size = size, size + len(piece)
        if size > limit:
            raise TooLarge(f"the body has more than {limit} bytes")
        if size > counted:
            held.take(size - counted)
            counted = size
        if size > len(buffer):
            buffer.resize(max(size, 2 * len(buffer)))
        buffer[start:size] = piece
    return memoryview(buffer)[:size]


async def arrays_of(request: Request, limit: int, seconds: float, silent: float) -> AsyncIterator[Body]:
    """The .npy files that follow each other in a body, each of at most `limit` bytes, as soon as it is whole.

    Each is counted until the next one is asked for. Raises as `read_body`, and as `npy_length`.
    """
    held: Held = request.state.held
    came = bytearray()
    length: int | None = None
    async for piece in pieces_of(request, seconds, "stream of latents", silent):
        held.take(len(piece))
        came += piece
        while came and (length := length or npy_length(came)) is not None:
            if length > limit:
                raise TooLarge(f"a latent has {length} bytes; at most {limit} are accepted")
            if len(came) < length:
                break
            yield bytes(came[:length])
            del came[:length]
            held.give_back(length)
            length = None
    if came:
        raise MalformedBody(f"the stream of latents ends {len(came)} bytes after the beginning of one")


async def pieces_of(
    request: Request, seconds: float, what: str, silent: float = SILENT_SECONDS
) -> AsyncIterator[bytes]:
    """A body as it comes, the last piece of it within `seconds`, the next one within `silent`.

    Raises SlowBody and ClientGone, in words of `what`.
    """
    clock = asyncio.get_running_loop()
    end, more = clock.time() + seconds, True
    while more:
        try:
            async with asyncio.timeout_at(min(end, clock.time() + silent)):
                message = await request.receive()
        except TimeoutError:
            raise SlowBody(f"the {what} did not arrive within {seconds:g} s, or stopped for {silent:g} s") from None
        if message["type"] == "http.disconnect":
            raise ClientGone(f"the client closed the connection before its {what} ended")
        more = message.get("more_body", False)
        yield message.get("body", b"")


async def read_pictures(request: Request, limit: int) -> list[Part]:
    """The files of a request: its body, or the parts named `image` of a multipart form. Raises as `read_body`."""
    content_type = request.headers.get("content-type", "")
    body = await read_body(request, limit)
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


async def while_connected(
    request: Request, work: Coroutine[Any, Any, T], reading: Coroutine[Any, Any, None] | None = None
) -> T:
    """The result of `work`, cancelled with ClientGone when the client closes the connection.

    The body must be read before, or is so by `reading` meanwhile, whose errors are this call's.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request, reading))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        leaving.result()
        raise ClientGone("the client closed the connection before the answer")
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.wait({working, leaving})


async def _disconnected(request: Request, reading: Coroutine[Any, Any, None] | None) -> None:
    if reading is not None:
        await reading
    while (await request.receive())["type"] != "http.disconnect":
        pass
