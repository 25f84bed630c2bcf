"""POST /decode of a clip: frames leave as they are decoded."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import numpy as np
from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from app.api.answer import (
    APNG,
    MULTIPART,
    NPY,
    VIDEOS,
    WEBP,
    ZIP,
    accepted,
    answer_headers,
    content_type,
    negotiate,
    without_alpha,
)
from app.api.context import Context
from app.api.door.body import while_connected
from app.api.errors import kind_of
from app.api.latents import WayBack, check_family, convention_of, warning, way_back
from app.api.queries import DecodeQuery
from app.api.work import Clock, Done, Size, picture_size, writing
from app.engine.batcher import Admission
from app.engine.jobs import Result, Task, Work
from app.errors import InvalidParameter, NotAcceptable, ServiceError
from app.store.checkpoint import Checkpoint
from app.wire.arrays.latents import LatentShape, read_latents
from app.wire.arrays.spec import CLIPS
from app.wire.clips.films import BOUNDARY, FILMS, Film, FilmSpec
from app.wire.images import check_sides
from app.wire.origin import restore
from app.wire.scan import Body

FPS = 16
"""Frames per second where nothing is said: those that Wan was trained on."""

DEEP = (APNG, ZIP, MULTIPART)  # have 16 bits a channel, too
STILL = (NPY, ZIP, MULTIPART)  # say nothing of time


@dataclass(frozen=True)
class _Begun:
    """A clip whose first frame is there."""

    task: Task
    first: Result
    rest: AsyncGenerator[Result]
    warning: str | None


class _Streamed(StreamingResponse):
    """Frames as they come; `kept` is let go of at the end, whatever it is.

    Where it fails midway its end is left out, which breaks the connection: nobody takes what came for the whole.
    """

    def __init__(
        self, request: Request, pieces: AsyncGenerator[bytes], kept: AsyncExitStack, kind: str, headers: dict[str, str]
    ) -> None:
        super().__init__(pieces, headers=headers)
        self.headers["content-type"] = kind
        self._request = request
        self._pieces = pieces
        self._kept = kept

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers the request."""
        async with self._kept, aclosing(self._pieces):
            await super().__call__(scope, receive, send)

    async def stream_response(self, send: Send) -> None:
        """Sends the pieces."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for piece in self._pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except ServiceError as error:
            self._request.scope["state"]["problem"] = kind_of(error).code, f"cut off: {error}"
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def is_clip(header: LatentShape, checkpoint: Checkpoint) -> bool:
    """Whether latents are one: (1, C, T, h, w); or (C, T, h, w) where that can be nothing else for a model of clips."""
    if header.clip or checkpoint.architecture.clips is None or len(header.parts) != 1:
        return header.clip
    channels = checkpoint.family.latent_channels
    return header.parts[0][0] == channels != header.parts[0][1]


def either_way(header: LatentShape, checkpoint: Checkpoint) -> str | None:
    """What is to be said of pictures whose array could be a clip, too."""
    sides = {checkpoint.family.latent_channels} == set(header.parts[0][:2])
    if checkpoint.architecture.clips is None or len(header.parts) != 1 or not sides:
        return None
    return f"taken for {header.batch} pictures; a clip of this shape is told by a fifth side, (1, C, T, h, w)"


async def decode_clip(
    request: Request,
    query: DecodeQuery,
    checkpoint: Checkpoint,
    body: Body,
    header: LatentShape,
    deadline: float | None,
    clock: Clock,
    shared: Context,
) -> Response:
    """Latents (C, T, h, w) to frames, answered from the first on."""
    media = film_type(accepted(request), query)
    channels, length, height, width = header.parts[0]

    def prepare(checkpoint: Checkpoint) -> Work[_Begun]:
        clips = checkpoint.for_clips()
        latents = convention_of(query, header, clips.family)
        check_family(request, header, clips.name, clips.family, latents)
        task = Task("decode", clips, latents, query.precision, query.tiling, query.deterministic, query.output)
        shared.limits.check_clip(picture_size((channels, height, width), task), frames_of(length, clips))
        back = _way_back(query, header, task)
        check_film(media, query.lossless, back.result.sizes[0])
        flat = without_alpha(media, clips)

        def read() -> tuple[np.ndarray, str | None]:
            items = read_latents(body, max_bytes=shared.limits.body_bytes * 4, purpose=CLIPS).items
            clip = np.stack(items)  # (C, T, h, w)
            found = warning([clip], clips.family, latents)
            return clip, "; ".join(text for text in (clips.doubt, found, back.warning, flat) if text) or None

        async def do(admission: Admission) -> _Begun:
            with clock.stage("read"):
                clip, said = await shared.codecs.run(len(body) + header.work, read)
            rest = admission.slices(one_by_one(clip))
            first = await anext(rest)
            clock.add([first])
            return _Begun(task, first, rest, said)

        return Work([(task, [(channels, length, height, width)])], do)

    async with AsyncExitStack() as stack:
        origin = request.state.request_id
        run = await stack.enter_async_context(shared.engine.request(checkpoint, query.model, prepare, deadline, origin))
        begun = await while_connected(request, run())
        stack.push_async_callback(begun.rest.aclose)
        back = _way_back(query, header, begun.task)
        count = frames_of(length, begun.task.checkpoint)
        film = film_of(media, FilmSpec(count, query.fps or FPS, query.lossless))
        headers = answer_headers(Done(begun.task, [begun.first], begun.warning), clock, back.result)
        headers["X-Frames"] = str(count)
        kind = content_type(accepted(request), media)
        if kind == MULTIPART:
            kind = f"{kind}; boundary={BOUNDARY}"
        pieces = _pieces(begun, film, back, shared)
        return _Streamed(request, pieces, stack.pop_all(), kind, headers)


async def _pieces(begun: _Begun, film: Film, back: WayBack, shared: Context) -> AsyncGenerator[bytes]:
    """The bytes of a film, each slice's once it is there; the next slice waits until they are taken."""
    (size,), change = back.result.sizes, back.change

    def written(frames: np.ndarray) -> bytes:
        return film.add(np.stack([restore(frame, size, change) for frame in frames]))

    try:
        yield await shared.codecs.run(writing([begun.first.array]), partial(written, begun.first.array))
        async for result in begun.rest:
            yield await shared.codecs.run(writing([result.array]), partial(written, result.array))
    finally:
        end = film.end()
    if end:
        yield end


async def one_by_one(clip: np.ndarray) -> AsyncIterator[np.ndarray]:
    """Latents (C, T, h, w) as T slices (C, 1, h, w)."""
    for index in range(clip.shape[1]):
        yield np.ascontiguousarray(clip[:, index : index + 1])


def film_type(accept: str, query: DecodeQuery) -> str:
    """The media type of the answer. Raises NotAcceptable, and InvalidParameter for what that type does not have."""
    floats = query.dtype != "uint8"
    media = negotiate(accept, (NPY,) if floats else (*FILMS, *VIDEOS))
    if query.quality is not None:
        raise InvalidParameter("quality is for pictures; of a clip lossless=true is there for WebP and video")
    if query.bits == "16" and media not in DEEP:
        raise InvalidParameter(f"bits=16 is for PNG; {media} has 8 bits a channel")
    if query.fps is not None and media in STILL:
        raise InvalidParameter(f"fps is for what moves; the answer is {media}, which does not")
    if query.lossless and media in FILMS and media != WEBP:
        raise InvalidParameter(f"lossless is for WebP and video; {media} always is")
    return media


def check_film(media: str, lossless: bool, size: Size) -> None:
    """Raises NotAcceptable where frames of a (width, height) cannot be such a file, or nothing here writes it."""
    if media in VIDEOS:
        _video(media).check_video(media, lossless, size)
    else:
        check_sides(*size, media)


def film_of(media: str, spec: FilmSpec) -> Film:
    """An empty film."""
    return _video(media).VideoFilm(media, spec) if media in VIDEOS else FILMS[media](spec)


def _video(media: str) -> ModuleType:
    try:
        from app.wire.clips import video
    except ModuleNotFoundError as error:
        if error.name != "av":
            raise
        raise NotAcceptable(
            f"{media} is written with the extra latentd[video], which is not installed here; {', '.join(FILMS)} are"
        ) from None
    return video


def _way_back(query: DecodeQuery, header: LatentShape, task: Task) -> WayBack:
    channels, _, height, width = header.parts[0]
    decoded = [picture_size((channels, height, width), task)]
    return way_back(query, header, decoded, task.checkpoint.family.size_multiple)


def frames_of(latents: int, clips: Checkpoint) -> int:
    """That so many latent frames are."""
    return 1 + clips.temporal_factor * (latents - 1)
