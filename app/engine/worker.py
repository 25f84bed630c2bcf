"""One device and its queue: stages the next batch while the one before it runs.

Three threads: one computes, one brings arrays to the device, one weights. Everything else lives on the event loop.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from app.engine import compute
from app.engine.batcher import Batcher, QueueLimits
from app.engine.cache import ModelCache, Resident
from app.engine.devices import on, to_device, torch_device
from app.engine.forecast import Forecaster
from app.engine.jobs import Job, Task
from app.engine.memory import DeviceMemory
from app.engine.planner import PlanAnswer, Planner
from app.engine.planning import TORCH_DTYPES
from app.engine.rate import Rate
from app.engine.runner import Runner, Staged
from app.engine.verdicts import Verdicts
from app.errors import OutOfMemory, Overloaded, Unavailable
from app.metrics import DeviceMetrics, Gauge, Metrics
from app.store.checkpoint import Checkpoint, load_autoencoder
from app.terms import Dtype, Precision
from app.text import reason
from app.vae.autoencoder import Autoencoder

log = logging.getLogger("app.engine")

STALL_SECONDS = 120.0
"""A batch may show no progress for so long, or for ten times its expected time, before liveness turns red."""

MOST_ASKED = 8
"""Questions for a plan that wait at once: each costs the processor about as much as the plan of a new shape does."""

STOP_SECONDS = 10.0
"""A device thread that does not come back for so long after everybody has gone hangs in its driver."""

Load = Callable[[Checkpoint, torch.dtype, torch.device], Autoencoder]


@dataclass(eq=False)
class _Turn:
    """A batch that was taken from the queue, the precisions to try, and its module if that had to be loaded."""

    jobs: list[Job]
    dtypes: tuple[Dtype, ...]
    loading: asyncio.Task[Resident] | None = None
    began: float = field(default_factory=time.monotonic)


class Worker:
    """Owns one device: its threads, queue, cache and memory."""

    def __init__(
        self,
        name: str,
        memory: DeviceMemory,
        *,
        limits: QueueLimits,
        cache_bytes: int | None,
        precision: Precision,
        keep_pages: Callable[[bool], object] | None,
        forecaster: Forecaster,
        verdicts: Verdicts,
        metrics: Metrics,
        load: Load = load_autoencoder,
    ) -> None:
        self.name = name
        self.device = torch_device(name)
        self.memory = memory
        self.rate = Rate()
        self.batcher = Batcher(limits, self.device.type, self.rate, metrics)
        of_device = DeviceMetrics(metrics, name)
        self.cache = ModelCache(self._load, memory, cache_bytes, of_device)
        self._load_module = load
        self._stage_thread = ThreadPoolExecutor(1, thread_name_prefix=f"{name}-stage")
        self._load_thread = ThreadPoolExecutor(1, thread_name_prefix=f"{name}-load")
        self._plan_thread = ThreadPoolExecutor(1, thread_name_prefix=f"{name}-plan")  # of questions, one at a time
        self._asked = 0
        self.planner = Planner(self.device.type, memory, self.cache, forecaster, verdicts, precision)
        self._runner = Runner(
            name,
            self.device,
            self.cache,
            memory,
            self.planner,
            of_device,
            keep_pages if self.device.type == "cpu" else None,
            self._unstage,
        )
        self._cold: _Turn | None = None  # whose model is being loaded
        self._making_way = asyncio.Event()  # for that model: nothing new is staged
        self._staged: Staged | None = None  # behind the running batch
        self._taken = False  # a batch is being staged, or is
        self._quiet = asyncio.Event()  # nothing runs and nothing is taken: no module is in use
        self._quiet.set()
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._serving: asyncio.Task[None] | None = None
        self._running: asyncio.Task[None] | None = None
        self._jobs: list[Job] = []  # of the running batch, or the last one
        self._patience = STALL_SECONDS

    def start(self) -> None:
        """Begins to serve the queue."""
        self._serving = asyncio.create_task(self._serve())
        self._serving.add_done_callback(self._ended)

    async def self_test(self) -> None:
        """A convolution on the device thread; raises what the device raises."""
        await on(self._runner.thread, compute.probe, self.device)

    async def stop(self) -> None:
        """Ends every job that is still here with Unavailable; a running forward stops at its next layer."""
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.wait([self._serving])
        self.batcher.drain(_stopping())
        if self._running is not None and not self._running.done():
            self._runner.fail(self._jobs, _stopping(), "stopped")
            await asyncio.wait([self._running], timeout=STOP_SECONDS)
            if not self._running.done():
                self._runner.lost = "its thread hangs"
        self._runner.thread.shutdown(wait=False, cancel_futures=True)
        for thread in (self._stage_thread, self._load_thread, self._plan_thread):
            thread.shutdown(wait=False, cancel_futures=True)

    @property
    def busy(self) -> bool:
        """Whether a batch is on the device."""
        return self._running is not None and not self._running.done()

    @property
    def working(self) -> bool:
        """Whether the batch on the device is of the first rank."""
        return self.busy and self._jobs[0].task.rank == "work"

    @property
    def lost(self) -> str | None:
        """Why the device is lost, if it is."""
        return self._runner.lost

    @property
    def alive(self) -> bool:
        """False once the context is lost, or when a running batch has shown no progress for too long."""
        stalled = self.busy and time.monotonic() - self._runner.progress > self._patience
        return self.lost is None and not stalled

    async def answer(self, task: Task, shape: tuple[int, ...]) -> PlanAnswer:
        """What would be planned now for one item of `shape`. Raises Overloaded where many ask."""
        if self._asked >= MOST_ASKED:
            raise Overloaded(f"{self._asked} plans are being worked out already", retry_after=1.0)
        free, available = self.cache.free, self.planner.prospect(task)
        self._asked += 1
        try:
            return await on(self._plan_thread, self.planner.answer, self.name, task, shape, free, available)
        finally:
            self._asked -= 1

    async def load(self, checkpoint: Checkpoint, dtype: Dtype) -> None:
        """Makes a model resident. Raises as `ModelCache.acquire`."""
        try:
            resident = await self.cache.acquire(checkpoint, dtype)
        except OutOfMemory:
            await self._runner.look()
            resident = await self.cache.acquire(checkpoint, dtype)
        self.cache.release(resident)

    def gauges(self) -> Iterator[Gauge]:
        """The device's state as Prometheus gauges: (name, help, labels, value)."""
        device = {"device": self.name}
        copies: dict[tuple[str, Dtype], list[Resident]] = {}  # of one precision two: for pictures and for clips
        for resident in self.cache.residents():
            copies.setdefault((resident.checkpoint.name, resident.dtype), []).append(resident)
        for (model, dtype), found in copies.items():
            labels = {"model": model, "dtype": dtype, **device}
            yield "model_resident", "1 for each model on a device.", labels, 1
            yield "model_resident_bytes", "Bytes of its weights.", labels, sum(each.nbytes for each in found)
            yield "model_in_use", "Batches that hold it.", labels, sum(each.in_use for each in found)
        for kind, value in self.memory.kinds(self.cache.taken).items():
            yield "device_memory_bytes", "Memory of a device, by kind.", {**device, "kind": kind}, value
        progress = time.time() - (time.monotonic() - self._runner.progress)
        yield "worker_last_progress_timestamp_seconds", "When the device thread last moved.", device, progress
        yield "worker_up", "0 once the device is lost or stuck.", device, self.alive

    async def _serve(self) -> None:
        while True:
            turn: _Turn | None = None
            try:
                turn = await self._next()
                self._taken = True
                self._quiet.clear()
                if turn.jobs[0].task.rank == "work":
                    self._drop_spare()
                self._runner.check_device()
                self._staged = await self._stage(turn)
                if self._running is not None:
                    await asyncio.wait([self._running])
                staged, self._staged, self._taken = self._staged, None, False
                self._running = asyncio.create_task(self._run(staged, self._begin(staged.jobs)))
                self._running.add_done_callback(self._ended)
            except asyncio.CancelledError:  # between the queue and the device: nobody else knows of these jobs
                for each in (turn, self._cold):
                    self._give_up(each)
                self._unstage()
                raise
            except Exception as error:  # the batch boundary: a load that failed is these jobs' own
                if turn is None:
                    raise
                self._taken = False
                self._note_quiet()
                self.batcher.failed(turn.jobs)
                await self._runner.reject(turn.jobs, error)

    async def _next(self) -> _Turn:
        """The batch whose turn it is. While its model is loaded, batches whose models are there overtake it.

        It is next once its model has come. Where there is no room beside what runs, nothing overtakes it any more.
        """
        while True:
            if self._cold is not None and self._cold.loading is None:  # put back by a batch that overtook it
                self._load_for(self._cold)
            if self._cold is not None and self._cold.loading is not None and self._cold.loading.done():
                cold, self._cold = self._cold, None
                return cold
            taking = asyncio.ensure_future(self.batcher.take(self._may_run))
            waits: set[asyncio.Future[Any]] = {taking}
            if self._cold is not None and self._cold.loading is not None:
                waits.add(self._cold.loading)
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                taking.cancel()  # no-op where it is done
            await asyncio.wait([taking])
            if taking.cancelled():
                continue
            jobs = taking.result()
            task = jobs[0].task
            turn = _Turn(jobs, _begun_in(jobs[0]) or self.planner.order_of_batch(task))
            if self._cold is not None or self.cache.holds(task.checkpoint, turn.dtypes[0]):
                return turn
            self._load_for(turn)
            self._cold = turn

    def _drop_spare(self) -> None:
        """Ends a running batch that is to be dropped when work comes; its forward stops at its next layer."""
        if self.busy and self._jobs[0].task.rank == "spare":
            self._runner.fail(self._jobs, Overloaded("full work came: previews are dropped first", 1.0), "dropped")

    def _load_for(self, turn: _Turn) -> None:
        turn.loading = asyncio.create_task(self._bring(turn.jobs[0].task.checkpoint, turn.dtypes[0]))

    def _may_run(self, task: Task) -> bool:
        """Whether a task may have a turn: while another one's model is loaded, only if its own is there.

        Lower ranks have none while anything is on the device: work that comes meanwhile would wait for them.
        """
        if task.rank != "work" and (self.busy or self._cold is not None):
            return False
        return self._cold is None or (not self._making_way.is_set() and self.cache.holds(task.checkpoint))

    async def _bring(self, checkpoint: Checkpoint, dtype: Dtype) -> Resident:
        """The module of a model that is not there yet."""
        try:
            return await self.cache.acquire(checkpoint, dtype, self._runner.reserved)
        except OutOfMemory:
            pass  # tried again outside of it
        if self._quiet.is_set():
            await self._runner.look()
        if self._quiet.is_set():  # what was in the way may have ended since it was counted
            return await self.cache.acquire(checkpoint, dtype)
        self._making_way.set()  # there may be room once what runs and what is staged has let go
        try:
            await self._quiet.wait()
            await self._runner.look()
            return await self.cache.acquire(checkpoint, dtype)
        finally:
            self._making_way.clear()
            self.batcher.look_again()

    async def _stage(self, turn: _Turn) -> Staged:
        """Takes the module and copies the arrays to the device."""
        jobs = turn.jobs
        if turn.loading is not None:
            resident = turn.loading.result()
        else:
            resident = await self._module(jobs[0].task.checkpoint, turn.dtypes[0])
        loaded = time.monotonic() - turn.began
        try:
            tensors = await on(self._stage_thread, to_device, [job.array for job in jobs], self.device, self._stream)
        except BaseException:
            self.cache.release(resident)
            raise
        for job in jobs:
            job.seconds["load"] = loaded if turn.loading is not None else 0.0
        return Staged(jobs, turn.dtypes, dict(zip(jobs, tensors, strict=True)), resident)

    async def _module(self, checkpoint: Checkpoint, dtype: Dtype) -> Resident:
        """The module of a batch whose model was there when it was taken, and may have been evicted since."""
        while True:
            try:
                return await self.cache.acquire(checkpoint, dtype, self._runner.reserved)
            except OutOfMemory:
                if self._running is not None and self.busy:
                    await asyncio.wait([self._running])
                elif not await self._put_back():
                    break
        await self._runner.look()
        return await self.cache.acquire(checkpoint, dtype)  # nothing is in the way any more: what it raises is true

    async def _put_back(self) -> bool:
        """Lets go of the module that an overtaken batch waits with; it asks for it again. Whether there was one."""
        cold = self._cold
        if cold is None or cold.loading is None or self._making_way.is_set():
            return False
        waiting = asyncio.ensure_future(self._making_way.wait())  # its load may fail, and then waits for this batch
        await asyncio.wait({cold.loading, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if not cold.loading.done():
            return True  # it holds nothing any more
        if cold.loading.cancelled() or cold.loading.exception() is not None:
            return False
        self.cache.release(cold.loading.result())
        cold.loading = None
        return True

    def _give_up(self, turn: _Turn | None) -> None:
        """Ends the jobs of a batch that will not run, and lets go of what it has."""
        if turn is None:
            return
        self._runner.fail(turn.jobs, _stopping(), "stopped")
        if turn.loading is not None and not turn.loading.cancel() and turn.loading.exception() is None:
            self.cache.release(turn.loading.result())

    def _note_quiet(self) -> None:
        if not (self.busy or self._taken):
            self._quiet.set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        """After a batch, and after the loop that serves the queue: neither may die unseen."""
        if task is self._running:
            self._note_quiet()
            self.batcher.look_again()
        if task.cancelled() or (error := task.exception()) is None:
            return
        log.critical("%s serves nothing any more", self.name, exc_info=error)
        self._runner.lost = f"its queue is not served any more: {reason(error)}"
        self._give_up(self._cold)
        if self._staged is not None:
            self._runner.fail(self._staged.jobs, _stopping(), "lost")
            self._unstage()
        self.batcher.drain(_stopping())

    def _unstage(self) -> bool:
        """Gives up the weights that only the staged batch holds, which loads them again; whether there were any."""
        if self._staged is None or self._staged.resident is None:
            return False
        self.cache.release(self._staged.resident)
        self._staged.resident = None
        return True

    def _begin(self, jobs: list[Job]) -> float:
        """Notes a batch that is about to run, before anybody finds the device busy; when it began."""
        self._jobs = jobs
        expected = self.batcher.began(jobs)
        started = self._runner.progress = time.monotonic()
        self._patience = max(STALL_SECONDS, 10 * expected)
        for job in jobs:
            job.seconds["queue"] = max(0.0, started - job.queued - job.seconds["load"])
        return started

    async def _run(self, staged: Staged, started: float) -> None:
        jobs = staged.jobs
        task = jobs[0].task
        await self._runner.run(staged)
        self.batcher.ended()
        if all(job.future.done() and not job.future.cancelled() and not job.future.exception() for job in jobs):
            pixels = sum(job.pixels for job in jobs)
            self.rate.note(task.network, task.op, pixels, time.monotonic() - started)

    async def _load(self, checkpoint: Checkpoint, dtype: Dtype) -> Autoencoder:
        return await on(self._load_thread, self._load_module, checkpoint, TORCH_DTYPES[dtype], self.device)


def _begun_in(job: Job) -> tuple[Dtype, ...] | None:
    """The precision of the clip that a job goes on with: what it carries is of that."""
    return (job.clip.dtype,) if job.clip is not None and job.clip.dtype is not None else None


def _stopping() -> Unavailable:
    return Unavailable("the service is shutting down")
