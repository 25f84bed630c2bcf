"""Takes one staged batch through precisions and executions until every item has its end.

Two loops: non-finite output walks dtypes, memory pressure walks executions. They live on the event loop; only whole
blocking steps go to the device thread. Failures come back as values, so that no traceback keeps a forward's tensors
alive.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from app.allocator import GAPS
from app.engine import compute
from app.engine.cache import ModelCache, Resident
from app.engine.compute import Failure
from app.engine.devices import on
from app.engine.jobs import Job, Result
from app.engine.memory import DeviceMemory, Level
from app.engine.planner import Planner, shape_of
from app.engine.planning import ExecutionPlan
from app.errors import DeadlineExceeded, NonFiniteOutput, OutOfMemory, ServiceError, Unavailable
from app.execution.causal import carried_bytes
from app.metrics import DeviceMetrics
from app.store.checkpoint import Checkpoint
from app.terms import Dtype
from app.vae.autoencoder import Autoencoder

log = logging.getLogger("app.engine")
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(eq=False)
class Staged:
    """A batch whose arrays are on the device, the precisions that it is to be tried in, and its module in the first."""

    jobs: list[Job]
    dtypes: tuple[Dtype, ...]
    inputs: dict[Job, Tensor]
    resident: Resident | None
    """In use by this batch; None where it had to make room for the batch before, and must be loaded again."""


class Runner:
    """Runs batches on one device, one at a time."""

    def __init__(
        self,
        name: str,
        device: torch.device,
        cache: ModelCache,
        memory: DeviceMemory,
        planner: Planner,
        metrics: DeviceMetrics,
        keep_pages: Callable[[bool], object] | None,
        unstage: Callable[[], bool],
    ) -> None:
        self.name = name
        self.progress = time.monotonic()  # of the running batch, from the device thread
        self.reserved = 0  # forecast bytes of the running forward
        self.lost: str | None = None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix=f"{name}-compute")
        self._device = device
        self._cache = cache
        self._memory = memory
        self._planner = planner
        self._metrics = metrics
        self._keep_pages = keep_pages
        self._unstage = unstage

    async def run(self, staged: Staged) -> None:
        """Ends every job of the batch, with a result or an error. Raises nothing but cancellation."""
        jobs = staged.jobs
        task = jobs[0].task
        tried: list[Dtype] = []
        resident, staged.resident = staged.resident, None
        try:
            self.check_device()
            if self._planner.demoted(task, staged.dtypes):
                _because(jobs, "non_finite")
            for dtype in staged.dtypes:
                if tried:
                    self._fall_back(jobs, tried[-1], dtype)
                if resident is None:
                    resident = await self._acquire(task.checkpoint, dtype)
                jobs = await self._walk_executions(jobs, staged.inputs, resident)
                self._cache.release(resident)
                resident = None
                if not jobs:
                    return
                tried.append(dtype)
            name = task.checkpoint.name
            self.fail(jobs, NonFiniteOutput(f"the output of {name} has NaN or Inf in {', '.join(tried)}"), "nan")
        except asyncio.CancelledError:
            self.fail(jobs, Unavailable("the service is shutting down"), "stopped")
            raise
        except Exception as error:  # noqa: BLE001  the batch boundary: whatever it was, it is these jobs' own
            await self.reject(jobs, error)
        finally:
            self.reserved = 0
            if resident is not None:
                self._cache.release(resident)

    def check_device(self) -> None:
        """Raises Unavailable once the device is lost: nothing more is sent to it."""
        if self.lost is not None:
            raise Unavailable(f"the device {self.name} is lost; the service restarts")

    async def look(self) -> None:
        """Sees how the device is now: another process may have let go of memory since the last forward."""
        level = await on(self.thread, self._memory.look)
        if not self._cache.loading:
            self._memory.note(level, self._cache.taken)

    async def reject(self, jobs: Sequence[Job], error: Exception) -> None:
        """Ends jobs with what an error outside a forward means for them."""
        failure = Failure("error", error)
        if not isinstance(error, ServiceError):
            failure = await on(self.thread, self._classify, error)
        self._end(jobs, failure)

    async def _walk_executions(self, jobs: list[Job], inputs: dict[Job, Tensor], resident: Resident) -> list[Job]:
        """Runs the jobs in one precision and returns those whose output was not finite."""
        overflowed: list[Job] = []
        groups: deque[tuple[list[Job], ExecutionPlan | None]] = deque([(jobs, None)])
        while groups:
            group, failed = groups.popleft()
            group = [job for job in group if not self._dropped(job)]
            if not group:
                continue
            try:
                plan = await self._with_room(self._plan, group, resident.dtype, failed)
            except OutOfMemory as error:
                self.fail(group, error, "oom")
                continue
            if len(group) > plan.batch:
                groups.appendleft((group[plan.batch :], failed))
                group = group[: plan.batch]
            outcome = await self._forward(resident.module, group, inputs, plan)
            if isinstance(outcome, Failure):
                groups.extendleft(self._after(outcome, group, plan))
                continue
            if resident.dtype == "fp16" and all(outcome.finite):
                self._planner.verdicts.held(resident.checkpoint)
            for job, array, fits, finite in zip(group, outcome.arrays, outcome.fits, outcome.finite, strict=True):
                if not finite:
                    job.overflowed = fits and resident.dtype == "fp16"
                    overflowed.append(job)
                    continue
                if job.overflowed:
                    self._condemn(job)
                self._finish(job, array, plan)
        self._metrics.nonfinite.inc(len(overflowed))
        return overflowed

    def _condemn(self, job: Job) -> None:
        """The checkpoint starts behind fp16 from now on: the item overflowed there, and came out finite here."""
        self._planner.verdicts.overflowed(job.task.checkpoint)
        log.warning("%s overflows in fp16, as request %s shows", job.task.checkpoint.name, job.origin or "-")

    async def _acquire(self, checkpoint: Checkpoint, dtype: Dtype) -> Resident:
        return await self._with_room(self._cache.acquire, checkpoint, dtype)

    async def _with_room(self, step: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """A step that may find no room; the batch that is staged behind gives up its weights before it fails."""
        try:
            return await step(*args, **kwargs)
        except OutOfMemory:
            if not self._unstage():
                raise
        return await step(*args, **kwargs)

    async def _plan(self, group: list[Job], dtype: Dtype, failed: ExecutionPlan | None) -> ExecutionPlan:
        """The plan for a group; idle models make way for it. Raises OutOfMemory."""
        task, array = group[0].task, group[0].array
        clip = group[0].clip
        held = 0 if clip is None else clip.held  # in the forecast, too
        alone = clip is not None and clip.carry is None  # the whole clip, of which nothing is carried

        async def choose() -> tuple[ExecutionPlan, int]:
            available = self._planner.available(task) + held
            known = (task, array.shape, len(group), dtype, available, failed, array.itemsize, alone)
            return await on(self.thread, self._planner.choose, *known)

        try:
            plan, peak = await choose()
        except OutOfMemory:
            await self.look()
            plan, peak = await choose()
        self._cache.make_room(peak - held)
        self.reserved = peak - held
        if failed is not None and plan.execution != failed.execution:
            self._metrics.fallbacks(failed.execution, plan.execution, "oom").inc()
        if failed is None and plan.execution != "whole" and task.tiling != "always":
            self._metrics.fallbacks("whole", plan.execution, "low_vram").inc()
            _because(group, "low_memory")
        return plan

    async def _forward(
        self, module: Autoencoder, group: list[Job], inputs: dict[Job, Tensor], plan: ExecutionPlan
    ) -> compute.Outcome | Failure:
        task, clip = group[0].task, group[0].clip
        started = time.monotonic()
        roomy = GAPS * self.reserved <= self._cache.free
        loads, resident = self._cache.loads, self._cache.nbytes
        if clip is not None and clip.carry and not clip.begun:
            clip.carry.clear()  # of a first slice that is tried again
        alone = not self._cache.loading
        outcome, peak, level = await on(self.thread, self._attempt, module, group, inputs, plan, roomy)
        seconds = time.monotonic() - started
        if clip is not None and clip.carry is not None and not clip.over:
            self._cache.clips.add(clip)
            clip.held = carried_bytes(clip.carry)
        for job in group:
            job.seconds["compute"] = job.seconds.get("compute", 0.0) + seconds
        self._metrics.batches.inc()
        self._metrics.items.inc(len(group))
        self._metrics.executions(str(plan)).inc()
        self._metrics.batch_size(task.op, task.checkpoint.name).observe(len(group))
        if alone and (self._cache.loads, self._cache.nbytes) == (
            loads,
            resident,
        ):  # else the weights on their way are in the figures
            self._memory.note(level, self._cache.taken)
            if peak is not None and clip is None and not isinstance(outcome, Failure):
                array = group[0].array
                self._planner.forecaster.measured(shape_of(task, array.shape, array.itemsize), plan, peak)
        return outcome

    def _attempt(
        self, module: Autoencoder, group: list[Job], inputs: dict[Job, Tensor], plan: ExecutionPlan, roomy: bool
    ) -> tuple[compute.Outcome | Failure, int | None, Level]:
        """On the device thread: a forward, or its failure instead of an exception; its peak; the memory after it."""
        if self._keep_pages is not None:
            self._keep_pages(roomy)
        self._memory.begin()
        outcome = self._try(module, group, inputs, plan)
        peak = self._memory.peak()
        if isinstance(outcome, Failure) and outcome.kind == "oom":
            self._memory.release()  # here, where no traceback holds the forward's tensors any more
        return outcome, peak, self._memory.look()

    def _try(
        self, module: Autoencoder, group: list[Job], inputs: dict[Job, Tensor], plan: ExecutionPlan
    ) -> compute.Outcome | Failure:
        def check() -> None:
            now = self.progress = time.monotonic()
            if all(job.gone or job.late(now) for job in group):
                raise compute.Cancelled

        try:
            check()
            tasks, clip = [job.task for job in group], group[0].clip
            if clip is not None:
                return compute.forward_slice(module, inputs[group[0]], tasks[0], plan, clip.carry, check)
            return compute.forward(module, [inputs[job] for job in group], tasks, plan, check)
        except Exception as error:  # noqa: BLE001  the batch boundary: only classified here, `_after` decides
            return self._classify(error)
        finally:
            self.progress = time.monotonic()

    def _classify(self, error: Exception) -> Failure:
        """What a failure means. On the device thread: whether the device is lost is asked of the device itself."""
        failure = compute.classify(error, self._device)
        if failure.kind in {"lost", "error"} and not isinstance(error, ServiceError):
            log.error("a batch failed on %s", self.name, exc_info=error)
        error.with_traceback(None)
        return failure

    def _after(
        self, failure: Failure, group: list[Job], plan: ExecutionPlan
    ) -> list[tuple[list[Job], ExecutionPlan | None]]:
        """What to run instead of a failed forward; jobs for which nothing is left end here."""
        clip = group[0].clip
        if failure.kind == "oom" and not (clip and clip.begun):
            log.warning("out of memory in %s, batch %d: %s", plan, plan.batch, failure.error)
            self._metrics.oom.inc()
            self._metrics.retries("oom").inc()
            _because(group, "oom")
            return [(group, plan)]
        if failure.kind == "error" and len(group) > 1:
            self._metrics.retries("isolate").inc()  # one of them is to blame: each runs alone
            return [([job], None) for job in reversed(group)]
        self._end(group, failure)
        return []

    def _end(self, jobs: Sequence[Job], failure: Failure) -> None:
        """Ends jobs that failed for good."""
        if failure.kind == "cancelled":
            for job in jobs:
                self._dropped(job)
        elif failure.kind == "oom":
            self.fail(jobs, OutOfMemory(f"{self.name} ran out of memory: {failure.error}"), "oom")
        elif failure.kind == "lost":
            self.lost = str(failure.error)
            log.critical("device %s is lost: %s", self.name, failure.error)
            self.fail(jobs, Unavailable(f"the device {self.name} is lost; the service restarts"), "lost")
        else:
            self.fail(jobs, failure.error, "error")

    def fail(self, jobs: Sequence[Job], error: Exception, reason: str) -> None:
        """Ends jobs with an error, those that have not ended yet."""
        for job in jobs:
            if job.gone:
                continue
            self._metrics.item_failures(reason).inc()
            if isinstance(error, OutOfMemory):
                self._metrics.rejected.labels("vram").inc()
            job.future.set_exception(error)

    def _fall_back(self, jobs: list[Job], before: Dtype, dtype: Dtype) -> None:
        name = jobs[0].task.checkpoint.name
        log.warning("%s: %d items are not finite in %s, running them in %s", name, len(jobs), before, dtype)
        self._metrics.retries("nan").inc()
        self._metrics.fallbacks(before, dtype, "nonfinite").inc(len(jobs))
        _because(jobs, "non_finite")

    def _dropped(self, job: Job) -> bool:
        """Whether nobody needs the job's result any more; counts why."""
        now = time.monotonic()
        if not job.gone and job.late(now):
            self._metrics.rejected.labels("deadline").inc()
            waited = now - job.queued
            job.future.set_exception(DeadlineExceeded(f"the deadline passed after {waited:.1f} s, before the result"))
        elif job.future.cancelled():
            self._metrics.cancelled.labels("compute").inc()
        return job.gone

    def _finish(self, job: Job, array: np.ndarray, plan: ExecutionPlan) -> None:
        if job.clip is not None:
            job.clip.dtype = plan.dtype
        if not job.gone:
            reason = job.reason or ("requested" if self._planner.unusual(job.task, plan) else None)
            self._metrics.pixels(job.task.op).inc(job.pixels)
            job.future.set_result(Result(array, str(plan), reason, job.seconds))


def _because(jobs: list[Job], reason: str) -> None:
    """Notes why the jobs do not run as first planned."""
    for job in jobs:
        job.reason = reason
