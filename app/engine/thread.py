"""The thread that computes on one device: a forward after the other.

One that was sent behind another batch begins by itself once that batch has left nothing to do, and nobody is asked
between the two. Failures come back as values, so that no traceback keeps a forward's tensors alive.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from app.engine import compute
from app.engine.devices import on
from app.engine.jobs import Job
from app.engine.memory import DeviceMemory, Level
from app.engine.planning import ExecutionPlan
from app.errors import ServiceError, Unavailable
from app.vae.autoencoder import Autoencoder

log = logging.getLogger("app.engine")
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Forward:
    """Items of a batch in one plan. Batches are numbered in the order of their turns."""

    batch: int
    last: bool  # nothing of its batch is left where all of it comes out well
    module: Autoencoder
    jobs: Sequence[Job]
    inputs: Mapping[Job, Tensor]
    plan: ExecutionPlan
    roomy: bool  # freed pages may stay


@dataclass(frozen=True)
class Done:
    """What came of a forward, and the device after it."""

    outcome: compute.Outcome | compute.Failure
    jobs: list[Job]  # that it had: those for which somebody still waited when it began
    began: float  # on time.monotonic()
    seconds: float
    peak: int | None
    level: Level


class DeviceThread:
    """Belongs to the event loop; what it is given runs on the thread."""

    def __init__(
        self, name: str, device: torch.device, memory: DeviceMemory, keep_pages: Callable[[bool], object] | None
    ) -> None:
        self.name = name
        self.lost: str | None = None
        self.progress = time.monotonic()  # of the running batch, from the thread
        self._device = device
        self._memory = memory
        self._keep_pages = keep_pages
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"{name}-compute")
        self._through = 0  # the last batch that left nothing to do; the thread's own

    def check(self) -> None:
        """Raises Unavailable once the device is lost: nothing more is sent to it."""
        if self.lost is not None:
            raise Unavailable(f"the device {self.name} is lost; the service restarts")

    async def call(self, function: Callable[..., T], *args: object) -> T:
        """The result of a blocking call, in its turn."""
        return await on(self._executor, function, *args)

    def send(self, forward: Forward, behind: bool = False) -> "asyncio.Future[Done | None]":
        """Runs a forward in its turn; `behind` another batch it is None where that one has something left to do."""
        attempt = self._attempt_behind if behind else self._attempt
        return asyncio.get_running_loop().run_in_executor(self._executor, attempt, forward)

    def shutdown(self) -> None:
        """Lets the thread end; it is not waited for."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def classify(self, error: Exception) -> compute.Failure:
        """What a failure means. On the thread: whether the device is lost is asked of the device itself."""
        failure = compute.classify(error, self._device)
        if failure.kind in {"lost", "error"} and not isinstance(error, ServiceError):
            log.error("a batch failed on %s", self.name, exc_info=error)
        error.with_traceback(None)
        return failure

    def _attempt_behind(self, forward: Forward) -> Done | None:
        return self._attempt(forward) if self._through == forward.batch - 1 else None

    def _attempt(self, forward: Forward) -> Done | None:
        began = time.monotonic()
        jobs = [job for job in forward.jobs if not (job.gone or job.late(began))]
        if self._keep_pages is not None:
            self._keep_pages(forward.roomy)
        self._memory.begin()
        outcome = self._try(forward, jobs)
        peak = self._memory.peak()
        if isinstance(outcome, compute.Outcome):
            through = all(outcome.finite)
        else:
            through = outcome.kind == "cancelled"
            if outcome.kind == "oom":
                self._memory.release()  # here, where no traceback holds the forward's tensors any more
        if forward.last and through:
            self._through = forward.batch
        return Done(outcome, jobs, began, time.monotonic() - began, peak, self._memory.look())

    def _try(self, forward: Forward, jobs: list[Job]) -> compute.Outcome | compute.Failure:
        def check() -> None:
            now = self.progress = time.monotonic()
            if all(job.gone or job.late(now) for job in jobs):
                raise compute.Cancelled

        try:
            check()
            clip, inputs = jobs[0].clip, [forward.inputs[job] for job in jobs]
            tasks, module, plan = [job.task for job in jobs], forward.module, forward.plan
            if clip is not None:
                return compute.forward_slice(module, inputs[0], tasks[0], plan, clip.carry, check)
            return compute.forward(module, inputs, tasks, plan, check)
        except Exception as error:  # noqa: BLE001  the batch boundary: only classified here, the runner decides
            return self.classify(error)
        finally:
            self.progress = time.monotonic()
