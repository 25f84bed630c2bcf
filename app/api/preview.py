"""POST /decode?preview=: cheap pictures of latents, which full decodes never wait for."""

import time
from dataclasses import dataclass

import numpy as np
from fastapi import Request, Response

from app.api.answer import PICTURES, WEBP, accepted, answer, content_type, header_value, negotiate, pictures_body
from app.api.context import Context
from app.api.door.body import read_body
from app.api.latents import check_family, convention_of
from app.api.schemas import DecodeQuery
from app.api.work import Clock, Done, Given, Size, decoding, finished, picture_size
from app.engine.jobs import Result, Task, Work, check_shape
from app.engine.linear import apply
from app.engine.previews import PATIENCE_SECONDS
from app.errors import DeadlineExceeded, InvalidParameter, Unavailable, UnknownModel
from app.store.checkpoint import Checkpoint
from app.store.linear import Linear
from app.wire.arrays import LatentShape, latent_shape, read_latents
from app.wire.fit import resized
from app.wire.images import check_sides
from app.wire.origin import Origin
from app.wire.scan import Body

OWN = frozenset({"model", "latents", "size", "quality", "preview"})
"""Parameters of a decode that previews have too."""
OFFERS = (WEBP, *(media for media in PICTURES if media != WEBP))


@dataclass(frozen=True)
class Asked:
    """A preview that was asked for."""

    query: DecodeQuery
    task: Task  # the full decode
    header: LatentShape
    body: Body
    media: str
    size: Size | None  # of the picture; None: as it comes


async def preview(
    request: Request, query: DecodeQuery, checkpoint: Checkpoint, deadline: float | None, shared: Context
) -> Response:
    """One latent as a small or approximate picture; X-Preview says how it was made, and how near that comes."""
    if others := query.model_fields_set - OWN:
        raise InvalidParameter(f"{', '.join(sorted(others))}: a preview has {', '.join(sorted(OWN))} alone")
    request.state.op = "preview"
    clock = Clock("preview", shared.metrics, request.state.stages)
    with shared.previews.entered():
        body = await read_body(request, shared.limits.body_bytes)
        with clock.stage("read"):
            header = await shared.sketches.run(len(body), lambda: latent_shape(body))
        asked = _asked(request, query, checkpoint, header, body, shared)
        tiny = shared.previews.tiny(checkpoint, asked.task.latents) if query.preview != "linear" else None
        if tiny is not None:
            return await _tiny(request, asked, tiny, deadline, clock, shared)
        if query.preview == "tiny":
            raise UnknownModel(f"there is no tiny autoencoder for {asked.task.latents} latents of {checkpoint.name}")
        linear = shared.previews.linear(checkpoint, asked.task.latents)
        if linear is None:
            raise Unavailable(f"the linear preview of {checkpoint.name} is being fitted")
        return await _linear(request, asked, linear, clock, shared)


def _asked(
    request: Request, query: DecodeQuery, checkpoint: Checkpoint, header: LatentShape, body: Body, shared: Context
) -> Asked:
    """What is wanted, refused now where it cannot be."""
    shared.limits.check_items(header.batch)
    if header.batch != 1:
        raise InvalidParameter(f"a preview is of one latent; these are {header.batch}")
    latents = convention_of(query, header, checkpoint.family)
    check_family(request, header, checkpoint.name, checkpoint.family, latents)
    task = Task("decode", checkpoint, latents)
    check_shape(task, header.shapes[0])
    whole = picture_size(header.shapes[0], task)
    shared.limits.check([whole])
    size = query.sizes[0] if query.sizes else None
    if size and (len(query.sizes or ()) > 1 or size[0] > whole[0] or size[1] > whole[1]):
        raise InvalidParameter(f"size={(query.size or '')[:80]}: a preview has one, up to {whole[0]}x{whole[1]}")
    media = negotiate(accepted(request), OFFERS)
    check_sides(*(size or whole), media)
    if query.quality is not None and media == "image/png":
        raise InvalidParameter(f"quality is for JPEG, WebP and AVIF; the answer is {media}")
    return Asked(query, task, header, body, media, size)


async def _linear(request: Request, asked: Asked, linear: Linear, clock: Clock, shared: Context) -> Response:
    """In one go on the previews' own thread: reading, the map, the picture's codec."""

    def make() -> tuple[Result, bytes]:
        latent = read_latents(asked.body, max_bytes=shared.limits.body_bytes * 4).items[0]
        began = time.perf_counter()
        picture = apply(linear, latent)
        seconds = {"compute": time.perf_counter() - began}
        return Result(picture, "linear", None, seconds), _file(asked, picture)

    with clock.stage("write"):
        result, content = await shared.sketches.run(len(asked.body) + asked.header.work, make)
    clock.add([result])
    done = Done(asked.task, [result], asked.task.checkpoint.doubt)
    return _answer(request, asked, content, done, clock, f"linear{_near(linear.psnr_db)}")


async def _tiny(
    request: Request, asked: Asked, tiny: Checkpoint, deadline: float | None, clock: Clock, shared: Context
) -> Response:
    """A job of the engine that is dropped when work comes."""

    def prepare(model: Checkpoint) -> Work[Done]:
        async def read() -> Given:
            size = len(asked.body) + asked.header.work
            most = shared.limits.body_bytes * 4
            return Given((await shared.sketches.run(size, lambda: read_latents(asked.body, max_bytes=most))).items)

        return decoding(Task("decode", model, asked.task.latents, rank="spare"), asked.header, read, clock)

    patience = time.monotonic() + PATIENCE_SECONDS
    end = patience if deadline is None else min(deadline, patience)
    try:
        done = await finished(request, tiny, tiny.name, prepare, end, shared)
    except DeadlineExceeded:
        if end == deadline:
            raise
        raise shared.previews.refused(f"it was not made within {PATIENCE_SECONDS:g} s") from None
    picture = done.results[0].array
    with clock.stage("write"):
        content = await shared.sketches.run(4 * picture.nbytes, lambda: _file(asked, picture))
    near = shared.previews.psnr_db(asked.task.checkpoint, tiny)
    return _answer(request, asked, content, done, clock, f"tiny:{header_value(tiny.name)}{_near(near)}")


def _file(asked: Asked, picture: np.ndarray) -> bytes:
    sized = picture if asked.size is None else resized(picture, asked.size)
    return pictures_body(asked.media, [sized], asked.query.quality)


def _answer(request: Request, asked: Asked, content: bytes, done: Done, clock: Clock, how: str) -> Response:
    height, width, _ = done.results[0].array.shape
    kind = content_type(accepted(request), asked.media)
    response = answer(content, kind, done, clock, Origin((asked.size or (width, height),)))
    response.headers["X-Preview"] = how
    return response


def _near(psnr_db: float | None) -> str:
    return "" if psnr_db is None else f";db={psnr_db:.1f}"
