"""POST /encode and POST /decode: the straight line from a body to an answer."""

import asyncio
import secrets
from functools import partial
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Query, Request, Response

from app.api.accept import negotiate
from app.api.answer import JPEG, NPY, NPZ, PNG, SAFETENSORS, WEBP, ZIP, Clock, Size, answer, latents_body, pictures_body
from app.api.body import deadline_of, read_body, read_pictures, while_connected
from app.api.context import GUARD, Context, Shared
from app.api.current import checkpoint_of, with_current
from app.api.mismatch import check_family, convention_of, warning
from app.api.openapi import LATENTS_FAMILY, PROBLEM, WARNING, answers, takes
from app.api.schemas import DecodeQuery, EncodeQuery
from app.engine.jobs import Result, Task
from app.errors import InvalidParameter, NotAcceptable
from app.store.checkpoint import Checkpoint
from app.wire.arrays import latent_shape, read_latents
from app.wire.fit import fit, fitted_size
from app.wire.images import check_sides, image_size, read_image

router = APIRouter(tags=["latents"], dependencies=GUARD, responses=PROBLEM)


@router.post(
    "/encode",
    response_class=Response,
    responses=answers("float16 latents, (N, C, h, w)", (NPY, SAFETENSORS, NPZ)),
    openapi_extra=takes("A picture, or a form of several.", (PNG, JPEG, WEBP), form=True),
)
async def encode(request: Request, query: Annotated[EncodeQuery, Query()], shared: Shared) -> Response:
    """Pictures to latents. Body: the bytes of a PNG, JPEG or WebP, or a form with parts named `image`."""
    clock, deadline = Clock("encode", shared.metrics), deadline_of(request)
    checkpoint = await checkpoint_of(request, query.model, shared)
    bodies = await read_pictures(request, shared.limits.body_bytes)
    run = partial(_encode, request, query, shared, clock, deadline, bodies)
    return await with_current(request, query.model, shared, deadline, run, checkpoint)


async def _encode(
    request: Request,
    query: EncodeQuery,
    shared: Context,
    clock: Clock,
    deadline: float | None,
    bodies: list[bytes],
    checkpoint: Checkpoint,
) -> Response:
    multiple = checkpoint.family.size_multiple
    with clock.stage("read"):
        sizes = [image_size(body) for body in bodies]  # their headers alone
    shared.limits.check(sizes)
    fitted = [fitted_size(*size, multiple, query.fit) for size in sizes]
    media = negotiate(_accept(request), (NPY, SAFETENSORS, NPZ) if len(set(fitted)) == 1 else (NPZ,))
    seed = None
    if query.posterior == "sample":
        seed = query.seed if query.seed is not None else secrets.randbits(63)
    task = Task("encode", checkpoint, query.latents, query.precision, query.tiling, query.deterministic, seed=seed)

    def read(body: bytes) -> np.ndarray:
        image = read_image(body, background=query.rgb, max_pixels=shared.limits.pixels)
        return fit(image, multiple, query.fit)

    async def work() -> list[Result]:
        with clock.stage("read"):
            arrays = await asyncio.gather(*(asyncio.to_thread(read, body) for body in bodies))
        return await admission.run(task, arrays)

    shapes = [(height, width, 3) for width, height in fitted]
    async with shared.engine.admit(task, shapes, deadline) as admission:
        results = await while_connected(request, work())
    clock.add(results)
    with clock.stage("write"):
        content = await asyncio.to_thread(latents_body, media, [result.array for result in results], task, sizes)
    return answer(content, media, task, results, clock, sizes)


@router.post(
    "/decode",
    response_class=Response,
    responses=answers("A picture; several as zip or npy, uint8 (N, H, W, 3)", (PNG, JPEG, WEBP, ZIP, NPY), WARNING),
    openapi_extra=takes("Latents, (C, h, w) or (N, C, h, w).", (NPY, NPZ, SAFETENSORS), headers=[LATENTS_FAMILY]),
)
async def decode(request: Request, query: Annotated[DecodeQuery, Query()], shared: Shared) -> Response:
    """Latents to pictures. Body: .npy, .npz or safetensors, (C, h, w) or (N, C, h, w)."""
    clock, deadline = Clock("decode", shared.metrics), deadline_of(request)
    checkpoint = await checkpoint_of(request, query.model, shared)
    body = await read_body(request, shared.limits.body_bytes)
    run = partial(_decode, request, query, shared, clock, deadline, body)
    return await with_current(request, query.model, shared, deadline, run, checkpoint)


async def _decode(
    request: Request,
    query: DecodeQuery,
    shared: Context,
    clock: Clock,
    deadline: float | None,
    body: bytes,
    checkpoint: Checkpoint,
) -> Response:
    with clock.stage("read"):
        header = await asyncio.to_thread(latent_shape, body)
    latents, family = convention_of(query, header), checkpoint.family
    check_family(request, header, checkpoint.name, family, latents)
    task = Task(
        "decode",
        checkpoint,
        latents,
        query.precision,
        query.tiling,
        query.deterministic,
        bits=16 if query.bits == "16" else 8,
    )
    side = family.spatial_factor * (family.latent_format.patch if latents == "scaled" else 1)
    full = (header.width * side, header.height * side)
    shared.limits.check([full] * header.batch)
    size = _crop(query, *full)
    media = _picture_type(request, query, header.batch)
    check_sides(*size, media)

    def read() -> tuple[list[np.ndarray], str | None]:
        items = list(read_latents(body, max_bytes=shared.limits.body_bytes * 4).array)
        return items, warning(items, family, latents)

    async def work() -> tuple[list[Result], str | None]:
        with clock.stage("read"):
            items, found = await asyncio.to_thread(read)
        return await admission.run(task, items), found

    shapes = [(header.channels, header.height, header.width)] * header.batch
    async with shared.engine.admit(task, shapes, deadline) as admission:
        results, warned = await while_connected(request, work())
    clock.add(results)
    arrays = [result.array[: size[1], : size[0]] for result in results]
    with clock.stage("write"):
        content = await asyncio.to_thread(pictures_body, media, arrays, query.quality)
    return answer(content, media, task, results, clock, [size], warned)


def _crop(query: DecodeQuery, width: int, height: int) -> Size:
    size = query.width_height
    if size is None:
        return width, height
    if size[0] > width or size[1] > height:
        raise InvalidParameter(f"size={query.size} is larger than the picture, {width}x{height}")
    return size


def _accept(request: Request) -> str:
    return ", ".join(request.headers.getlist("accept"))


def _picture_type(request: Request, query: DecodeQuery, n: int) -> str:
    accept = _accept(request)
    if n == 1:
        media = negotiate(accept, (PNG, JPEG, WEBP, NPY, ZIP))
    else:
        try:
            media = negotiate(accept, (ZIP, NPY))
        except NotAcceptable:
            raise NotAcceptable(f"{n} pictures do not fit in {accept[:200]}: ask for {ZIP} or {NPY}") from None
    if query.bits == "16" and media not in (PNG, ZIP):
        raise InvalidParameter(f"bits=16 is for PNG; {media} has 8 bits a channel")
    if query.quality is not None and media not in (JPEG, WEBP):
        raise InvalidParameter(f"quality is for JPEG and WebP; the answer is {media}")
    return media
