"""One device and its queue: stages the next batch while the one before it runs.

Two threads: one computes, one brings weights and arrays to the device. Everything else lives on the event loop.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from app.engine import compute
from app.engine.batcher import Batcher, QueueLimits, Rate
from app.engine.cache import ModelCache
from app.engine.forecast import Forecaster
from app.engine.jobs import Job, Task
from app.engine.memory import DeviceMemory
from app.engine.planner import PlanAnswer, Planner, Verdicts
from app.engine.planning import TORCH_DTYPES
from app.engine.runner import Runner, Staged, on
from app.errors import OutOfMemory, Unavailable
from app.metrics import DeviceMetrics, Gauge, Metrics
from app.store.checkpoint import Autoencoder, Checkpoint, load_autoencoder
from app.terms import Dtype, Precision

STALL_SECONDS = 120.0
"""A batch may show no progress for so long, or for ten times its expected time, before liveness turns red."""

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
        self.batcher = Batcher(limits, self.rate, metrics)
        of_device = DeviceMetrics(metrics, name)
        self.cache = ModelCache(self._load, memory, cache_bytes, of_device)
        self._load_module = load
        self._stage_thread = ThreadPoolExecutor(1, thread_name_prefix=f"{name}-stage")
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
        self._staged: Staged | None = None  # behind the running batch
        self._serving: asyncio.Task[None] | None = None
        self._running: asyncio.Task[None] | None = None
        self._jobs: list[Job] = []  # of the running batch, or the last one
        self._patience = STALL_SECONDS

    def start(self) -> None:
        """Begins to serve the queue."""
        self._serving = asyncio.create_task(self._serve())

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
        self._stage_thread.shutdown(wait=False, cancel_futures=True)

    @property
    def busy(self) -> bool:
        """Whether a batch is on the device."""
        return self._running is not None and not self._running.done()

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
        """What would be planned now for one item of `shape`."""
        free, available = self.cache.free, self.planner.prospect(task)
        return await asyncio.to_thread(self.planner.answer, self.name, task, shape, free, available)

    def gauges(self) -> Iterator[Gauge]:
        """The device's state as Prometheus gauges: (name, help, labels, value)."""
        device = {"device": self.name}
        for resident in self.cache.residents():
            labels = {"model": resident.checkpoint.name, "dtype": resident.dtype, **device}
            yield "model_resident", "1 for each model on a device.", labels, 1
            yield "model_resident_bytes", "Bytes of its weights.", labels, resident.nbytes
            yield "model_in_use", "Batches that hold it.", labels, resident.in_use
        for kind, value in self.memory.kinds(self.cache.nbytes).items():
            yield "device_memory_bytes", "Memory of a device, by kind.", {**device, "kind": kind}, value
        progress = time.time() - (time.monotonic() - self._runner.progress)
        yield "worker_last_progress_timestamp_seconds", "When the device thread last moved.", device, progress
        yield "worker_up", "0 once the device is lost or stuck.", device, self.alive

    async def _serve(self) -> None:
        while True:
            jobs = await self.batcher.take()
            try:
                self._runner.check_device()
                self._staged = await self._stage(jobs)
                if self._running is not None:
                    await asyncio.wait([self._running])
                staged, self._staged = self._staged, None
                self._running = asyncio.create_task(self._run(staged))
            except asyncio.CancelledError:  # between the queue and the device: nobody else knows of these jobs
                self._runner.fail(jobs, _stopping(), "stopped")
                self._unstage()
                raise
            except Exception as error:  # noqa: BLE001  the batch boundary: a load that failed is these jobs' own
                self.batcher.failed()
                await self._runner.reject(jobs, error)

    async def _stage(self, jobs: list[Job]) -> Staged:
        """Makes the model resident and copies the arrays to the device."""
        task = jobs[0].task
        dtypes = self.planner.order(task)
        started = time.monotonic()
        try:
            resident = await self.cache.acquire(task.checkpoint, dtypes[0], self._runner.reserved)
        except OutOfMemory:
            if self._running is None or self._running.done():
                raise
            await asyncio.wait([self._running])  # there may be room once the running batch has let go
            resident = await self.cache.acquire(task.checkpoint, dtypes[0])
        loaded = time.monotonic() - started
        try:
            tensors = await on(self._stage_thread, _to_device, [job.array for job in jobs], self.device)
        except BaseException:
            self.cache.release(resident)
            raise
        for job in jobs:
            job.seconds["load"] = loaded
        return Staged(jobs, dtypes, dict(zip(jobs, tensors, strict=True)), resident)

    def _unstage(self) -> bool:
        """Gives up the weights that only the staged batch holds, which loads them again; whether there were any."""
        if self._staged is None or self._staged.resident is None:
            return False
        self.cache.release(self._staged.resident)
        self._staged.resident = None
        return True

    async def _run(self, staged: Staged) -> None:
        jobs = staged.jobs
        task = jobs[0].task
        self._jobs = jobs
        expected = self.rate.of(jobs)
        started = self._runner.progress = time.monotonic()
        self._patience = max(STALL_SECONDS, 10 * expected)
        self.batcher.began(expected)
        for job in jobs:
            job.seconds["queue"] = max(0.0, started - job.queued - job.seconds["load"])
        await self._runner.run(staged)
        self.batcher.ended()
        if all(job.future.done() and not job.future.cancelled() and not job.future.exception() for job in jobs):
            pixels = sum(job.pixels for job in jobs)
            self.rate.note(task.checkpoint.sha256, task.op, pixels, time.monotonic() - started)

    async def _load(self, checkpoint: Checkpoint, dtype: Dtype) -> Autoencoder:
        return await on(self._stage_thread, self._load_module, checkpoint, TORCH_DTYPES[dtype], self.device)


def _stopping() -> Unavailable:
    return Unavailable("the service is shutting down")


def torch_device(name: str) -> torch.device:
    """The torch device of a worker's name; cpu:0, cpu:1 ... are all the one CPU."""
    return torch.device("cpu" if name.startswith("cpu") else name)


def device_names(devices: Sequence[str]) -> list[str]:
    """One name per device: several "cpu" become cpu:0, cpu:1, so that each has its own worker and label."""
    if list(devices) == ["auto"]:
        devices = ["cuda:0" if torch.cuda.is_available() else "cpu"]
    counts: dict[str, int] = {}
    names = []
    for device in devices:
        name = "cuda:0" if device == "cuda" else device
        if list(devices).count("cpu") > 1 and name == "cpu":
            counts[name] = counts.get(name, 0) + 1
            name = f"cpu:{counts[name] - 1}"
        names.append(name)
    return names


def _to_device(arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """Copies host arrays to the device, on a stream of their own so that a running batch goes on."""
    tensors = [torch.tensor(array) for array in arrays]
    if device.type != "cuda":
        return tensors
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        on_device = [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]
    stream.synchronize()
    return on_device
