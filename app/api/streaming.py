"""GET and POST /preview/stream: one connection that shows every step of a sampler as it comes."""

import itertools
import secrets
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from starlette.types import Receive, Scope, Send

from app.api.answer import NPY, NPZ, SAFETENSORS, TORCH, WEBP, header_value
from app.api.context import GUARD, Context, Shared
from app.api.door.body import arrays_of, while_connected
from app.api.errors import ClientGone, problem
from app.api.latents import told_family
from app.api.openapi import BINARY, LATENTS_FAMILY, PROBLEM, WORK, Responses, problems, request_body
from app.api.preview import asked, body_of, made
from app.api.queries import StepQuery, StreamQuery
from app.api.streams import IDLE_SECONDS, WHOLE_SECONDS, Stream, Waiting
from app.api.work import resolved
from app.errors import Overloaded, ServiceError, TooLarge, Unavailable
from app.store.checkpoint import Checkpoint
from app.wire.scan import Body

MIXED = "multipart/x-mixed-replace"
"""Each part takes the place of the one before it: browsers show the last one of an <img>."""
PIXELS = 2048 * 2048
"""Of a picture of a stream, which is sent again and again."""

LOOKED_ON: Responses = {200: {"description": "Pictures, as they are made.", "content": {MIXED: {"schema": BINARY}}}}
SHOWN: Responses = {202: {"description": "It is shown, unless another one comes first."}}

router = APIRouter(prefix="/preview/stream", tags=["latents"], dependencies=GUARD, responses=PROBLEM)


@router.get(
    "",
    operation_id="look_on",
    response_class=Response,
    responses=LOOKED_ON | problems(429, 503),
)
async def look_on(request: Request, query: Annotated[StreamQuery, Query()], shared: Shared) -> Response:
    """The pictures of a stream for as long as it is looked on: WebP, a part each, with the headers of a preview."""
    if request.state.head:
        return Response(media_type=MIXED)
    return _Pictures(request, query.stream, shared)


@router.post(
    "",
    operation_id="show",
    status_code=202,
    response_class=Response,
    responses=SHOWN | LOOKED_ON | problems(409, *WORK),
    openapi_extra=request_body(
        "One latent, (C, h, w); without `stream` a .npy file for each step, one behind the other as they come.",
        (NPY, NPZ, SAFETENSORS, TORCH),
        headers=[LATENTS_FAMILY],
        deadline=False,
    ),
)
async def show(request: Request, query: Annotated[StepQuery, Query()], shared: Shared) -> Response:
    """Shows latents to whoever looks on at the stream, or to whoever sends them.

    The newest wins: one that still waits is not shown any more.
    """
    told_family(request)  # before the answer of a stream begins
    if query.stream is None:
        checkpoint = await resolved(request, query.model, shared)
        return _Pictures(request, secrets.token_hex(16), shared, partial(_read, request, query, checkpoint, shared))
    shared.streams.get(query.stream)  # before the body is read
    checkpoint = await resolved(request, query.model, shared)
    body = await body_of(request, shared)
    step = await _step(request, body, query, checkpoint, request.state.request_id, shared)
    lost = shared.streams.get(query.stream).put(step)
    return Response(status_code=202, headers={"X-Warning": header_value(f"the last one: {lost}")} if lost else None)


async def _step(
    request: Request, body: Body, query: StepQuery, checkpoint: Checkpoint, name: str, shared: Context
) -> Waiting:
    """A latent whose picture can be made; `name` becomes the picture's X-Request-Id."""
    with shared.previews.entered():
        found = await asked(request, body, query, query.preview, checkpoint, (WEBP,), shared)
    width, height = found.size
    if width * height > PIXELS:
        raise TooLarge(
            f"{width}x{height} are more than the {PIXELS} pixels of a stream's pictures: size= makes it less"
        )

    async def make() -> Response:
        picture = await made(found, None, shared)
        picture.headers["X-Request-Id"] = name
        return picture

    return Waiting(make, found.nbytes)


async def _read(request: Request, query: StepQuery, checkpoint: Checkpoint, shared: Context, stream: Stream) -> None:
    """Puts every latent of the body on the stream.

    One that cannot be shown now has its error for a picture; one that is wrong is the last.
    """
    request.state.op = "preview"
    names = (f"{request.state.request_id}/{step}" for step in itertools.count())
    name = next(names)
    try:
        async for body in arrays_of(request, shared.limits.body_bytes, WHOLE_SECONDS, IDLE_SECONDS):
            try:
                stream.put(_telling(request, await _step(request, body, query, checkpoint, name, shared), name))
            except (Overloaded, Unavailable) as error:
                stream.put(_told(request, error, name))
            name = next(names)
    except ClientGone:
        raise
    except ServiceError as error:
        stream.put(_told(request, error, name))
    stream.finish()


def _told(request: Request, error: ServiceError, name: str) -> Waiting:
    async def make() -> Response:
        return problem(request, error, {"X-Request-Id": name})

    return Waiting(make, 0)


def _telling(request: Request, waiting: Waiting, name: str) -> Waiting:
    """The same; an error in its making is told instead of its picture."""

    async def make() -> Response:
        try:
            return await waiting.make()
        except ServiceError as error:
            return await _told(request, error, name).make()

    return replace(waiting, make=make)


class _Pictures(Response):
    """An answer that goes on for as long as it is read; `reading` puts on its stream what its own request brings."""

    def __init__(
        self,
        request: Request,
        name: str,
        shared: Context,
        reading: Callable[[Stream], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        self._boundary = secrets.token_hex(16)
        super().__init__(
            media_type=f'{MIXED}; boundary="{self._boundary}"',
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},  # the latter: of nginx
        )
        del self.headers["Content-Length"]
        self._request, self._name, self._shared, self._reading = request, name, shared, reading

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._shared.streams.opened(self._name, self._request.state.held) as stream:
            reading = self._reading(stream) if self._reading is not None else None
            with suppress(ClientGone):  # its answer has begun
                await while_connected(self._request, self._send(send, stream), reading)

    async def _send(self, send: Send, stream: Stream) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await self._write(send, f"--{self._boundary}\r\n".encode())
        async for picture in stream.pictures():
            part = _part(picture) + f"\r\n--{self._boundary}\r\n".encode()
            await self._write(send, part)
            if not stream.waits and self._reading is None:  # Chromium shows one once the next one's headers are there
                await self._write(send, part)
        await send({"type": "http.response.body", "body": b""})

    async def _write(self, send: Send, body: bytes) -> None:
        await send({"type": "http.response.body", "body": body, "more_body": True})


def _part(picture: Response) -> bytes:
    lines = [b"%s: %s" % (name.title(), value) for name, value in picture.raw_headers]
    return b"\r\n".join([*lines, b"", bytes(picture.body)])
