"""What an encode and a decode are, whatever dialect asks for them: room for shapes, reading in threads, running."""

import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from fastapi import Request

from app.api.context import Context
from app.api.door.body import while_connected
from app.engine.batcher import Admission
from app.engine.jobs import Prepare, Result, Task, Work
from app.metrics import Metrics
from app.store.checkpoint import Checkpoint
from app.wire.arrays.latents import LatentShape
from app.wire.images import Colour

Size = tuple[int, int]
"""(width, height) in pixels."""


@dataclass
class Clock:
    """Milliseconds of each stage of one request, for Server-Timing."""

    op: str
    metrics: Metrics
    spans: list[tuple[str, float, float]]  # name, start, end on time.perf_counter(), for whoever traces the request
    stages: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("read", "queue", "load", "compute", "write"), 0.0)
    )

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time of its block to a stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._add(name, started, time.perf_counter())

    def add(self, results: Sequence[Result]) -> None:
        """The engine's stages, which end now: those of the item that took longest."""
        end = time.perf_counter()
        for stage in ("compute", "load", "queue"):
            start = end - max(result.seconds.get(stage, 0.0) for result in results)
            self._add(stage, start, end)
            end = start

    def _add(self, name: str, start: float, end: float) -> None:
        self.stages[name] += (end - start) * 1000
        self.spans.append((name, start, end))

    def finish(self) -> str:
        """The value of Server-Timing; the metrics get the same."""
        for stage, ms in self.stages.items():
            self.metrics.stage_seconds.labels(self.op, stage).observe(ms / 1000)
        return ", ".join(f"{stage};dur={ms:.1f}" for stage, ms in self.stages.items())


@dataclass(frozen=True)
class Given:
    """The arrays of a request, and what looks wrong with them, in one line."""

    arrays: Sequence[np.ndarray]
    warning: str | None = None


Read = Callable[[], Awaitable[Given]]
"""Decodes in threads what a request brought; called once there is room for it."""


@dataclass(frozen=True)
class Done:
    """What came of a request's arrays, and the task that they were."""

    task: Task
    results: list[Result]
    warning: str | None


def encoding(task: Task, sizes: Sequence[Size], read: Read, clock: Clock) -> Work[Done]:
    """Pictures of these sizes, fitted to the model, to latents."""
    return _work(task, [picture_shape(size, task) for size in sizes], read, clock)


def decoding(task: Task, shape: LatentShape, read: Read, clock: Clock) -> Work[Done]:
    """Latents to pictures."""
    return _work(task, shape.shapes, read, clock)


def picture_shape(size: Size, task: Task) -> tuple[int, int, int]:
    """Of the array of a picture."""
    return size[1], size[0], task.checkpoint.config.pixel_channels


def behind(background: Colour, checkpoint: Checkpoint) -> Colour | None:
    """What pictures are laid over for a model: nothing where it takes their alpha."""
    return None if checkpoint.config.pixel_channels == 4 else background


def latent_shape_of(size: Size, task: Task) -> tuple[int, int, int]:
    """Of the latent that a picture of this size, a multiple of the family's, has."""
    family, side = task.checkpoint.family, task.checkpoint.family.side(task.latents)
    return family.channels(task.latents), size[1] // side, size[0] // side


def picture_size(shape: tuple[int, int, int], task: Task) -> Size:
    """Of the picture that a latent (C, h, w) decodes to, in pixels."""
    side = task.checkpoint.family.side(task.latents)
    return shape[2] * side, shape[1] * side


def writing(arrays: Sequence[np.ndarray], media: str = "") -> int:
    """Bytes of memory that writing these into a file takes: a batch of them, rows made ready, the file, its copy.

    AVIF's encoder takes 330 MB for a picture of 50.
    """
    return (8 if media == "image/avif" else 4) * sum(array.nbytes for array in arrays)


async def resolved(request: Request, model: str | None, shared: Context) -> Checkpoint:
    """The checkpoint of a name, a hash prefix or None, noted for the log and the metrics."""
    checkpoint = await shared.engine.resolve(model)
    request.state.model = checkpoint.name
    return checkpoint


async def finished(
    request: Request,
    checkpoint: Checkpoint,
    model: str | None,
    prepare: Prepare[Done],
    deadline: float | None,
    shared: Context,
) -> Done:
    """The work, for as long as its client waits. The body must be read."""
    started = time.perf_counter()
    async with shared.engine.request(checkpoint, model, prepare, deadline, request.state.request_id) as run:
        request.state.stages.append(("admission", started, time.perf_counter()))
        done = await while_connected(request, run())
    request.state.model = done.task.checkpoint.name
    return done


def _work(task: Task, shapes: Sequence[tuple[int, ...]], read: Read, clock: Clock) -> Work[Done]:
    async def do(admission: Admission) -> Done:
        with clock.stage("read"):
            given = await read()
        results = await admission.run(given.arrays)
        clock.add(results)
        doubts = [line for line in (task.checkpoint.doubt, given.warning) if line]
        return Done(task, results, "; ".join(doubts) or None)

    return Work([(task, shapes)], do)
