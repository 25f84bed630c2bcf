"""Cheap pictures of latents, which full decodes never wait for: POST /decode?preview=, and each step of a stream."""

import time
from dataclasses import dataclass
from functools import partial

import numpy as np
from fastapi import Request, Response

from app.api.answer import PICTURES, WEBP, accepted, answer, content_type, header_value, negotiate, pictures_body
from app.api.context import Context
from app.api.door.body import read_body, while_connected
from app.api.latents import check_family, convention_of
from app.api.queries import DecodeQuery, Preview, StepQuery
from app.api.work import Clock, Done, Given, Size, decoding, picture_size
from app.engine.jobs import Result, Task, Work, check_shape
from app.engine.linear import apply
from app.engine.previews import PATIENCE_SECONDS
from app.errors import DeadlineExceeded, InvalidParameter, Unavailable, UnknownModel
from app.store.checkpoint import Checkpoint
from app.store.linear import Linear
from app.wire.arrays.latents import LatentShape, latent_shape, read_latents
from app.wire.fit import resized
from app.wire.images import check_sides
from app.wire.origin import Origin
from app.wire.scan import Body

OWN = frozenset({"model", "latents", "size", "quality", "preview"})
"""Parameters of a decode that previews have too."""
OFFERS = (WEBP, *(media for media in PICTURES if media != WEBP))


@dataclass(frozen=True)
class Asked:
    """A preview that can be made."""

    task: Task  # the full decode
    header: LatentShape
    latent: np.ndarray  # (C, h, w)
    nbytes: int  # that it keeps
    by: Checkpoint | Linear  # a tiny autoencoder, or a map
    media: str
    kind: str  # what the client has it called
    size: Size  # of the picture
    quality: int | None
    clock: Clock
    origin: str  # who asked, for the log


async def preview(
    request: Request, query: DecodeQuery, checkpoint: Checkpoint, deadline: float | None, shared: Context
) -> Response:
    """One latent as a small or approximate picture; X-Preview says how it was made, and how near that comes."""
    if others := query.model_fields_set - OWN:
        raise InvalidParameter(f"{', '.join(sorted(others))}: a preview has {', '.join(sorted(OWN))} alone")
    body = await body_of(request, shared)
    with shared.previews.entered():
        found = await asked(request, body, query, query.preview or "true", checkpoint, OFFERS, shared)
        return await while_connected(request, made(found, deadline, shared))


async def body_of(request: Request, shared: Context) -> Body:
    """The body of a preview: refused before it is read where there is no place, but it takes none while it comes."""
    request.state.op = "preview"
    shared.previews.check_room()
    return await read_body(request, shared.limits.body_bytes)


async def asked(
    request: Request,
    body: Body,
    query: DecodeQuery | StepQuery,
    how: Preview,
    checkpoint: Checkpoint,
    offers: tuple[str, ...],
    shared: Context,
) -> Asked:
    """What the request wants, its latent read; refused now where it cannot be. It entered `shared.previews` before."""
    clock = Clock("preview", shared.metrics, request.state.stages)
    with clock.stage("read"):
        header = await shared.sketches.run(len(body), lambda: latent_shape(body))
    shared.limits.check_items(header.batch)
    if header.batch != 1:
        raise InvalidParameter(f"a preview is of one latent; these are {header.batch}")
    latents = convention_of(query, header, checkpoint.family)
    check_family(request, header, checkpoint.name, checkpoint.family, latents)
    task = Task("decode", checkpoint, latents)
    check_shape(task, header.shapes[0])
    whole = picture_size(header.shapes[0], task)
    shared.limits.check([whole])
    media = negotiate(accepted(request), offers)
    if query.quality is not None and media == "image/png":
        raise InvalidParameter(f"quality is for JPEG, WebP and AVIF; the answer is {media}")
    by = _maker(task, how, shared)
    side = task.checkpoint.family.side("raw")
    size = _size(query, whole) or ((whole[0] // side, whole[1] // side) if isinstance(by, Linear) else whole)
    check_sides(*size, media)
    with clock.stage("read"):
        most = shared.limits.body_bytes * 4
        given = await shared.sketches.run(len(body) + header.work, lambda: read_latents(body, max_bytes=most))
    nbytes = len(body) + given.items[0].nbytes
    kind = content_type(accepted(request), media)
    origin = request.state.request_id
    return Asked(task, header, given.items[0], nbytes, by, media, kind, size, query.quality, clock, origin)


async def made(asked: Asked, deadline: float | None, shared: Context) -> Response:
    """The picture, with the headers that say how it was made."""
    if isinstance(asked.by, Linear):
        return await _linear(asked, asked.by, shared)
    return await _tiny(asked, asked.by, deadline, shared)


def _maker(task: Task, how: Preview, shared: Context) -> Checkpoint | Linear:
    tiny = shared.previews.tiny(task.checkpoint, task.latents) if how != "linear" else None
    if how == "tiny" and tiny is None:
        raise UnknownModel(f"there is no tiny autoencoder for {task.latents} latents of {task.checkpoint.name}")
    if tiny is not None and (how == "tiny" or not shared.previews.beside_work):
        return tiny
    linear = shared.previews.linear(task.checkpoint, task.latents)
    if linear is None and tiny is not None:
        return tiny
    if linear is None:
        raise Unavailable(f"the linear preview of {task.checkpoint.name} is being fitted")
    return linear


def _size(query: DecodeQuery | StepQuery, whole: Size) -> Size | None:
    """What the picture is resized to."""
    if not query.sizes:
        return None
    size = query.sizes[0]
    if len(query.sizes) > 1 or size[0] > whole[0] or size[1] > whole[1]:
        raise InvalidParameter(f"size={(query.size or '')[:80]}: a preview has one, up to {whole[0]}x{whole[1]}")
    return size


async def _linear(asked: Asked, linear: Linear, shared: Context) -> Response:
    """In one go on the previews' own thread: the map, the picture's codec."""
    came = time.perf_counter()

    def make() -> tuple[Result, bytes]:
        began = time.perf_counter()
        picture = apply(linear, asked.latent)
        seconds = {"queue": began - came, "compute": time.perf_counter() - began}
        return Result(picture, "linear", None, seconds), _file(asked, picture)

    width, height = asked.size
    result, content = await shared.sketches.run(asked.header.work + 4 * 3 * width * height, make)
    asked.clock.add([result])
    done = Done(asked.task, [result], asked.task.checkpoint.doubt)
    return _answer(asked, content, done, f"linear{_near(linear.psnr_db)}")


async def _tiny(asked: Asked, tiny: Checkpoint, deadline: float | None, shared: Context) -> Response:
    """A job of the engine that is dropped when work comes."""

    async def given() -> Given:
        return Given([asked.latent])

    def prepare(model: Checkpoint) -> Work[Done]:
        return decoding(Task("decode", model, asked.task.latents, rank="spare"), asked.header, given, asked.clock)

    patience = time.monotonic() + PATIENCE_SECONDS
    end = patience if deadline is None else min(deadline, patience)
    try:
        async with shared.engine.request(tiny, tiny.name, prepare, end, asked.origin) as run:
            done = await run()
    except DeadlineExceeded:
        if end == deadline:
            raise
        raise shared.previews.refused(f"it was not made within {PATIENCE_SECONDS:g} s") from None
    picture = done.results[0].array
    content = await shared.sketches.run(4 * picture.nbytes, partial(_file, asked, picture))
    near = shared.previews.psnr_db(asked.task.checkpoint, tiny)
    return _answer(asked, content, done, f"tiny:{header_value(tiny.name)}{_near(near)}")


def _file(asked: Asked, picture: np.ndarray) -> bytes:
    """Blocking: on the previews' own thread."""
    with asked.clock.stage("write"):
        height, width, _ = picture.shape
        sized = picture if asked.size == (width, height) else resized(picture, asked.size)
        return pictures_body(asked.media, [sized], asked.quality)


def _answer(asked: Asked, content: bytes, done: Done, how: str) -> Response:
    response = answer(content, asked.kind, done, asked.clock, Origin((asked.size,)))
    response.headers["X-Preview"] = how
    return response


def _near(psnr_db: float | None) -> str:
    return "" if psnr_db is None else f";db={psnr_db:.1f}"
