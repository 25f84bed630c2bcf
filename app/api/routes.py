"""POST /encode and POST /decode: the straight line from a body to an answer."""

import asyncio
import secrets
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Query, Request, Response

from app.api.accept import negotiate
from app.api.answer import JPEG, NPY, NPZ, PNG, SAFETENSORS, WEBP, ZIP, Clock, Size, answer, latents_body, pictures_body
from app.api.body import deadline_of, read_body, read_pictures, while_connected
from app.api.context import GUARD, Context, Shared
from app.api.openapi import PROBLEM, answers, takes
from app.api.schemas import DecodeQuery, EncodeQuery
from app.engine.jobs import Convention, Result, Task
from app.errors import FamilyMismatch, InvalidParameter, NotAcceptable, TooLarge
from app.store.checkpoint import Checkpoint
from app.wire.arrays import LatentShape, latent_shape, read_latents
from app.wire.fit import fit, fitted_size
from app.wire.images import image_size, read_image

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
    checkpoint = await _checkpoint(request, query.model, shared)
    multiple = checkpoint.family.size_multiple
    bodies = await read_pictures(request, shared.limits.body_bytes)
    with clock.stage("read"):
        sizes = [image_size(body) for body in bodies]  # their headers alone
    _check_pixels(sizes, shared)
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
    responses=answers("A picture; several as zip or npy, uint8 (N, H, W, 3)", (PNG, JPEG, WEBP, ZIP, NPY)),
    openapi_extra=takes("Latents, (C, h, w) or (N, C, h, w).", (NPY, NPZ, SAFETENSORS)),
)
async def decode(request: Request, query: Annotated[DecodeQuery, Query()], shared: Shared) -> Response:
    """Latents to pictures. Body: .npy, .npz or safetensors, (C, h, w) or (N, C, h, w)."""
    clock, deadline = Clock("decode", shared.metrics), deadline_of(request)
    checkpoint = await _checkpoint(request, query.model, shared)
    body = await read_body(request, shared.limits.body_bytes)
    with clock.stage("read"):
        header = await asyncio.to_thread(latent_shape, body)
    latents = _convention(query, header, checkpoint)
    task = Task(
        "decode",
        checkpoint,
        latents,
        query.precision,
        query.tiling,
        query.deterministic,
        bits=16 if query.bits == "16" else 8,
    )
    side = checkpoint.family.spatial_factor * (checkpoint.family.latent_format.patch if latents == "scaled" else 1)
    full = (header.width * side, header.height * side)
    _check_pixels([full] * header.batch, shared)
    size = _crop(query, *full)
    media = _picture_type(request, query, header.batch)

    async def work() -> list[Result]:
        with clock.stage("read"):
            read = await asyncio.to_thread(read_latents, body, max_bytes=shared.limits.body_bytes * 4)
        return await admission.run(task, list(read.array))

    shapes = [(header.channels, header.height, header.width)] * header.batch
    async with shared.engine.admit(task, shapes, deadline) as admission:
        results = await while_connected(request, work())
    clock.add(results)
    arrays = [result.array[: size[1], : size[0]] for result in results]
    with clock.stage("write"):
        content = await asyncio.to_thread(pictures_body, media, arrays, query.quality)
    return answer(content, media, task, results, clock, [size])


async def _checkpoint(request: Request, model: str | None, shared: Context) -> Checkpoint:
    checkpoint = await shared.engine.resolve(model)
    request.state.model = checkpoint.name
    return checkpoint


def _check_pixels(sizes: Sequence[Size], shared: Context) -> None:
    limits = shared.limits
    for width, height in sizes:
        if width * height > limits.pixels:
            raise TooLarge(f"{width}x{height} are {width * height} pixels; at most {limits.pixels} are accepted")
    if len(sizes) > limits.items:
        raise TooLarge(f"{len(sizes)} pictures in one request; at most {limits.items} are accepted")
    if (total := sum(width * height for width, height in sizes)) > limits.total_pixels:
        raise TooLarge(f"{total} pixels in one request; at most {limits.total_pixels} are accepted")


def _convention(query: DecodeQuery, header: LatentShape, checkpoint: Checkpoint) -> Convention:
    """The latents' convention: the query's, or what a safetensors file says of itself."""
    if header.family is not None and header.family != checkpoint.family.name:
        raise FamilyMismatch(
            f"the latent says it is of family {header.family}; "
            f"the model {checkpoint.name} is of {checkpoint.family.name}"
        )
    said = header.convention
    if said is None or "latents" not in query.model_fields_set:
        return said or query.latents
    if said != query.latents:
        raise InvalidParameter(f"latents={query.latents} was asked for, but the file says it holds {said} latents")
    return said


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
