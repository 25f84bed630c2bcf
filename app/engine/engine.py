"""The engine: a store of checkpoints, some devices, and the way of a request between them."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import numpy as np
from prometheus_client import CollectorRegistry

from app.engine.batcher import Admission, QueueLimits
from app.engine.devices import device_names, torch_device
from app.engine.forecast import Forecaster
from app.engine.jobs import Prepare, Result, Shape, Task, Work, check_shape, picture_pixels
from app.engine.memory import memory_of
from app.engine.planner import PlanAnswer
from app.engine.planning import dtypes
from app.engine.verdicts import Verdicts
from app.engine.worker import Load, Worker
from app.errors import ServiceError, Unavailable
from app.metrics import Metrics
from app.store.checkpoint import Checkpoint, CheckpointChanged, load_autoencoder
from app.store.follow import FIRST_SECONDS, Follower
from app.store.names import Entry
from app.store.store import ModelStore
from app.terms import Fp16, Precision

LOAD_SECONDS = 0.5
"""What bringing a model to a device is taken to cost when devices are compared: a 335 MB file from the page cache."""

REPLACED_SECONDS = 60.0
"""A request whose model is being replaced waits so long for the new file to be whole."""

RUNS = 4
"""Of one request at most: a file that is replaced faster than it can be read is somebody's mistake."""

T = TypeVar("T")


@dataclass(frozen=True)
class EngineOptions:
    """What the operator decided, as plain values."""

    devices: tuple[str, ...] = ("auto",)
    limits: QueueLimits = field(default_factory=QueueLimits)
    default_model: str | None = None
    cache_bytes: int | None = None
    memory_limit_bytes: int | None = None
    precision: Precision = "auto"
    keep_pages: Callable[[bool], object] | None = None
    """Told before a forward on a CPU whether freed pages may stay: `allocator.Heap.keep`, where the process is ours."""


@dataclass(frozen=True)
class Residency:
    """One copy of a model on one device."""

    device: str
    dtype: str
    bytes: int
    in_use: int
    pinned: bool


class Engine:
    """`async with` starts the devices and ends them. All methods belong to the event loop."""

    def __init__(
        self,
        options: EngineOptions,
        store: ModelStore,
        metrics: Metrics | None = None,
        load: Load = load_autoencoder,
    ) -> None:
        metrics = metrics or Metrics(CollectorRegistry())
        self.options = options
        self.store = store
        self.folder = Follower(store)
        self.metrics = metrics
        self.draining = False
        self.self_tested = False
        self._named: set[str] = set()  # models that the metrics may know
        self.open_requests = 0  # admitted requests that have not ended
        self._idle = asyncio.Event()
        self._idle.set()
        verdicts = Verdicts()
        self._verdicts = verdicts
        names = device_names(options.devices)
        forecasters = {kind: Forecaster(kind) for kind in {torch_device(name).type for name in names}}
        hosts = sum(torch_device(name).type == "cpu" for name in names)
        self.workers = [
            Worker(
                name,
                memory_of(torch_device(name), options.memory_limit_bytes, hosts),
                limits=options.limits,
                cache_bytes=options.cache_bytes,
                precision=options.precision,
                keep_pages=options.keep_pages,
                forecaster=forecasters[torch_device(name).type],
                verdicts=verdicts,
                metrics=metrics,
                load=load,
            )
            for name in names
        ]

    async def __aenter__(self) -> Self:
        for worker in self.workers:
            worker.start()
        await asyncio.gather(*(worker.self_test() for worker in self.workers))
        self.self_tested = True
        self.folder.start()
        await self.folder.first_scan(FIRST_SECONDS)  # a large folder is read while the service serves
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(self._stop(), self.folder.stop())

    async def drain(self, seconds: float) -> None:
        """Admits nothing more and waits until every admitted request has its end; after so long it makes one."""
        self.draining = True
        await self.folder.stop()
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            await self._stop()

    # -- models -----------------------------------------------------------------------------------------------------

    async def first_scan(self) -> None:
        """Waits until every file that lay in the folder at the start has been read."""
        await self.folder.first_scan()

    async def resolve(self, model: str | None) -> Checkpoint:
        """The checkpoint of a name, a hash prefix or None (the default, or the only one)."""
        return await self.folder.find(model, self.options.default_model)

    def meant(self, model: str | None = None) -> Checkpoint | None:
        """What `resolve` finds among the models that have been read, without a look at the folder; None: nothing."""
        try:
            return self.store.resolve(model, self.options.default_model)
        except ServiceError:
            return None

    async def entries(self) -> list[Entry]:
        """All models of the folder as it is now, unreadable ones included."""
        return await self.folder.entries()

    async def replaced(self, checkpoint: Checkpoint, deadline: float | None) -> None:
        """Waits until the folder lists something else for a checkpoint whose file has changed, or nothing."""
        left = REPLACED_SECONDS if deadline is None else min(REPLACED_SECONDS, deadline - time.monotonic())
        await self.folder.replaced(checkpoint, max(0.0, left))

    def residencies(self, sha256: str) -> list[Residency]:
        """Where a checkpoint is resident."""
        return [
            Residency(worker.name, resident.dtype, resident.nbytes, resident.in_use, worker.cache.pinned(sha256))
            for worker in self.workers
            for resident in worker.cache.residents()
            if resident.checkpoint.sha256 == sha256
        ]

    def fp16(self, checkpoint: Checkpoint) -> Fp16:
        """What is known of the checkpoint in half precision, runs of this process included."""
        return self._verdicts.of(checkpoint)

    def forget_gone(self) -> None:
        """Drops the metrics of models that the folder no longer has: names come and go, and labels would only come."""
        names = {entry.name for entry in self.store.entries()}
        for name in self._named - names:
            self.metrics.forget(name)
        self._named = names

    def forget_overflow(self, checkpoint: Checkpoint) -> None:
        """Lets a checkpoint begin in fp16 again, whatever this process saw of it there."""
        self._verdicts.forget(checkpoint)

    async def load(self, checkpoint: Checkpoint, precision: Precision) -> None:
        """Makes a checkpoint resident on every device, in the first precision that a request would get."""
        for worker in self.workers:
            dtype = dtypes(precision, self.options.precision, worker.device.type, self.fp16(checkpoint))[0]
            await worker.load(checkpoint, dtype)

    def awaited(self, checkpoint: Checkpoint) -> bool:
        """Whether queued jobs are for a model of this name."""
        return any(name == checkpoint.name for worker in self.workers for name, _ in worker.batcher.depths())

    def unload(self, checkpoint: Checkpoint) -> int:
        """Evicts a checkpoint everywhere; bytes freed. Raises ModelBusy when it is pinned or in use."""
        return sum(worker.cache.unload(checkpoint.sha256) for worker in self.workers)

    def pin(self, checkpoint: Checkpoint, pinned: bool) -> None:
        """Keeps a checkpoint from eviction on every device, or no longer."""
        for worker in self.workers:
            (worker.cache.pin if pinned else worker.cache.unpin)(checkpoint.sha256)

    # -- requests ---------------------------------------------------------------------------------------------------

    async def run(
        self,
        model: str | None,
        task: Callable[[Checkpoint], Task],
        arrays: Sequence[np.ndarray],
        deadline: float | None = None,
    ) -> list[Result]:
        """Runs arrays through the model of a name: `run("sdxl", partial(Task, "decode"), [latent])`.

        Pictures are (H, W, 3), or 4 where the model has alpha: uint8, or float32 with black at -1 and white at 1.
        Latents are float16 or float32 (C, h, w). `deadline` is on time.monotonic(). Raises as `resolve`, `admit` and
        the forward do; see `app.errors`.
        """
        shapes = [array.shape for array in arrays]

        def prepare(checkpoint: Checkpoint) -> Work[list[Result]]:
            return Work([(task(checkpoint), shapes)], lambda admission: admission.run(arrays))

        async with self.request(await self.resolve(model), model, prepare, deadline) as work:
            return await work()

    @asynccontextmanager
    async def request(
        self,
        checkpoint: Checkpoint,
        model: str | None,
        prepare: Prepare[T],
        deadline: float | None,
        origin: str = "",
    ) -> AsyncIterator[Callable[[], Coroutine[Any, Any, T]]]:
        """Room for a request's work on a checkpoint, and what does it; `origin` is who asks, for the log.

        Where the file is replaced before its weights are loaded, the work is prepared and admitted anew for what
        `model` means then; a device that holds the old weights serves with them. Raises as `admit` and `resolve`.
        """
        async with AsyncExitStack() as room:
            do = await self._admitted(room, prepare(checkpoint), deadline, origin)

            async def run() -> T:
                nonlocal do, checkpoint
                for _ in range(RUNS - 1):
                    try:
                        return await do()
                    except CheckpointChanged:
                        await self.replaced(checkpoint, deadline)
                        checkpoint = await self.resolve(model)
                        await room.aclose()  # first: a queue that just held this request has no more than its room
                        do = await self._admitted(room, prepare(checkpoint), deadline, origin)
                return await do()

            yield run

    async def _admitted(
        self, room: AsyncExitStack, work: Work[T], deadline: float | None, origin: str
    ) -> Callable[[], Awaitable[T]]:
        parts = [self.admit(task, shapes, deadline, origin) for task, shapes in work.parts]
        admissions = [await room.enter_async_context(part) for part in parts]
        return lambda: work.do(*admissions)

    def check_open(self, checkpoint: Checkpoint) -> None:
        """Refuses now what `admit` would refuse whatever its shapes: asked before a body is read."""
        self._check_draining()
        self._worker_for(checkpoint).batcher.check_room()

    def _check_draining(self) -> None:
        if self.draining:
            self.metrics.rejected.labels("draining").inc()
            raise Unavailable("the service is shutting down")

    @asynccontextmanager
    async def admit(
        self, task: Task, shapes: Sequence[Shape], deadline: float | None, origin: str = ""
    ) -> AsyncIterator[Admission]:
        """Room for a task's arrays, before any of them is decoded.

        Raises Unavailable while draining, Overloaded when the queue is full or the deadline cannot be met, and
        InvalidLatent or InvalidImage when the shapes do not fit the model.
        """
        self._check_draining()
        for shape in shapes:
            check_shape(task, shape)
        pixels = sum(picture_pixels(task, shape) for shape in shapes)
        worker = self._worker_for(task.checkpoint)
        network, op = task.network, task.op
        known = task.rank == "work" and worker.rate.knows(network, op)
        seconds = worker.rate.seconds(network, op, pixels) if known else 0.0
        ticket = worker.batcher.admit(len(shapes), pixels, deadline, seconds)
        admission = Admission(worker.batcher, ticket, task, deadline, origin)
        self.open_requests += 1
        self._idle.clear()
        try:
            yield admission
        finally:
            admission.close()
            self.open_requests -= 1
            if not self.open_requests:
                self._idle.set()

    async def plan(self, task: Task, shape: tuple[int, ...]) -> PlanAnswer:
        """What the device that would get such a job would do with it now."""
        check_shape(task, shape)
        worker = self._worker_for(task.checkpoint)
        return await worker.answer(task, shape)

    def _worker_for(self, checkpoint: Checkpoint) -> Worker:
        """The device that would come to the job first; one that must load the model comes later."""
        working = [worker for worker in self.workers if worker.lost is None]
        if not working:
            raise Unavailable("every device is lost")

        def begin(worker: Worker) -> tuple[float, bool, int]:
            resident = worker.cache.holds(checkpoint)
            load = 0.0 if resident else LOAD_SECONDS
            return (worker.batcher.wait_seconds() + load, not resident, worker.batcher.items)

        return min(working, key=begin)

    # -- state ------------------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """False when a device is lost or its thread is stuck."""
        return all(worker.alive for worker in self.workers)

    @property
    def lost(self) -> str | None:
        """Why a device is lost, if one is."""
        return next((worker.lost for worker in self.workers if worker.lost is not None), None)

    @property
    def scanned(self) -> bool:
        """Whether every file that lay in the folder at the start has been read."""
        return self.folder.scanned

    @property
    def default_found(self) -> bool:
        """Whether the default model, where one is configured, is there and usable."""
        return self.options.default_model is None or self.meant() is not None

    @property
    def ready(self) -> bool:
        """Scanned, tested, not draining and with every device working; overload does not matter."""
        return self.scanned and self.self_tested and not self.draining and self.lost is None

    async def _stop(self) -> None:
        await asyncio.gather(*(worker.stop() for worker in self.workers))
