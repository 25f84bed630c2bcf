"""GET and POST /preview/stream: one connection that shows every step of a sampler as it comes."""

import secrets
from contextlib import suppress
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from starlette.types import Receive, Scope, Send

from app.api.answer import NPY, NPZ, SAFETENSORS, TORCH, WEBP, header_value
from app.api.context import GUARD, Context, Shared
from app.api.door.body import while_connected
from app.api.errors import ClientGone
from app.api.openapi import BINARY, LATENTS_FAMILY, PROBLEM, WORK, Responses, problems, request_body
from app.api.preview import asked, body_of, made
from app.api.schemas import StepQuery, StreamQuery
from app.api.streams import Waiting
from app.api.work import resolved
from app.errors import TooLarge

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
    responses=SHOWN | problems(409, *WORK),
    openapi_extra=request_body("One latent, (C, h, w).", (NPY, NPZ, SAFETENSORS, TORCH), headers=[LATENTS_FAMILY]),
)
async def show(request: Request, query: Annotated[StepQuery, Query()], shared: Shared) -> Response:
    """Shows a latent to whoever looks on at the stream. The newest wins: one that still waits is not shown any more."""
    shared.streams.get(query.stream)  # before the body is read
    checkpoint = await resolved(request, query.model, shared)
    body = await body_of(request, shared)
    with shared.previews.entered():
        found = await asked(request, body, query, query.preview, checkpoint, (WEBP,), shared)
    width, height = found.size
    if width * height > PIXELS:
        raise TooLarge(
            f"{width}x{height} are more than the {PIXELS} pixels of a stream's pictures: size= makes it less"
        )

    async def make() -> Response:
        picture = await made(found, None, shared)
        picture.headers["X-Request-Id"] = found.origin
        return picture

    lost = shared.streams.get(query.stream).put(Waiting(make, found.nbytes))
    return Response(status_code=202, headers={"X-Warning": header_value(f"the last one: {lost}")} if lost else None)


class _Pictures(Response):
    """An answer that goes on for as long as it is read."""

    def __init__(self, request: Request, name: str, shared: Context) -> None:
        self._boundary = secrets.token_hex(16)
        super().__init__(
            media_type=f'{MIXED}; boundary="{self._boundary}"',
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},  # the latter: of nginx
        )
        del self.headers["Content-Length"]
        self._request, self._name, self._shared = request, name, shared

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientGone):  # its answer has begun
            await while_connected(self._request, self._send(send))

    async def _send(self, send: Send) -> None:
        with self._shared.streams.opened(self._name, self._request.state.held) as stream:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await self._write(send, f"--{self._boundary}\r\n".encode())
            async for picture in stream.pictures():
                part = _part(picture) + f"\r\n--{self._boundary}\r\n".encode()
                await self._write(send, part)
                if not stream.waits:  # Chromium shows a part once the headers of the next one are there
                    await self._write(send, part)
            await send({"type": "http.response.body", "body": b""})

    async def _write(self, send: Send, body: bytes) -> None:
        await send({"type": "http.response.body", "body": body, "more_body": True})


def _part(picture: Response) -> bytes:
    lines = [b"%s: %s" % (name.title(), value) for name, value in picture.raw_headers]
    return b"\r\n".join([*lines, b"", bytes(picture.body)])
