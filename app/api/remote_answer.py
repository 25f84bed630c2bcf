"""What Hugging Face's clients of remote VAEs are answered: tensors as bytes with their shape beside them, and clips."""

import json
from base64 import b64encode
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace

import numpy as np
from fastapi import Request, Response

from app.api.answer import JSON, accepted, answer
from app.api.clips import FPS, check_film, film_of, frames_of, one_by_one
from app.api.context import Context
from app.api.latents import warning
from app.api.remote_query import RemoteDecodeQuery
from app.api.work import Clock, Done, finished, picture_size, writing
from app.engine.batcher import Admission
from app.engine.jobs import Task, Work
from app.errors import InvalidLatent
from app.store.checkpoint import Checkpoint
from app.wire.arrays.spec import CLIPS
from app.wire.arrays.tensor_bytes import Layout, bytes_spec, read_layout
from app.wire.clips.films import FilmSpec
from app.wire.origin import Origin
from app.wire.scan import Body

BINARY, BASE64 = "tensor/binary", "tensor/base64"
MP4 = "video/mp4"


def tensor_type(accept: str) -> str:
    """The type of a tensor that is answered."""
    return BASE64 if BASE64 in accept else BINARY


async def remote_clip(
    request: Request,
    model: str,
    query: RemoteDecodeQuery,
    checkpoint: Checkpoint,
    body: Body,
    deadline: float | None,
    clock: Clock,
    shared: Context,
) -> Response:
    """Latents (1, C, T, h, w) to an MP4 file, or to a tensor of frames: (1, 3, T, H, W), or uint8 (T, H, W, 3)."""
    film = query.output_type == "mp4"
    layout = Layout(bytes_spec(*query.tensor, len(body), CLIPS))
    one, channels, *sides = layout.spec.shape if not layout.spec.clip else (1, *layout.spec.shape)
    if len(query.shape) != 5 or one != 1:
        raise InvalidLatent(f"expected a clip (1, C, T, h, w), got {tuple(query.shape)}")
    length, height, width = sides if layout.spec.clip else (1, *sides)

    def prepare(checkpoint: Checkpoint) -> Work[Done]:
        clips = checkpoint.for_clips()
        bytes_out = film or query.partial_postprocess
        task = Task("decode", clips, query.convention, output="uint8" if bytes_out else "float16")
        size, count = picture_size((channels, height, width), task), frames_of(length, clips)
        shared.limits.check_clip(size, count)
        if film:
            check_film(MP4, lossless=False, size=size)

        def read() -> np.ndarray:
            clip = np.stack([query.unscaled(item) for item in read_layout(layout, body)])
            return clip.reshape(channels, length, height, width)

        async def do(admission: Admission) -> Done:
            with clock.stage("read"):
                clip = await shared.codecs.run(len(body) + layout.shape.work, read)
            async with aclosing(admission.slices(one_by_one(clip))) as found:
                results = [result async for result in found]
            clock.add(results)
            frames = np.concatenate([result.array for result in results])
            return Done(task, [replace(results[0], array=frames)], warning([clip], clips.family, query.convention))

        return Work([(task, [(channels, length, height, width)])], do)

    done = await finished(request, checkpoint, model, prepare, deadline, shared)
    frames = done.results[0].array
    origin = Origin((frames.shape[2:0:-1],))
    if not film:
        return await tensor_answer(
            lambda: frames if frames.dtype == np.uint8 else frames.transpose(3, 0, 1, 2)[None],
            tensor_type(accepted(request)), shared, done, clock, origin,
        )  # fmt: skip

    def write() -> bytes:
        writer = film_of(MP4, FilmSpec(len(frames), FPS))
        return writer.add(frames) + writer.end()

    with clock.stage("write"):
        content = await shared.codecs.run(writing([frames]), write)
    return answer(content, MP4, done, clock, origin)


async def tensor_answer(
    tensor: Callable[[], np.ndarray], media: str, shared: Context, done: Done, clock: Clock, origin: Origin
) -> Response:
    """A tensor as its bytes, or as JSON with these in base64; its shape and dtype are headers."""

    def write() -> tuple[bytes, dict[str, str]]:
        array = np.ascontiguousarray(tensor())
        data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        shape, dtype = list(array.shape), array.dtype.name
        if media == BASE64:
            said = {"inputs": b64encode(data).decode(), "parameters": {"shape": shape, "dtype": dtype}}
            data = json.dumps(said).encode()
        return data, {"shape": json.dumps(shape), "dtype": dtype}

    with clock.stage("write"):
        content, headers = await shared.codecs.run(writing([result.array for result in done.results]), write)
    response = answer(content, JSON if media == BASE64 else media, done, clock, origin)
    response.headers.update(headers)
    return response
