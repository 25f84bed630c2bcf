"""POST /encode of a clip: frames are read as they are encoded."""

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial

import numpy as np
from fastapi import Request, Response

from app.api.answer import NPY, SAFETENSORS, accepted, answer, content_type, latents_body, negotiate
from app.api.clips import frames_of
from app.api.context import Context
from app.api.door.form import Part, naming
from app.api.queries import EncodeQuery, FrameRule
from app.api.work import Clock, Done, behind, finished, picture_shape, writing
from app.engine.batcher import Admission
from app.engine.jobs import Task, Work
from app.errors import InvalidImage, InvalidParameter
from app.store.checkpoint import Checkpoint
from app.wire.clips.reels import reel_of
from app.wire.fit import fit, fitted_size
from app.wire.origin import origin_of


async def encode_clip(
    request: Request,
    query: EncodeQuery,
    checkpoint: Checkpoint,
    files: Sequence[Part],
    deadline: float | None,
    clock: Clock,
    shared: Context,
) -> Response:
    """The frames of one clip to latents (1, C, t, h, w)."""
    rule, moments = query.frames or "error", query.posterior == "moments"
    if query.posterior == "sample":
        raise InvalidParameter("posterior=sample is for pictures; of clips there are mode and moments")
    if len(files) != 1:
        raise InvalidParameter(f"one clip is encoded in a request; these are {len(files)} files")
    media = negotiate(accepted(request), (NPY, SAFETENSORS))
    body = files[0].content
    with naming(files[0]):
        # A video file is walked through for its frames' number, which takes as long as reading its bytes.
        reel = await shared.codecs.run(len(body), partial(reel_of, body, max_pixels=shared.limits.picture_pixels))

    def prepare(checkpoint: Checkpoint) -> Work[Done]:
        clips = checkpoint.for_clips()
        factor, multiple = clips.temporal_factor, clips.family.size_multiple
        if reel.alpha and clips.config.pixel_channels == 3:
            raise InvalidImage("the frames have alpha, which this model does not take: expected 3 channels, got 4")
        count = _counted(reel.count, factor, rule)
        shared.limits.check_clip(reel.size, count)
        size = fitted_size(*reel.size, multiple, query.fit)
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
            with naming(files[0]):
                found = reel.read(min(length, reel.count - start), background)
            if len({frame.shape for frame in found}) > 1 or found[0].shape[1::-1] != reel.size:
                raise InvalidImage("the frames of a clip are of one size")
            found += found[-1:] * (length - len(found))  # frames=pad
            return np.stack([fit(picture, multiple, query.fit) for picture in found])

        async def slices() -> AsyncIterator[np.ndarray]:
            for start in (0, *range(1, count, factor)):
                length = factor if start else 1
                with clock.stage("read"):
                    array = await shared.codecs.run(length * reel.work, partial(read, start, length))
                yield array

        async def do(admission: Admission) -> Done:
            async with aclosing(admission.slices(slices())) as found:
                results = [result async for result in found]
            clock.add(results)
            array = np.concatenate([result.array for result in results], axis=1)
            told = next((result for result in results if result.reason), results[0])
            return Done(task, [replace(told, array=array)], clips.doubt)

        return Work([(task, [(count, *picture_shape(size, task))])], do)

    try:
        done = await finished(request, checkpoint, query.model, prepare, deadline, shared)
    finally:
        reel.close()
    array = done.results[0].array
    origin = origin_of([reel.size], done.task.checkpoint.family.size_multiple, query.fit)
    with clock.stage("write"):
        write = partial(latents_body, media, [array], done.task, origin)
        content = await shared.codecs.run(writing([array], media), write)
    response = answer(content, content_type(accepted(request), media), done, clock, origin)
    response.headers["X-Frames"] = str(frames_of(array.shape[1], done.task.checkpoint))
    return response


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
