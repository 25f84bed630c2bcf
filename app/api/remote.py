"""POST /remote/{model}/decode and /encode: the wire form of Hugging Face's remote VAEs (Hybrid Inference).

What its clients send is taken as it is: parameters that are not known are theirs to have, a Content-Type may be
missing, and every error is `{"error": "..."}`. The work is the same as of /decode and /encode.
"""

import asyncio
import json
from base64 import b64decode
from typing import Annotated, TypeVar

import numpy as np
from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import ValidationError

from app.api.answer import JPEG, JSON, PNG, accepted, answer, pictures_body, without_alpha
from app.api.context import KEYED, Context, Shared
from app.api.door.body import deadline_of, read_body
from app.api.errors import REMOTE
from app.api.latents import warning
from app.api.remote_answer import BASE64, remote_clip, tensor_answer, tensor_type
from app.api.remote_query import RemoteDecodeQuery, RemoteEncodeQuery, RemoteQuery
from app.api.work import Clock, Done, Given, behind, decoding, encoding, finished, picture_size, resolved, writing
from app.engine.jobs import Output, Task, Work
from app.errors import InvalidParameter, MalformedBody
from app.store.checkpoint import Checkpoint
from app.wire.arrays.spec import PIXELS
from app.wire.arrays.tensor_bytes import Layout, bytes_spec, latent_layout, read_layout
from app.wire.fit import Fit, fit, fitted_size
from app.wire.images import WHITE, check_sides
from app.wire.origin import Origin, origin_of
from app.wire.pixels import PixelsHeader, array_header, check_channels, pixels_header, read_pixels
from app.wire.scan import Body, count

FIT: Fit = "crop"
"""Of pictures: clients reckon with H // 8 by W // 8."""
MOST_PARTS = 1 << 12
"""Of the JSON around a base64 body."""

router = APIRouter(prefix=REMOTE.rstrip("/"), dependencies=KEYED, include_in_schema=False)

Name = Annotated[str, Path(description="A name of GET /models, or at least 8 digits of a sha256.")]


Q = TypeVar("Q", bound=RemoteQuery)


@router.post("/{model:path}/decode")
async def remote_decode(
    request: Request, model: Name, query: Annotated[RemoteDecodeQuery, Query()], shared: Shared
) -> Response:
    """A tensor of latents to a picture, or to a tensor of pictures."""
    clock, deadline = Clock("decode", shared.metrics, request.state.stages), deadline_of(request)
    checkpoint = await resolved(request, model, shared)
    shared.engine.check_open(checkpoint)
    body, query = await _read(request, query, shared, clock)
    if query.output_type == "mp4" or (len(query.shape) == 5 and query.shape[2] > 1):
        return await remote_clip(request, model, query, checkpoint, body, deadline, clock, shared)
    output, media = _output(request, query)

    def laid_out(checkpoint: Checkpoint) -> tuple[Task, Layout]:
        family = checkpoint.family
        task = Task("decode", checkpoint, query.convention, output=output)
        layout = latent_layout(
            *query.tensor,
            len(body),
            size=query.size,
            channels=family.channels("raw"),
            factor=family.side("raw"),
            patched=family.channels("raw") < family.channels(query.convention),
        )
        return task, layout

    def prepare(checkpoint: Checkpoint) -> Work[Done]:
        task, layout = laid_out(checkpoint)
        shape, count = layout.shape.parts[0][1:], layout.shape.batch
        size = picture_size(shape, task)
        shared.limits.check([size], count)
        if media in (JPEG, PNG):
            check_sides(*size, media)
            if count > 1:
                raise InvalidParameter(f"{count} latents are no single picture: ask for output_type=pt")

        def read() -> Given:
            items = [query.unscaled(item) for item in read_layout(layout, body)]
            said = (warning(items, checkpoint.family, query.convention), without_alpha(media, checkpoint))
            return Given(items, "; ".join(text for text in said if text) or None)

        return decoding(task, layout.shape, lambda: shared.codecs.run(len(body) + layout.shape.work, read), clock)

    done = await finished(request, checkpoint, model, prepare, deadline, shared)
    arrays = [result.array for result in done.results]
    origin = Origin(tuple(array.shape[1::-1] for array in arrays))
    if media in (JPEG, PNG):
        with clock.stage("write"):
            content = await shared.codecs.run(writing(arrays), lambda: pictures_body(media, arrays, None))
        return answer(content, media, done, clock, origin)

    def tensor() -> np.ndarray:
        batch = np.stack(arrays)
        if query.output_type == "pil":  # what a client with a processor of its own asks for: (N, 3, H, W) in [0, 1]
            batch /= 2
            batch += 0.5
            batch = batch.clip(0, 1, out=batch).astype(np.float16)
        if batch.dtype == np.uint8:
            return batch
        pictures = batch.transpose(0, 3, 1, 2)
        return pictures[:, :, None] if query.output_type == "pt" and len(query.shape) == 5 else pictures

    return await tensor_answer(tensor, media, shared, done, clock, origin)


@router.post("/{model:path}/encode")
async def remote_encode(
    request: Request, model: Name, query: Annotated[RemoteEncodeQuery, Query()], shared: Shared
) -> Response:
    """A picture file, or a tensor of pictures in [-1, 1], to a tensor of latents: the mode of the posterior."""
    clock, deadline = Clock("encode", shared.metrics, request.state.stages), deadline_of(request)
    checkpoint = await resolved(request, model, shared)
    shared.engine.check_open(checkpoint)
    body, query = await _read(request, query, shared, clock)
    with clock.stage("read"):
        header = await asyncio.to_thread(_header, body, query)
    shared.limits.check([header.size], header.count)
    sizes = [header.size] * header.count

    def prepare(checkpoint: Checkpoint) -> Work[Done]:
        multiple = checkpoint.family.size_multiple
        check_channels(header, checkpoint.config.pixel_channels)
        task = Task("encode", checkpoint, "raw", numbers="float32")

        def read() -> Given:
            most = shared.limits.picture_pixels
            found = read_pixels(body, header, background=behind(WHITE, checkpoint), max_pixels=most)
            return Given([fit(picture, multiple, FIT) for picture in found])

        fitted = [fitted_size(*header.size, multiple, FIT)] * header.count
        return encoding(task, fitted, lambda: shared.codecs.run(header.work, read), clock)

    done = await finished(request, checkpoint, model, prepare, deadline, shared)
    origin = origin_of(sizes, done.task.checkpoint.family.size_multiple, FIT)
    media = tensor_type(accepted(request))

    def tensor() -> np.ndarray:
        return query.scaled(np.stack([result.array for result in done.results]))

    return await tensor_answer(tensor, media, shared, done, clock, origin)


def _header(body: Body, query: RemoteEncodeQuery) -> PixelsHeader:
    return array_header(bytes_spec(*query.tensor, len(body), PIXELS)) if query.shape else pixels_header(body)


def _output(request: Request, query: RemoteDecodeQuery) -> tuple[Output, str]:
    """What the network's output becomes, and the type of the answer."""
    accept = accepted(request)
    tensor = tensor_type(accept)
    if query.output_type == "pt":
        return "uint8" if query.partial_postprocess else "float16", tensor
    if tensor in accept:
        return "float32", tensor
    png = query.image_format == "png" or (query.image_format is None and PNG in accept)
    return "uint8", PNG if png else JPEG


async def _read(request: Request, query: Q, shared: Context, clock: Clock) -> tuple[Body, Q]:
    """The bytes of the tensor or the picture, and what is said of them."""
    body = await read_body(request, shared.limits.body_bytes)
    if not request.headers.get("content-type", "").lower().startswith((BASE64, JSON)):
        return body, query
    with clock.stage("read"):
        return await shared.codecs.run(3 * len(body), lambda: _unwrapped(body, query))


def _unwrapped(body: Body, query: Q) -> tuple[bytes, Q]:
    """What older clients' JSON holds: `inputs` in base64, and perhaps `parameters`, which overrule the query."""
    if sum(count(mark, body) for mark in (b"[", b"{", b",")) > MOST_PARTS:
        raise MalformedBody(f"the JSON has more than {MOST_PARTS} parts")
    try:
        content = json.loads(bytes(body))
        inputs = b64decode(content["inputs"], validate=True)
        parameters = dict(content.get("parameters") or {})
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        raise MalformedBody('expected JSON like {"inputs": "BASE64", "parameters": {}}') from None
    try:
        return inputs, type(query).model_validate(query.model_dump(exclude_unset=True) | parameters)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise InvalidParameter(told[:500]) from None
