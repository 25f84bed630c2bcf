"""How jobs end: with a result, with an error, or because nobody waits any more; and what is counted then."""

import logging
import time
from collections.abc import Sequence

import numpy as np

from app.engine.compute import Failure
from app.engine.jobs import Job, Result
from app.engine.planner import Planner
from app.engine.planning import ExecutionPlan
from app.engine.thread import DeviceThread
from app.errors import DeadlineExceeded, OutOfMemory, ServiceError, Unavailable
from app.metrics import DeviceMetrics

log = logging.getLogger("app.engine")


class Ends:
    """Of the jobs of one device. Belongs to the event loop."""

    def __init__(self, thread: DeviceThread, planner: Planner, metrics: DeviceMetrics) -> None:
        self._thread = thread
        self._planner = planner
        self._metrics = metrics

    def finish(self, job: Job, array: np.ndarray, plan: ExecutionPlan) -> None:
        """Gives a job its result."""
        if job.clip is not None:
            job.clip.dtype = plan.dtype
        if not job.gone:
            reason = job.reason or ("requested" if self._planner.unusual(job.task, plan) else None)
            self._metrics.pixels(job.task.op).inc(job.pixels)
            job.future.set_result(Result(array, str(plan), reason, job.seconds))

    def fail(self, jobs: Sequence[Job], error: Exception, reason: str) -> None:
        """Ends jobs with an error, those that have not ended yet."""
        for job in jobs:
            if job.gone:
                continue
            self._metrics.item_failures(reason).inc()
            if isinstance(error, OutOfMemory):
                self._metrics.rejected.labels("vram").inc()
            job.future.set_exception(error)

    def failed(self, jobs: Sequence[Job], failure: Failure) -> None:
        """Ends jobs for which a failure is the end."""
        name = self._thread.name
        if failure.kind == "cancelled":
            for job in jobs:
                self.dropped(job)
        elif failure.kind == "oom":
            self.fail(jobs, OutOfMemory(f"{name} ran out of memory: {failure.error}"), "oom")
        elif failure.kind == "lost":
            self._thread.lost = str(failure.error)
            log.critical("device %s is lost: %s", name, failure.error)
            self.fail(jobs, Unavailable(f"the device {name} is lost; the service restarts"), "lost")
        else:
            self.fail(jobs, failure.error, "error")

    async def reject(self, jobs: Sequence[Job], error: Exception) -> None:
        """Ends jobs with what an error outside a forward means for them."""
        failure = Failure("error", error)
        if not isinstance(error, ServiceError):
            failure = await self._thread.call(self._thread.classify, error)
        self.failed(jobs, failure)

    def dropped(self, job: Job) -> bool:
        """Whether nobody needs the job's result any more; counts why."""
        now = time.monotonic()
        if not job.gone and job.late(now):
            self._metrics.rejected.labels("deadline").inc()
            waited = now - job.queued
            job.future.set_exception(DeadlineExceeded(f"the deadline passed after {waited:.1f} s, before the result"))
        elif job.future.cancelled():
            self._metrics.cancelled.labels("compute").inc()
        return job.gone
