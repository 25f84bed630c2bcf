"""POST /compare: one picture through many models and back, as a contact sheet and as numbers."""

import asyncio
import math
import textwrap
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Query, Request, Response

from app.api.answer import AVIF, JPEG, JSON, PNG, WEBP, ZIP, accepted, content_type, negotiate
from app.api.context import GUARD, Context, Limits, Shared
from app.api.door.body import deadline_of, read_pictures, while_connected
from app.api.openapi import COMPARED, PROBLEM, WORK, answers, problems, request_body
from app.api.queries import CompareQuery
from app.api.schemas import Compared, Comparison
from app.api.work import Clock, Size, latent_shape_of, picture_shape
from app.engine.batcher import Admission
from app.engine.jobs import Task, Work
from app.errors import (
    InvalidParameter,
    NonFiniteOutput,
    OutOfMemory,
    ServiceError,
    TooLarge,
    UnknownModel,
    UnsupportedCheckpoint,
)
from app.store.checkpoint import Checkpoint
from app.text import reason
from app.wire.arrays.npz import write_zip
from app.wire.difference import difference
from app.wire.fit import fit, fitted_size
from app.wire.headers import read_header
from app.wire.images import Colour, flattened, opaque, read_image, write_image
from app.wire.sheet import Cell, contact_sheet, shrunk

MOST = 64
"""Models in one comparison: a sheet of more is not looked at."""
MEASURING = 16  # bytes that the measures take for each of a picture's: Lab and SSIM in floats
SHEET_BYTES = 256 << 20  # a sheet of `MOST` cells, written
WRAP = 40  # characters of an error in a line below a cell

OWN_FAULTS = (UnknownModel, UnsupportedCheckpoint, OutOfMemory, NonFiniteOutput)
"""What is one model's failure; the others still stand. Anything else ends the request."""

router = APIRouter(tags=["latents"], dependencies=GUARD, responses=PROBLEM)


@dataclass(frozen=True)
class _Trip:
    """A model that takes part, or the reason why it cannot."""

    asked: str  # a name, or a hash prefix
    model: Checkpoint | UnsupportedCheckpoint

    @property
    def row(self) -> Compared:
        """Without numbers."""
        if not isinstance(self.model, Checkpoint):
            return Compared(model=self.asked)
        return Compared(model=self.model.name, sha256=self.model.sha256, family=self.model.family.name)


Row = tuple[Compared, Cell]
Run = Callable[[], Awaitable[Row]]


@router.post(
    "/compare",
    response_class=Response,
    responses=answers(
        "A contact sheet; the numbers; or a zip of both, `sheet.png` and `numbers.json`",
        (PNG, ZIP),
        COMPARED,
        Comparison,
    )
    | problems(*WORK),
    openapi_extra=request_body("A picture, or a form of one.", (PNG, JPEG, WEBP, AVIF), form=True),
)
async def compare(request: Request, query: Annotated[CompareQuery, Query()], shared: Shared) -> Response:
    """One picture through each of `models` and back. Body: the bytes of a PNG, JPEG, WebP or AVIF."""
    clock, deadline = Clock("compare", shared.metrics, request.state.stages), deadline_of(request)
    media = negotiate(accepted(request), (PNG, JSON, ZIP))
    trips = await _models(query, shared)
    for trip in trips:
        if isinstance(trip.model, Checkpoint):
            shared.engine.check_open(trip.model)
    files = await read_pictures(request, shared.limits.body_bytes)
    if len(files) != 1:
        raise InvalidParameter(f"one picture is compared at a time; the form has {len(files)}")
    body = files[0].content
    with clock.stage("read"):
        header = await asyncio.to_thread(read_header, body)
    size = header.shown
    # All see the same picture: what is cropped or resized must suit every one; padding is cut off again.
    multiple = math.lcm(*(trip.model.family.size_multiple for trip in trips if isinstance(trip.model, Checkpoint)))
    seen = size if query.fit == "pad" else fitted_size(*size, multiple, query.fit)
    _check_size(size, seen, len(trips), shared.limits)

    def read() -> np.ndarray:
        image = read_image(body, header, background=query.rgb, max_pixels=shared.limits.picture_pixels)
        return image if query.fit == "pad" else fit(image, multiple, query.fit)

    picture: list[np.ndarray] = []  # read once there is room for all of it

    async def work(runs: list[tuple[_Trip, Run]]) -> tuple[list[Compared], list[Cell]]:
        with clock.stage("read"):
            picture.append(await shared.codecs.run(header.work, read))
            small = await shared.codecs.run(picture[0].nbytes, partial(shrunk, picture[0]))
            first = Cell(small, ("original", f"{seen[0]}x{seen[1]}"))
        done: list[Row] = []
        errors: list[ServiceError] = []
        for trip, run in runs:  # one after the other: each model is loaded once, however few the device holds
            try:
                done.append(await run())
            except OWN_FAULTS as error:
                errors.append(error)
                done.append(_failure(trip.row, error))
        if len(errors) == len(trips):
            raise errors[0]
        return [row for row, _ in done], [first, *(cell for _, cell in done)]

    async with AsyncExitStack() as room:
        # The request is refused now, or served whole.
        started = time.perf_counter()
        runs = [(trip, await _admitted(room, shared, query, seen, deadline, trip, picture, clock)) for trip in trips]
        clock.spans.append(("admission", started, time.perf_counter()))
        rows, cells = await while_connected(request, work(runs))
    with clock.stage("write"):
        numbers = Comparison(image_size=f"{seen[0]}x{seen[1]}", models=rows)
        content = await shared.codecs.run(SHEET_BYTES, partial(_body, media, numbers, cells))
    headers = {"X-Image-Size": f"{size[0]}x{size[1]}", "Server-Timing": clock.finish()}
    return Response(content, media_type=content_type(accepted(request), media), headers=headers)


async def _models(query: CompareQuery, shared: Context) -> list[_Trip]:
    """The models that are named, or all usable ones. Raises UnknownModel, and InvalidParameter for none or too many."""
    if query.names is not None and len(query.names) > MOST:
        raise _too_many(len(query.names))
    trips: list[_Trip] = []
    if query.names is None:
        trips += [_Trip(item.name, item) for item in await shared.engine.entries() if isinstance(item, Checkpoint)]
    for name in query.names or ():
        try:
            model = await shared.engine.resolve(name)
            if all(trip.model != model for trip in trips):  # asked for by its name and by its hash
                trips.append(_Trip(name, model))
        except UnsupportedCheckpoint as error:
            trips.append(_Trip(name, error))
    if not trips and query.names is None:
        await shared.engine.resolve(None)  # raises what says why there is none
    if not trips:
        raise InvalidParameter(f"models is a list of names, A,B,...; got {str(query.models)[:80]!r}")
    if len(trips) > MOST:
        raise _too_many(len(trips))
    return trips


def _too_many(models: int) -> InvalidParameter:
    return InvalidParameter(f"{models} models; at most {MOST} are compared: name them, models=A,B,...")


def _check_size(size: Size, seen: Size, models: int, limits: Limits) -> None:
    limits.check([size])
    if 2 * models > limits.items:
        raise TooLarge(f"{models} models, both ways, are {2 * models} items; the queue holds {limits.items}")
    if (pixels := 2 * models * seen[0] * seen[1]) > limits.pixels:
        raise TooLarge(
            f"{models} models, both ways, at {seen[0]}x{seen[1]} are {pixels} pixels; "
            f"at most {limits.pixels} are accepted in one request"
        )


async def _admitted(
    room: AsyncExitStack,
    shared: Context,
    query: CompareQuery,
    size: Size,
    deadline: float | None,
    trip: _Trip,
    picture: list[np.ndarray],
    clock: Clock,
) -> Run:
    """A model's round trip, with room in the queue for both ways, which ends with `room`."""
    if not isinstance(trip.model, Checkpoint):
        return partial(_unusable, trip.model)

    def prepare(checkpoint: Checkpoint) -> Work[Row]:
        multiple = checkpoint.family.size_multiple
        padded = fitted_size(*size, multiple, "pad")
        encode = Task("encode", checkpoint, precision=query.precision, tiling=query.tiling)
        decode = replace(encode, op="decode")

        async def round_trip(there: Admission, back: Admission) -> Row:
            def ready() -> np.ndarray:
                return opaque(fit(picture[0], multiple, "pad"), checkpoint.config.pixel_channels)

            padded = await shared.codecs.run(2 * picture[0].nbytes, ready)
            latents = await there.run([padded])
            pictures = await back.run([latents[0].array])
            clock.add(latents)
            clock.add(pictures)
            with clock.stage("write"):
                row, plan = _Trip(trip.asked, checkpoint).row, pictures[0].plan
                measure = partial(_measured, row, plan, picture[0], pictures[0].array, query.rgb)
                return await shared.codecs.run(MEASURING * picture[0].nbytes, measure)

        parts = [(encode, [picture_shape(padded, encode)]), (decode, [latent_shape_of(padded, decode)])]
        return Work(parts, round_trip)

    return await room.enter_async_context(shared.engine.request(trip.model, trip.asked, prepare, deadline))


async def _unusable(error: UnsupportedCheckpoint) -> Row:
    raise error


def _measured(row: Compared, plan: str, original: np.ndarray, padded: np.ndarray, background: Colour) -> Row:
    picture = flattened(padded[: original.shape[0], : original.shape[1]], background)
    found = difference(original, picture)
    identical = math.isinf(found.psnr)
    row = row.model_copy(
        update={
            "plan": plan,
            "identical": identical,
            "psnr_db": None if identical else round(found.psnr, 3),
            "ssim": round(found.ssim, 5),
            "luminance_shift": round(found.luminance, 3),
            "saturation_shift": round(found.saturation, 3),
            "hue_shift_degrees": round(found.hue, 3),
        }
    )
    lines = (
        row.model,
        f"{row.family}  {(row.sha256 or '')[:8]}  {plan}",
        f"{'identical' if identical else f'PSNR {found.psnr:.2f} dB'}   SSIM {found.ssim:.3f}",
        f"lum {found.luminance:+z.1f}   sat {found.saturation:+z.1f}   hue {found.hue:+z.1f}°",
    )
    return row, Cell(shrunk(picture), lines)


def _failure(row: Compared, error: ServiceError) -> Row:
    text = reason(error)
    return row.model_copy(update={"error": text}), Cell(None, (row.model, *textwrap.wrap(text, WRAP)[:3]))


def _body(media: str, numbers: Comparison, cells: list[Cell]) -> bytes:
    json = numbers.model_dump_json(indent=2).encode()
    if media == JSON:
        return json
    sheet = write_image(contact_sheet(cells), PNG)
    return sheet if media == PNG else write_zip([("sheet.png", sheet), ("numbers.json", json)])
