"""Takes one staged batch through precisions and executions until every item has its end.

Two loops: non-finite output walks dtypes, memory pressure walks executions. They live on the event loop; only whole
forwards go to the device's thread, the first of a batch ahead of its turn where memory allows it as things are.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from torch import Tensor

from app.allocator import GAPS
from app.engine.cache import ModelCache, Resident
from app.engine.compute import Failure
from app.engine.devices import on
from app.engine.ends import Ends
from app.engine.jobs import Job
from app.engine.memory import DeviceMemory
from app.engine.planner import Choice, Planner
from app.engine.planning import ExecutionPlan
from app.engine.thread import DeviceThread, Done, Forward
from app.errors import NonFiniteOutput, OutOfMemory, ServiceError, Unavailable
from app.execution.causal import carried_bytes
from app.metrics import DeviceMetrics
from app.store.checkpoint import Checkpoint
from app.terms import Dtype

log = logging.getLogger("app.engine")
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Sent:
    """A forward on its way, and the weights on the device when it was sent: see `ModelCache.weights`."""

    forward: Forward
    weights: tuple[int, int] | None
    done: "asyncio.Future[Done | None]"


@dataclass(eq=False)
class Staged:
    """A batch whose arrays are on the device, the precisions that it is to be tried in, and its module in the first."""

    number: int  # in the order of the turns
    jobs: list[Job]
    dtypes: tuple[Dtype, ...]
    inputs: dict[Job, Tensor]
    resident: Resident | None
    """In use by this batch; None where it had to make room for the batch before, and must be loaded again."""
    first: Sent | None = None  # forward, sent ahead
    reserved: int = 0  # forecast bytes of the forward that runs, or was sent ahead
    seconds: float = 0.0  # of all forwards so far


class Runner:
    """Runs the batches of one device."""

    def __init__(
        self,
        thread: DeviceThread,
        staging: ThreadPoolExecutor,
        ends: Ends,
        cache: ModelCache,
        memory: DeviceMemory,
        planner: Planner,
        metrics: DeviceMetrics,
        unstage: Callable[[], Awaitable[bool]],
        look: Callable[[], Awaitable[None]],
    ) -> None:
        self._thread = thread
        self._staging = staging  # where plans are made too
        self._ends = ends
        self._cache = cache
        self._memory = memory
        self._planner = planner
        self._metrics = metrics
        self._unstage = unstage
        self._look = look

    async def send_ahead(self, staged: Staged) -> None:
        """Hands the first forward of a batch to the device's thread, behind what runs, where its plan is clear by now.

        That is the one that would be chosen on an empty device, for all items, and there is room for it beside all
        that is in use. What a clip carries from the slice before is not known yet.
        """
        jobs = [job for job in staged.jobs if not job.gone]
        if not jobs or jobs[0].clip is not None or staged.resident is None:
            return
        try:
            choice = await self._choose(jobs, staged.dtypes[0], self._planner.available(jobs[0].task), None)
        except ServiceError:
            return  # it has its say when the turn comes
        if not choice.first or not self._cache.make_room(choice.peak):
            return
        staged.reserved = choice.peak
        forward = self._forward(staged, jobs, choice.plan, last=True)
        staged.first = Sent(forward, self._cache.weights, self._thread.send(forward, behind=True))

    async def run(self, staged: Staged) -> None:
        """Ends every job of the batch, with a result or an error. Raises nothing but cancellation."""
        jobs = staged.jobs
        task = jobs[0].task
        tried: list[Dtype] = []
        try:
            self._thread.check()
            if self._planner.demoted(task, staged.dtypes):
                _because(jobs, "non_finite")
            for dtype in staged.dtypes:
                if tried:
                    self._fall_back(jobs, tried[-1], dtype)
                if staged.resident is None:
                    staged.resident = await self._acquire(task.checkpoint, dtype)
                jobs = await self._walk_executions(staged, jobs, dtype)
                self.release(staged)
                if not jobs:
                    return
                tried.append(dtype)
            name = task.checkpoint.name
            error = NonFiniteOutput(f"the output of {name} has NaN or Inf in {', '.join(tried)}")
            self._ends.fail(jobs, error, "nan")
        except asyncio.CancelledError:
            self._ends.fail(jobs, Unavailable("the service is shutting down"), "stopped")
            raise
        except Exception as error:  # noqa: BLE001  the batch boundary: whatever it was, it is these jobs' own
            await self._ends.reject(jobs, error)
        finally:
            staged.reserved = 0
            self.release(staged)

    def release(self, staged: Staged) -> bool:
        """Lets go of a batch's module, which may be loaded again; whether it had one."""
        if staged.resident is None:
            return False
        self._cache.release(staged.resident)
        staged.resident = None
        return True

    async def _walk_executions(self, staged: Staged, jobs: list[Job], dtype: Dtype) -> list[Job]:
        """Runs the jobs in one precision and returns those whose output was not finite."""
        overflowed: list[Job] = []
        groups: deque[tuple[list[Job], ExecutionPlan | None]] = deque([(jobs, None)])
        while groups:
            group, failed = groups.popleft()
            sent, staged.first = staged.first, None
            if sent is None:
                group = [job for job in group if not self._ends.dropped(job)]
                if not group:
                    continue
                try:
                    plan = await self._with_room(self._plan, staged, group, dtype, failed)
                except OutOfMemory as error:
                    self._ends.fail(group, error, "oom")
                    continue
                if len(group) > plan.batch:
                    groups.appendleft((group[plan.batch :], failed))
                    group = group[: plan.batch]
                sent = self._send(staged, group, plan, last=not groups and not overflowed)
            done = await sent.done
            if done is None:  # the batch before had something left to do: it is this one's turn now
                groups.appendleft((group, failed))
                continue
            for job in set(group).difference(done.jobs):
                self._ends.dropped(job)
            if not done.jobs:
                continue
            self._note(done, sent, staged)
            if isinstance(done.outcome, Failure):
                groups.extendleft(self._after(done.outcome, done.jobs, sent.forward.plan))
            else:
                overflowed += self._finish(done, sent.forward.plan)
        self._metrics.nonfinite.inc(len(overflowed))
        return overflowed

    def _finish(self, done: Done, plan: ExecutionPlan) -> list[Job]:
        """Ends the jobs that came out finite; the others."""
        outcome, overflowed = done.outcome, []
        assert not isinstance(outcome, Failure)
        if plan.dtype == "fp16" and all(outcome.finite):
            self._planner.verdicts.held(done.jobs[0].task.checkpoint)
        for job, array, fits, finite in zip(done.jobs, outcome.arrays, outcome.fits, outcome.finite, strict=True):
            if not finite:
                job.overflowed = fits and plan.dtype == "fp16"
                overflowed.append(job)
                continue
            if job.overflowed:
                self._condemn(job)
            self._ends.finish(job, array, plan)
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
            if not await self._unstage():
                raise
        return await step(*args, **kwargs)

    async def _choose(self, group: list[Job], dtype: Dtype, available: int, failed: ExecutionPlan | None) -> Choice:
        first = group[0]
        alone = first.clip is not None and first.clip.carry is None  # the whole clip, of which nothing is carried
        known = (first.task, first.array.shape, len(group), dtype, available, failed, first.array.itemsize, alone)
        return await on(self._staging, self._planner.choose, *known)

    async def _plan(
        self, staged: Staged, group: list[Job], dtype: Dtype, failed: ExecutionPlan | None
    ) -> ExecutionPlan:
        """The plan for a group; idle models make way for it. Raises OutOfMemory."""
        task, clip = group[0].task, group[0].clip
        held = 0 if clip is None else clip.held  # in the forecast, too
        try:
            choice = await self._choose(group, dtype, self._planner.available(task) + held, failed)
        except OutOfMemory:
            await self._look()
            choice = await self._choose(group, dtype, self._planner.available(task) + held, failed)
        plan = choice.plan
        staged.reserved = choice.peak - held
        self._cache.make_room(staged.reserved)
        if failed is not None and plan.execution != failed.execution:
            self._metrics.fallbacks(failed.execution, plan.execution, "oom").inc()
        if failed is None and plan.execution != "whole" and task.tiling != "always":
            self._metrics.fallbacks("whole", plan.execution, "low_vram").inc()
            _because(group, "low_memory")
        return plan

    def _send(self, staged: Staged, group: list[Job], plan: ExecutionPlan, last: bool) -> Sent:
        """A forward of the batch whose turn it is."""
        forward = self._forward(staged, group, plan, last)
        return Sent(forward, self._cache.weights, self._thread.send(forward))

    def _forward(self, staged: Staged, group: list[Job], plan: ExecutionPlan, last: bool) -> Forward:
        assert staged.resident is not None
        clip = group[0].clip
        if clip is not None and clip.carry and not clip.begun:
            clip.carry.clear()  # of a first slice that is tried again
        roomy = GAPS * staged.reserved <= self._cache.free
        return Forward(staged.number, last, staged.resident.module, group, staged.inputs, plan, roomy)

    def _note(self, done: Done, sent: Sent, staged: Staged) -> None:
        """Notes what a forward took."""
        job, plan = done.jobs[0], sent.forward.plan
        task, clip = job.task, job.clip
        staged.seconds += done.seconds
        if clip is not None and clip.carry is not None and not clip.over:
            self._cache.clips.add(clip)
            clip.held = carried_bytes(clip.carry)
        for each in done.jobs:
            each.seconds.setdefault("queue", max(0.0, done.began - each.queued - each.seconds["load"]))
            each.seconds["compute"] = each.seconds.get("compute", 0.0) + done.seconds
        self._metrics.batches.inc()
        self._metrics.items.inc(len(done.jobs))
        self._metrics.executions(str(plan)).inc()
        self._metrics.batch_size(task.op, task.checkpoint.name).observe(len(done.jobs))
        if sent.weights is not None and sent.weights == self._cache.weights:  # else those on their way are in it
            self._memory.note(done.level, self._cache.taken)
            if done.peak is not None and clip is None and not isinstance(done.outcome, Failure):
                shape = self._planner.shape_of(task, job.array.shape, job.array.itemsize)
                self._planner.forecaster.measured(shape, plan, done.peak)

    def _after(
        self, failure: Failure, group: Sequence[Job], plan: ExecutionPlan
    ) -> list[tuple[list[Job], ExecutionPlan | None]]:
        """What to run instead of a failed forward; jobs for which nothing is left end here."""
        clip = group[0].clip
        if failure.kind == "oom" and not (clip and clip.begun):
            log.warning("out of memory in %s, batch %d: %s", plan, plan.batch, failure.error)
            self._metrics.oom.inc()
            self._metrics.retries("oom").inc()
            _because(group, "oom")
            return [(list(group), plan)]
        if failure.kind == "error" and len(group) > 1:
            self._metrics.retries("isolate").inc()  # one of them is to blame: each runs alone
            return [([job], None) for job in reversed(group)]
        self._ends.failed(group, failure)
        return []

    def _fall_back(self, jobs: list[Job], before: Dtype, dtype: Dtype) -> None:
        name = jobs[0].task.checkpoint.name
        log.warning("%s: %d items are not finite in %s, running them in %s", name, len(jobs), before, dtype)
        self._metrics.retries("nan").inc()
        self._metrics.fallbacks(before, dtype, "nonfinite").inc(len(jobs))
        _because(jobs, "non_finite")


def _because(jobs: Sequence[Job], reason: str) -> None:
    """Notes why the jobs do not run as first planned."""
    for job in jobs:
        job.reason = reason
