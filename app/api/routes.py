"""POST /encode and POST /decode: the straight line from a body to an answer."""

import asyncio
import secrets
from collections.abc import Sequence
from functools import partial
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Query, Request, Response

from app.api.answer import (
    APNG,
    AVIF,
    JPEG,
    MULTIPART,
    NPY,
    NPZ,
    PICTURES,
    PNG,
    SAFETENSORS,
    TORCH,
    VIDEOS,
    WEBP,
    ZIP,
    accepted,
    answer,
    content_type,
    latents_body,
    negotiate,
    pictures_body,
    without_alpha,
)
from app.api.clips import decode_clip, either_way, is_clip
from app.api.context import GUARD, Limits, Shared
from app.api.door.body import deadline_of, read_body, read_pictures
from app.api.door.form import Part, naming
from app.api.encode_clip import encode_clip
from app.api.latents import WayBack, check_family, convention_of, warning, way_back
from app.api.openapi import DECODED, ENCODED, LATENTS_FAMILY, PROBLEM, WORK, answers, problems, request_body
from app.api.preview import preview
from app.api.queries import DecodeQuery, EncodeQuery
from app.api.work import Clock, Done, Given, Size, behind, decoding, encoding, finished, picture_size, resolved, writing
from app.engine.jobs import Task, Work
from app.errors import InvalidParameter, NotAcceptable
from app.store.checkpoint import Checkpoint
from app.wire.arrays.latents import LatentShape, latent_shape, read_latents
from app.wire.arrays.spec import CLIPS
from app.wire.clips.reels import is_video
from app.wire.fit import Fit, fit, fitted_size
from app.wire.images import check_sides
from app.wire.origin import origin_of, restore
from app.wire.pixels import PixelsHeader, check_channels, pixels_header, read_pixels

NAMED = 4  # animated pictures that a warning tells of

router = APIRouter(tags=["latents"], dependencies=GUARD, responses=PROBLEM)


@router.post(
    "/encode",
    response_class=Response,
    responses=answers("Latents, (N, C, h, w)", (NPY, SAFETENSORS, NPZ), ENCODED) | problems(*WORK),
    openapi_extra=request_body(
        "A picture, a form of several, or an array of them: uint8 (H, W, 3) or (N, H, W, 3), or floats in [-1, 1], "
        "(3, H, W) or (N, 3, H, W). Models of RGBA pictures take a fourth channel, straight alpha.",
        (PNG, JPEG, WEBP, AVIF, NPY, SAFETENSORS, ZIP, *VIDEOS),
        form=True,
    ),
)
async def encode(request: Request, query: Annotated[EncodeQuery, Query()], shared: Shared) -> Response:
    """Pictures to latents. Body: PNG, JPEG, WebP, AVIF, .npy or safetensors, or a form with parts named `image`."""
    clock, deadline = Clock("encode", shared.metrics, request.state.stages), deadline_of(request)
    moments = query.posterior == "moments"
    if moments and "latents" in query.model_fields_set and query.latents == "scaled":
        raise InvalidParameter("posterior=moments are raw; latents=scaled are a mode or a sample")
    checkpoint = await resolved(request, query.model, shared)
    shared.engine.check_open(checkpoint)
    files = await read_pictures(request, shared.limits.body_bytes)
    if query.frames is not None or is_video(files[0].content):
        return await encode_clip(request, query, checkpoint, files, deadline, clock, shared)
    with clock.stage("read"):
        headers = await asyncio.to_thread(_headers, files, shared.limits)
    sizes = [header.size for header in headers for _ in range(header.count)]
    seed = None
    if query.posterior == "sample":
        seed = query.seed if query.seed is not None else secrets.randbits(63)

    def prepare(checkpoint: Checkpoint) -> Work[Done]:
        multiple = checkpoint.family.size_multiple
        pairs = zip(files, headers, strict=True)
        channels = checkpoint.config.pixel_channels
        if channels == 4 and "background" in query.model_fields_set:
            raise InvalidParameter(f"background is for models of 3 channels; {checkpoint.name} takes the alpha itself")
        fitted = [size for file, header in pairs for size in _fitted(file, header, channels, multiple, query.fit)]
        _latents_type(request, fitted)  # refused now or never
        task = Task(
            "encode",
            checkpoint,
            "raw" if moments else query.latents,
            query.precision,
            query.tiling,
            query.deterministic,
            seed=seed,
            moments=moments,
            numbers=query.dtype,
        )

        def read(file: Part, header: PixelsHeader) -> list[np.ndarray]:
            most, background = shared.limits.picture_pixels, behind(query.rgb, checkpoint)
            with naming(file):
                pictures = read_pixels(file.content, header, background=background, max_pixels=most)
            return [fit(picture, multiple, query.fit) for picture in pictures]

        async def read_all() -> Given:
            work = [(header.work, partial(read, file, header)) for file, header in zip(files, headers, strict=True)]
            found = await shared.codecs.run_all(work)
            return Given([picture for pictures in found for picture in pictures], _animated(files, headers))

        return encoding(task, fitted, read_all, clock)

    done = await finished(request, checkpoint, query.model, prepare, deadline, shared)
    arrays = [result.array for result in done.results]
    media = _latents_type(request, [array.shape for array in arrays])
    with clock.stage("write"):
        origin = origin_of(sizes, done.task.checkpoint.family.size_multiple, query.fit)
        write = partial(latents_body, media, arrays, done.task, origin)
        content = await shared.codecs.run(writing(arrays, media), write)
    return answer(content, content_type(accepted(request), media), done, clock, origin)


@router.post(
    "/decode",
    response_class=Response,
    responses=answers(
        "A picture; several as zip or npy, (N, H, W, 3 or 4); of a clip, its frames as they are decoded",
        (PNG, JPEG, WEBP, AVIF, ZIP, NPY, APNG, MULTIPART, *VIDEOS),
        DECODED,
    )
    | problems(409, *WORK),
    openapi_extra=request_body(
        "Latents, (C, h, w) or (N, C, h, w); a .npz, or a list of torch.save's, may hold several shapes. Of a clip "
        "(1, C, T, h, w).",
        (NPY, NPZ, SAFETENSORS, TORCH),
        headers=[LATENTS_FAMILY],
    ),
)
async def decode(request: Request, query: Annotated[DecodeQuery, Query()], shared: Shared) -> Response:
    """Latents to pictures. Body: .npy, .npz, safetensors or torch.save's .pt, (C, h, w) or (N, C, h, w)."""
    clock, deadline = Clock("decode", shared.metrics, request.state.stages), deadline_of(request)
    checkpoint = await resolved(request, query.model, shared)
    if query.preview is not None:
        return await preview(request, query, checkpoint, deadline, shared)
    shared.engine.check_open(checkpoint)
    body = await read_body(request, shared.limits.body_bytes)
    with clock.stage("read"):
        header = await asyncio.to_thread(latent_shape, body, CLIPS)
    if is_clip(header, checkpoint):
        return await decode_clip(request, query, checkpoint, body, header, deadline, clock, shared)
    if query.fps is not None:
        raise InvalidParameter("fps is for clips, (1, C, T, h, w)")
    if query.lossless:
        raise InvalidParameter("lossless is for clips, (1, C, T, h, w); image/png always is")
    shared.limits.check_items(header.batch)  # nothing of a claimed length is made before

    def prepare(checkpoint: Checkpoint) -> Work[Done]:
        family = checkpoint.family
        latents = convention_of(query, header, family)
        check_family(request, header, checkpoint.name, family, latents)
        task = Task("decode", checkpoint, latents, query.precision, query.tiling, query.deterministic, query.output)
        shared.limits.check([picture_size(shape, task) for shape in header.shapes])
        back = _way_back(query, header, task)
        media = _picture_type(request, query, back.result.sizes)  # refused now or never
        for size in set(back.result.sizes):
            check_sides(*size, media)
        flat = without_alpha(media, checkpoint)

        def read() -> Given:
            items = read_latents(body, max_bytes=shared.limits.body_bytes * 4).items
            found = [
                text
                for text in (warning(items, family, latents), back.warning, flat, either_way(header, checkpoint))
                if text
            ]
            return Given(items, "; ".join(found) or None)

        return decoding(task, header, lambda: shared.codecs.run(len(body) + header.work, read), clock)

    done = await finished(request, checkpoint, query.model, prepare, deadline, shared)
    back = _way_back(query, header, done.task)
    media = _picture_type(request, query, back.result.sizes)

    def write() -> bytes:
        pairs = zip(done.results, back.result.sizes, strict=True)
        return pictures_body(media, [restore(each.array, size, back.change) for each, size in pairs], query.quality)

    with clock.stage("write"):
        content = await shared.codecs.run(writing([each.array for each in done.results], media), write)
    return answer(content, content_type(accepted(request), media), done, clock, back.result)


def _headers(files: Sequence[Part], limits: Limits) -> list[PixelsHeader]:
    headers = []
    for file in files:
        with naming(file):
            headers.append(pixels_header(file.content))
            limits.check([headers[-1].size], headers[-1].count)
    limits.check_items(sum(header.count for header in headers))  # nothing of a claimed length is made before
    limits.check([header.size for header in headers for _ in range(header.count)])
    return headers


def _fitted(file: Part, header: PixelsHeader, channels: int, multiple: int, mode: Fit) -> list[Size]:
    with naming(file):
        check_channels(header, channels)
        return [fitted_size(*header.size, multiple, mode)] * header.count


def _animated(files: Sequence[Part], headers: Sequence[PixelsHeader]) -> str | None:
    """What is to be said of pictures that move."""
    said = [
        f"{file.label or 'the picture'} has {header.frames} frames: the first is encoded"
        for file, header in zip(files, headers, strict=True)
        if header.frames > 1
    ]
    return "; ".join(said[:NAMED]) + ("; .." if len(said) > NAMED else "") or None


def _latents_type(request: Request, shapes: Sequence[tuple[int, ...]]) -> str:
    return negotiate(accepted(request), (NPY, SAFETENSORS, NPZ) if len(set(shapes)) == 1 else (NPZ,))


def _way_back(query: DecodeQuery, header: LatentShape, task: Task) -> WayBack:
    decoded = [picture_size(shape, task) for shape in header.shapes]
    return way_back(query, header, decoded, task.checkpoint.family.size_multiple)


def _picture_type(request: Request, query: DecodeQuery, sizes: Sequence[Size]) -> str:
    accept, n = accepted(request), len(sizes)
    if query.dtype != "uint8":
        if len(set(sizes)) > 1:
            raise InvalidParameter(f"dtype={query.dtype} is for {NPY}, which holds pictures of one size")
        media = negotiate(accept, (NPY,))
    elif n == 1:
        media = negotiate(accept, (*PICTURES, NPY, ZIP))
    else:
        offers = (ZIP, NPY) if len(set(sizes)) == 1 else (ZIP,)  # pictures of different sizes are no array
        try:
            media = negotiate(accept, offers)
        except NotAcceptable:
            raise NotAcceptable(f"{n} pictures do not fit in {accept[:200]}: ask for {' or '.join(offers)}") from None
    if query.bits == "16" and media not in (PNG, ZIP):
        raise InvalidParameter(f"bits=16 is for PNG; {media} has 8 bits a channel")
    if query.quality is not None and media not in (JPEG, WEBP, AVIF):
        raise InvalidParameter(f"quality is for JPEG, WebP and AVIF; the answer is {media}")
    return media
