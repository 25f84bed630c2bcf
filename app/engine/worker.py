"""One device and its queue: stages the next batch while the one before it runs.

Four threads: one computes, one brings arrays to the device and plans their forwards, one brings weights, one plans what
is only asked. Everything else lives on the event loop.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, product
from typing import get_args

import torch

from app.engine import compute
from app.engine.batcher import Batcher, QueueLimits
from app.engine.cache import ModelCache, Resident
from app.engine.devices import on, to_device, torch_device
from app.engine.ends import Ends
from app.engine.forecast import SIDES, Forecaster
from app.engine.jobs import Task
from app.engine.memory import DeviceMemory
from app.engine.planner import PlanAnswer, Planner
from app.engine.planning import TORCH_DTYPES
from app.engine.rate import Rate
from app.engine.runner import Runner, Staged
from app.engine.thread import DeviceThread
from app.engine.turns import Turn, Turns
from app.engine.verdicts import Verdicts
from app.errors import OutOfMemory, Overloaded, Unavailable
from app.metrics import DeviceMetrics, Gauge, Metrics
from app.store.checkpoint import Checkpoint, load_autoencoder
from app.terms import Dtype, Op, Precision
from app.text import reason
from app.vae.autoencoder import Autoencoder
from app.vae.kernels import add_kernels

log = logging.getLogger("app.engine")

STALL_SECONDS = 120.0
"""A batch may show no progress for so long, or for ten times its expected time, before liveness turns red."""

MOST_ASKED = 8
"""Questions for a plan that wait at once: each costs the processor about as much as the plan of a new shape does."""

STOP_SECONDS = 10.0
"""A device thread that does not come back for so long after everybody has gone hangs in its driver."""

Load = Callable[[Checkpoint, torch.dtype, torch.device], Autoencoder]


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
        self.cache = ModelCache(self._load, memory, cache_bytes, of_device, self.device.type)
        self._load_module = load
        self._stage_thread = ThreadPoolExecutor(1, thread_name_prefix=f"{name}-stage")
        self._load_thread = ThreadPoolExecutor(1, thread_name_prefix=f"{name}-load")
        # Plans of questions, and what is counted ahead.
        self._plan_thread = ThreadPoolExecutor(1, thread_name_prefix=f"{name}-plan")
        self._asked = 0
        self.planner = Planner(self.device.type, memory, self.cache, forecaster, verdicts, precision)
        self.thread = DeviceThread(name, self.device, memory, keep_pages if self.device.type == "cpu" else None)
        self._ends = Ends(self.thread, self.planner, of_device)
        self._runner = Runner(
            self.thread,
            self._stage_thread,
            self._ends,
            self.cache,
            memory,
            self.planner,
            of_device,
            self._unstage,
            self._look,
        )
        self._turns = Turns(self.batcher, self.cache, self.planner, self._reserved, self._look)
        self._numbers = count(1)
        self._staged: Staged | None = None  # behind the batch on the device
        self._on_device: Staged | None = None
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._serving: asyncio.Task[None] | None = None
        self._running: asyncio.Task[None] | None = None  # the last batch that was staged, to its end
        self._patience = STALL_SECONDS

    def start(self) -> None:
        """Begins to serve the queue."""
        self._serving = asyncio.create_task(self._serve())
        self._serving.add_done_callback(self._ended)

    async def self_test(self) -> None:
        """A convolution on the device thread; raises what the device raises."""
        await self.thread.call(compute.probe, self.device)

    async def stop(self) -> None:
        """Ends every job that is still here with Unavailable; a running forward stops at its next layer."""
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.wait([self._serving])
        self.batcher.drain(_stopping())
        for batch in self._batches:
            self._ends.fail(batch.jobs, _stopping(), "stopped")
        if self._running is not None and not self._running.done():
            await asyncio.wait([self._running], timeout=STOP_SECONDS)
            if not self._running.done():
                self.thread.lost = "its thread hangs"
        self.thread.shutdown()
        for thread in (self._stage_thread, self._load_thread, self._plan_thread):
            thread.shutdown(wait=False, cancel_futures=True)

    @property
    def busy(self) -> bool:
        """Whether a batch is on the device."""
        return self._on_device is not None

    @property
    def working(self) -> bool:
        """Whether the batch on the device is of the first rank."""
        return self._on_device is not None and self._on_device.jobs[0].task.rank == "work"

    @property
    def lost(self) -> str | None:
        """Why the device is lost, if it is."""
        return self.thread.lost

    @property
    def alive(self) -> bool:
        """False once the context is lost, or when a running batch has shown no progress for too long."""
        stalled = self.busy and time.monotonic() - self.thread.progress > self._patience
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
            await self._look()
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
            yield "model_resident_bytes", "Bytes it takes there.", labels, sum(each.nbytes for each in found)
            yield "model_in_use", "Batches that hold it.", labels, sum(each.in_use for each in found)
        for kind, value in self.memory.kinds(self.cache.taken).items():
            yield "device_memory_bytes", "Memory of a device, by kind.", {**device, "kind": kind}, value
        progress = time.time() - (time.monotonic() - self.thread.progress)
        yield "worker_last_progress_timestamp_seconds", "When the device thread last moved.", device, progress
        yield "worker_up", "0 once the device is lost or stuck.", device, self.alive

    @property
    def _batches(self) -> list[Staged]:
        """On the device, and staged behind."""
        return [batch for batch in (self._on_device, self._staged) if batch is not None]

    def _reserved(self) -> int:
        """Forecast bytes of what runs, or of what may run next without a word: one at a time."""
        return max((batch.reserved for batch in self._batches), default=0)

    async def _serve(self) -> None:
        while True:
            turn: Turn | None = None
            try:
                turn = await self._turns.next()
                if turn.jobs[0].task.rank == "work":
                    self._drop_spare()
                self.thread.check()
                self._staged = await self._stage(turn)
            except asyncio.CancelledError:  # between the queue and the device: nobody else knows of these jobs
                for each in (turn, self._turns.cold):
                    self._give_up(each)
                raise
            except Exception as error:  # the batch boundary: a load that failed is these jobs' own
                if turn is None:
                    raise
                self.batcher.failed(turn.jobs)
                self._turns.ended()
                await self._ends.reject(turn.jobs, error)
                continue
            before = self._running
            self._running = asyncio.create_task(self._run(self._staged, before))
            self._running.add_done_callback(self._ended)
            if before is not None:
                await asyncio.wait([before])

    def _drop_spare(self) -> None:
        """Ends a running batch that is to be dropped when work comes; its forward stops at its next layer."""
        if self._on_device is not None and self._on_device.jobs[0].task.rank == "spare":
            error = Overloaded("full work came: previews are dropped first", 1.0)
            self._ends.fail(self._on_device.jobs, error, "dropped")

    async def _stage(self, turn: Turn) -> Staged:
        """Takes the module, copies the arrays to the device, and sends the first forward ahead where it can be."""
        jobs = turn.jobs
        resident = await self._turns.module(turn)
        loaded = time.monotonic() - turn.began
        try:
            tensors = await on(self._stage_thread, to_device, [job.array for job in jobs], self.device, self._stream)
            for job in jobs:
                job.seconds["load"] = loaded if turn.loading is not None else 0.0
            inputs = dict(zip(jobs, tensors, strict=True))
            staged = Staged(next(self._numbers), jobs, turn.dtypes, inputs, resident)
            await self._runner.send_ahead(staged)
        except BaseException:
            self.cache.release(resident)
            raise
        return staged

    def _give_up(self, turn: Turn | None) -> None:
        """Ends the jobs of a batch that will not run, and lets go of what it has."""
        if turn is not None:
            self._ends.fail(turn.jobs, _stopping(), "stopped")
            self._turns.let_go(turn)

    async def _unstage(self) -> bool:
        """Gives up the weights that only the staged batch holds, which loads them again; whether there were any."""
        staged = self._staged
        if staged is None:
            return False
        if staged.first is not None:
            await asyncio.wait([staged.first.done])  # at once: the batch that asks has something left to do
        return self._runner.release(staged)

    async def _run(self, staged: Staged, before: asyncio.Task[None] | None) -> None:
        """A batch from its turn to its end."""
        if before is not None:
            await asyncio.wait([before])
        self._on_device, self._staged = staged, None
        expected = self.batcher.began(staged.jobs)
        self.thread.progress = time.monotonic()
        self._patience = max(STALL_SECONDS, 10 * expected)
        try:
            await self._runner.run(staged)
        finally:
            self._on_device = None
            self.batcher.ended()
            self._turns.ended()
        jobs = staged.jobs
        if all(job.future.done() and not job.future.cancelled() and not job.future.exception() for job in jobs):
            task, pixels = jobs[0].task, sum(job.pixels for job in jobs)
            self.rate.note(task.network, task.op, pixels, staged.seconds)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """After a batch, and after the loop that serves the queue: neither may die unseen."""
        if task.cancelled() or (error := task.exception()) is None:
            return
        log.critical("%s serves nothing any more", self.name, exc_info=error)
        self.thread.lost = f"its queue is not served any more: {reason(error)}"
        self._give_up(self._turns.cold)
        if self._staged is not None:
            self._ends.fail(self._staged.jobs, _stopping(), "lost")
        self.batcher.drain(_stopping())

    async def _look(self) -> None:
        """Sees how the device is now: another process may have let go of memory since the last forward."""
        level = await self.thread.call(self.memory.look)
        if not self.cache.loading:
            self.memory.note(level, self.cache.taken)

    async def _load(self, checkpoint: Checkpoint, dtype: Dtype) -> Autoencoder:
        module = await on(self._load_thread, self._loaded, checkpoint, dtype)
        for op, side in product(get_args(Op), SIDES):  # so that no request has to wait for it
            self._plan_thread.submit(self.planner.prepare, checkpoint, dtype, op, side)
        return module

    def _loaded(self, checkpoint: Checkpoint, dtype: Dtype) -> Autoencoder:
        """On the load thread: the module, with its kernels where the cache has them in its sums."""
        module = self._load_module(checkpoint, TORCH_DTYPES[dtype], self.device)
        if self.cache.kernels.nbytes(checkpoint, dtype):
            add_kernels(module)
        return module


def _stopping() -> Unavailable:
    return Unavailable("the service is shutting down")
