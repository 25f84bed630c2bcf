"""POST /decode and /encode of a clip: frames leave as they are decoded, and are read as they are encoded."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from app.api.answer import (
    APNG,
    MULTIPART,
    NPY,
    SAFETENSORS,
    accepted,
    answer,
    answer_headers,
    content_type,
    latents_body,
    negotiate,
)
from app.api.context import Context
from app.api.door.body import while_connected
from app.api.door.form import Part, naming
from app.api.errors import kind_of
from app.api.latents import WayBack, check_family, convention_of, warning, way_back
from app.api.schemas import DecodeQuery, EncodeQuery, FrameRule
from app.api.work import Clock, Done, behind, finished, picture_shape, picture_size, writing
from app.engine.batcher import Admission
from app.engine.jobs import Result, Task, Work
from app.errors import InvalidImage, InvalidParameter, ServiceError
from app.store.checkpoint import Checkpoint
from app.wire.arrays import LatentShape, read_latents
from app.wire.films import BOUNDARY, FILMS, Film
from app.wire.fit import fit, fitted_size
from app.wire.origin import origin_of, restore
from app.wire.pixels import PixelsHeader, check_channels, pixels_header, read_pixels
from app.wire.scan import Body
from app.wire.spec import CLIPS, ArraySpec

FPS = 16
"""Frames per second where nothing is said: those that Wan was trained on."""


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
    media = _film_type(request, query)
    channels, length, height, width = header.parts[0]

    def prepare(checkpoint: Checkpoint) -> Work[_Begun]:
        clips = checkpoint.for_clips()
        latents = convention_of(query, header, clips.family)
        check_family(request, header, clips.name, clips.family, latents)
        task = Task("decode", clips, latents, query.precision, query.tiling, query.deterministic, query.output)
        shared.limits.check_clip(picture_size((channels, height, width), task), _frames(length, clips))
        back = _way_back(query, header, task)

        def read() -> tuple[np.ndarray, str | None]:
            items = read_latents(body, max_bytes=shared.limits.body_bytes * 4, purpose=CLIPS).items
            clip = np.stack(items)  # (C, T, h, w)
            found = warning([clip], clips.family, latents)
            return clip, "; ".join(text for text in (clips.doubt, found, back.warning) if text) or None

        async def do(admission: Admission) -> _Begun:
            with clock.stage("read"):
                clip, said = await shared.codecs.run(len(body) + header.work, read)
            rest = admission.slices(_one_by_one(clip))
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
        count = _frames(length, begun.task.checkpoint)
        film = FILMS[media](count, query.fps or FPS)
        headers = answer_headers(Done(begun.task, [begun.first], begun.warning), clock, back.result)
        headers["X-Frames"] = str(count)
        kind = content_type(accepted(request), media)
        if kind == MULTIPART:
            kind = f"{kind}; boundary={BOUNDARY}"
        pieces = _pieces(begun, film, back, shared)
        return _Streamed(request, pieces, stack.pop_all(), kind, headers)


async def encode_clip(
    request: Request,
    query: EncodeQuery,
    checkpoint: Checkpoint,
    files: Sequence[Part],
    deadline: float | None,
    clock: Clock,
    shared: Context,
) -> Response:
    """Frames (T, H, W, C) of one array to latents (1, C, t, h, w)."""
    assert query.frames is not None
    rule, moments = query.frames, query.posterior == "moments"
    if query.posterior == "sample":
        raise InvalidParameter("posterior=sample is for pictures; of clips there are mode and moments")
    if len(files) != 1:
        raise InvalidParameter(f"one clip is encoded in a request; these are {len(files)} files")
    media = negotiate(accepted(request), (NPY, SAFETENSORS))
    body = files[0].content
    with naming(files[0]):
        header = await asyncio.to_thread(pixels_header, body)
    declared = header.declared
    if not isinstance(declared, ArraySpec) or declared.fortran:
        raise InvalidImage("expected a clip as an array in C order, uint8 (T, H, W, 3), .npy or safetensors")

    def prepare(checkpoint: Checkpoint) -> Work[Done]:
        clips = checkpoint.for_clips()
        factor, multiple = clips.temporal_factor, clips.family.size_multiple
        check_channels(header, clips.config.pixel_channels)
        count = _counted(header.count, factor, rule)
        shared.limits.check_clip(header.size, count)
        size = fitted_size(*header.size, multiple, query.fit)
        convention = "raw" if moments else query.latents
        # Half precision costs a clip more than its memory is worth: its errors flicker.
        precision = "fp32" if query.precision == "auto" else query.precision
        task = Task(
            "encode",
            clips,
            convention,
            precision,
            query.tiling,
            query.deterministic,
            moments=moments,
            numbers=query.dtype,
        )
        background = behind(query.rgb, clips)

        def read(start: int, length: int) -> np.ndarray:
            part = _part(declared, start, min(length, header.count - start))
            most = shared.limits.picture_pixels
            found = read_pixels(body, PixelsHeader(part), background=background, max_pixels=most)
            found += found[-1:] * (length - len(found))  # frames=pad
            return np.stack([fit(picture, multiple, query.fit) for picture in found])

        async def slices() -> AsyncIterator[np.ndarray]:
            for start in (0, *range(1, count, factor)):
                length = factor if start else 1
                with clock.stage("read"):
                    array = await shared.codecs.run(_work(header, length), partial(read, start, length))
                yield array

        async def do(admission: Admission) -> Done:
            async with aclosing(admission.slices(slices())) as found:
                results = [result async for result in found]
            clock.add(results)
            array = np.concatenate([result.array for result in results], axis=1)
            told = next((result for result in results if result.reason), results[0])
            return Done(task, [replace(told, array=array)], clips.doubt)

        return Work([(task, [(count, *picture_shape(size, task))])], do)

    done = await finished(request, checkpoint, query.model, prepare, deadline, shared)
    array = done.results[0].array
    origin = origin_of([header.size], done.task.checkpoint.family.size_multiple, query.fit)
    with clock.stage("write"):
        write = partial(latents_body, media, [array], done.task, origin)
        content = await shared.codecs.run(writing([array], media), write)
    response = answer(content, content_type(accepted(request), media), done, clock, origin)
    response.headers["X-Frames"] = str(_frames(array.shape[1], done.task.checkpoint))
    return response


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


async def _one_by_one(clip: np.ndarray) -> AsyncIterator[np.ndarray]:
    """Latents (C, T, h, w) as T slices (C, 1, h, w)."""
    for index in range(clip.shape[1]):
        yield np.ascontiguousarray(clip[:, index : index + 1])


def _film_type(request: Request, query: DecodeQuery) -> str:
    floats = query.dtype != "uint8"
    media = negotiate(accepted(request), (NPY,) if floats else tuple(FILMS))
    if query.quality is not None:
        raise InvalidParameter("quality is for pictures: a clip is answered without loss")
    if query.bits == "16" and media == NPY:
        raise InvalidParameter(f"bits=16 is for PNG; {media} has 8 bits a channel")
    if query.fps is not None and media != APNG:
        raise InvalidParameter(f"fps is for {APNG}; the answer is {media}, which has none")
    return media


def _way_back(query: DecodeQuery, header: LatentShape, task: Task) -> WayBack:
    channels, _, height, width = header.parts[0]
    decoded = [picture_size((channels, height, width), task)]
    return way_back(query, header, decoded, task.checkpoint.family.size_multiple)


def _frames(latents: int, clips: Checkpoint) -> int:
    return 1 + clips.temporal_factor * (latents - 1)


def _counted(frames: int, factor: int, rule: FrameRule) -> int:
    """As many as are encoded of so many frames. Raises InvalidImage where they are not 1 more than a multiple."""
    over = (frames - 1) % factor
    if not over or rule == "trim":
        return frames - over
    if rule == "pad":
        return frames - over + factor
    raise InvalidImage(
        f"{frames} frames: expected {factor}k + 1, as {frames - over} or {frames - over + factor}; "
        "frames=trim drops the last ones, frames=pad repeats the last"
    )


def _part(clip: ArraySpec, start: int, count: int) -> ArraySpec:
    """Some frames of an array in C order."""
    each = clip.nbytes // clip.shape[0]
    return replace(clip, shape=(count, *clip.shape[1:]), start=clip.start + start * each)


def _work(header: PixelsHeader, frames: int) -> int:
    return header.work // header.count * frames
