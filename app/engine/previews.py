"""Cheap pictures of latents: by a tiny autoencoder of the same latent space, or by a linear map that is fitted here.

What is fitted or measured is so in the background, by jobs of the engine that everything else goes before.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np

from app.engine.engine import Engine
from app.engine.jobs import Result, Task
from app.engine.linear import SIDE, decibel, fit
from app.errors import Overloaded, ServiceError
from app.store.checkpoint import Checkpoint
from app.store.linear import Key, Linear, LinearMaps, key_of
from app.terms import Convention, Op
from app.vae.families import shows

log = logging.getLogger("app.engine")

MOST = 8
"""Previews at once; the others are refused: a later one is on its way anyhow."""

RATE = 20.0
"""Previews a second, while work runs on a CPU: they take of the same cores."""

PATIENCE_SECONDS = 10.0
"""A tiny preview that is not made so soon is dropped."""

Pictures = Callable[[int], Sequence[np.ndarray]]
"""Some pictures of this side, uint8 (side, side, 3), to fit maps to. Blocking."""


class Previews:
    """Belongs to the event loop; whoever makes it starts it once the engine runs, and closes it."""

    def __init__(self, engine: Engine, pictures: Pictures) -> None:
        self._engine = engine
        self._pictures = pictures
        self._maps = LinearMaps(engine.store.folders)
        self._errors: dict[tuple[str, str], float] = {}  # dB, by the sha256 of a full model and of its tiny one
        self._work: dict[object, asyncio.Task[None]] = {}  # by what is being fitted or measured
        self._one = asyncio.Lock()  # at a time
        self._running = 0
        self._next = 0.0  # when RATE has the next one, on time.monotonic()

    async def start(self) -> None:
        """Reads what was fitted before."""
        await asyncio.to_thread(self._maps.load)

    async def close(self) -> None:
        """Ends what is being fitted."""
        for work in self._work.values():
            work.cancel()
        await asyncio.gather(*self._work.values(), return_exceptions=True)

    def check_room(self) -> None:
        """Raises Overloaded where there is no place for one more now."""
        if self._running >= MOST:
            raise self.refused(f"{self._running} previews are being made already")
        if self._beside_cpu_work and self._next - time.monotonic() > MOST / RATE:
            raise self.refused(f"{RATE:g} a second are made beside work on a CPU")

    @contextmanager
    def entered(self) -> Iterator[None]:
        """One of the previews at once. Raises Overloaded."""
        self.check_room()
        if self._beside_cpu_work:
            self._next = max(self._next, time.monotonic()) + 1 / RATE
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    @property
    def _beside_cpu_work(self) -> bool:
        return any(worker.working for worker in self._engine.workers if worker.device.type == "cpu")

    @property
    def beside_work(self) -> bool:
        """Whether a tiny preview would wait for work, and perhaps for ever."""
        return any(worker.working for worker in self._engine.workers)

    def refused(self, why: str) -> Overloaded:
        """The error of a preview that is dropped, counted."""
        self._engine.metrics.rejected.labels("preview").inc()
        return Overloaded(f"{why}: previews are dropped first", retry_after=1.0)

    def tiny(self, checkpoint: Checkpoint, latents: Convention) -> Checkpoint | None:
        """The tiny autoencoder in the folder for this model's latents, the first by name; itself if it is one."""
        if shows(checkpoint.family, checkpoint.family):
            return checkpoint
        usable = (entry for entry in self._engine.store.entries() if isinstance(entry, Checkpoint))
        found = (entry for entry in usable if shows(entry.family, checkpoint.family))
        return next(found, None) if latents == "scaled" else None

    def linear(self, checkpoint: Checkpoint, latents: Convention) -> Linear | None:
        """The model's map; None where there is none yet: it is being fitted from now on."""
        key = key_of(checkpoint, latents)
        found = self._maps.get(key)
        if found is None:
            self._begin(key, partial(self._fit, checkpoint, latents, key))
        return found

    def psnr_db(self, checkpoint: Checkpoint, tiny: Checkpoint) -> float | None:
        """How near a tiny autoencoder comes to the full one; None where that is being measured, and for itself."""
        if checkpoint == tiny:
            return None
        key = (checkpoint.sha256, tiny.sha256)
        if key not in self._errors:
            self._begin(key, partial(self._measure, checkpoint, tiny, key))
        return self._errors.get(key)

    def _begin(self, key: object, work: Callable[[], Awaitable[None]]) -> None:
        if key in self._work or self._engine.draining:
            return
        task = self._work[key] = asyncio.create_task(self._alone(work))
        task.add_done_callback(lambda done: self._ended(key, done))

    async def _alone(self, work: Callable[[], Awaitable[None]]) -> None:
        async with self._one:
            await work()

    def _ended(self, key: object, task: asyncio.Task[None]) -> None:
        del self._work[key]
        if task.cancelled() or (error := task.exception()) is None:
            return
        if isinstance(error, ServiceError):
            log.warning("a preview's map was not fitted, the next preview tries again: %s", error)
        else:
            log.error("a bug met in fitting a preview's map", exc_info=error)

    async def _fit(self, checkpoint: Checkpoint, latents: Convention, key: Key) -> None:
        encoded, decoded = await self._samples(checkpoint, latents)
        patch = checkpoint.family.latent_format.patch if latents == "scaled" else 1
        found = await asyncio.to_thread(fit, encoded, decoded, patch)
        await asyncio.to_thread(self._maps.put, key, found, self._maps.folder_of(checkpoint.path))
        log.info("fitted the linear preview of %s: %.1f dB", checkpoint.name, found.psnr_db)

    async def _measure(self, checkpoint: Checkpoint, tiny: Checkpoint, key: tuple[str, str]) -> None:
        encoded, full = await self._samples(checkpoint, "scaled")
        shown = await self._run("decode", tiny, "scaled", encoded)
        pairs = zip(full, shown, strict=True)
        squares = [np.square((one[..., :3].astype(np.float32) - other[..., :3]) / 255).mean() for one, other in pairs]
        self._errors[key] = decibel(float(np.mean(squares)))

    async def _samples(self, checkpoint: Checkpoint, latents: Convention) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Latents of the pictures, and what the model decodes them to."""
        alpha = checkpoint.config.pixel_channels - 3
        opaque = ((0, 0), (0, 0), (0, alpha))
        found = await asyncio.to_thread(self._pictures, SIDE)
        pictures = [np.pad(picture, opaque, constant_values=255) for picture in found]
        encoded = await self._run("encode", checkpoint, latents, pictures)
        return encoded, await self._run("decode", checkpoint, latents, encoded)

    async def _run(
        self, op: Op, checkpoint: Checkpoint, latents: Convention, arrays: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """One job at a time: a full one that comes waits for no more than one of them."""
        task = Task(op, checkpoint, latents, numbers="float32", rank="later")
        found: list[Result] = []
        for array in arrays:
            async with self._engine.admit(task, [array.shape], None, "preview") as admission:
                found += await admission.run([array])
        return [each.array for each in found]
