"""The bounded queue of one device: who gets in, who runs next, and with whom.

No timers: a batch is whatever is queued with the head's key when the device can take one. Models take turns, so a
hot one cannot starve another.
"""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from app.engine.jobs import RANKS, Clip, Job, Result, Task, check_shape
from app.engine.rate import KNOWN, Rate
from app.errors import DeadlineExceeded, OutOfMemory, Overloaded, TooLarge
from app.metrics import Metrics
from app.terms import Op

Queue = tuple[int, str]
"""A network's jobs of one rank: the rank's place in RANKS, `Task.network`."""


BATCH_PIXELS = {"cpu": 1 << 18, "cuda": 4 << 20}
"""Of one batch where the operator says nothing. A GPU is filled by many small pictures; a CPU is full with one, and
beyond its caches each costs more: TAESD encodes a picture of 512 px in 0.59 s alone and in 1.16 s among 16, one of
256 px in 0.155 s alone or among 4 and in 0.255 s among 64 (AMD EPYC, two cores, float32, pages kept)."""


@dataclass(frozen=True)
class QueueLimits:
    """What a queue may hold, and what one batch may."""

    items: int = 256  # waiting or being read
    pixels: int = 512 << 20
    batch_pixels: int | None = None  # None: as the device's kind has it

    def batch_on(self, kind: str) -> int:
        """Pixels of one batch on a device of a kind: cpu or cuda."""
        return self.batch_pixels or BATCH_PIXELS[kind]


@dataclass(frozen=True, eq=False)
class Ticket:
    """Room in the queue, taken before a body's pixels are decoded and given back when its jobs leave the queue."""

    items: int
    pixels: int


class Batcher:
    """Jobs by model, each model's in order of arrival."""

    def __init__(self, limits: QueueLimits, device: str, rate: Rate, metrics: Metrics) -> None:
        self.limits = limits
        self._batch_pixels = limits.batch_on(device)
        self.rate = rate
        self._metrics = metrics
        self._queues: dict[Queue, deque[Job]] = {}  # none is empty
        self._served: OrderedDict[Queue, int] = OrderedDict()  # the number of the last batch of models served lately
        self._batches = 0
        self._items = 0  # admitted and not yet taken, whether or not their pixels are read
        self._pixels = 0
        self._arrival = asyncio.Event()
        self._unread: dict[Ticket, float] = {}  # admitted, bodies being read: expected seconds
        self._taken: dict[int, float] = {}  # expected seconds of batches that do not run yet, by the id of their list
        self._running_until = 0.0  # when the batch on the device should be done, by the rate

    def admit(self, items: int, pixels: int, deadline: float | None, seconds: float) -> Ticket:
        """Room for a request's items, whose own compute should take `seconds`; 0 where nothing is known of that.

        A request of more than half of the queue's pixels needs half of it, so that small ones do not shut it out.
        An idle device refuses nothing for its deadline: only what runs can show how long it takes. Raises Overloaded
        when the queue is full or the deadline cannot be met, TooLarge for more items than the queue ever holds.
        """
        if items > self.limits.items:
            raise TooLarge(f"{items} items in one request: the queue holds {self.limits.items}")
        self.check_room(items, pixels)
        wait = self.wait_seconds()
        if deadline is not None and wait > 0 and time.monotonic() + wait + seconds > deadline:
            self._metrics.rejected.labels("deadline").inc()
            raise Overloaded(
                f"the deadline cannot be met: about {wait + seconds:.1f} s of work are before its end",
                retry_after=max(1.0, wait),
            )
        self._items += items
        self._pixels += pixels
        ticket = Ticket(items, pixels)
        self._unread[ticket] = seconds
        return ticket

    def check_room(self, items: int = 1, pixels: int = 1) -> None:
        """Raises Overloaded when so much more is not taken; the least that a request brings is one of each."""
        needs = min(pixels, self.limits.pixels // 2)
        if self._items + items > self.limits.items or self._pixels + needs > self.limits.pixels:
            self._metrics.rejected.labels("queue_full").inc()
            raise Overloaded(
                f"the queue is full: {self._items} of {self.limits.items} items, "
                f"{self._pixels} of {self.limits.pixels} pixels",
                retry_after=max(1.0, self.wait_seconds()),
            )

    def give_back(self, ticket: Ticket) -> None:
        """The request failed before its jobs were put: its room is free again."""
        del self._unread[ticket]
        self._items -= ticket.items
        self._pixels -= ticket.pixels

    def put(self, ticket: Ticket, jobs: Iterable[Job]) -> None:
        """Queues admitted jobs, which take up their own room from here on instead of the ticket's."""
        self.give_back(ticket)
        for job in jobs:
            self._items += 1
            self._pixels += job.pixels
            self._queues.setdefault(_queue_of(job.task), deque()).append(job)
        self._arrival.set()

    def put_slice(self, ticket: Ticket, job: Job) -> Ticket:
        """Queues the next slice of an admitted clip; what is left of its room.

        Others have their turn before the slice after it, so that what is left delays nobody.
        """
        self.put(ticket, (job,))
        left = Ticket(ticket.items, max(0, ticket.pixels - job.pixels))
        self._items += left.items
        self._pixels += left.pixels
        self._unread[left] = 0.0
        return left

    async def take(self, among: Callable[[Task], bool] = lambda _: True) -> list[Job]:
        """The next batch: the head of the model whose turn it is, and all with its key up to the pixel budget.

        Only tasks `among` have a turn; `look_again` where these become others. Jobs whose client has gone or whose
        deadline has passed are dropped on the way. A call that is cancelled has taken nothing.
        """
        while True:
            waiting = [queue for queue, jobs in self._queues.items() if among(jobs[0].task)]
            if not waiting:
                self._arrival.clear()
                await self._arrival.wait()
            elif batch := self._next_batch(min(waiting, key=self._turn)):
                self._taken[id(batch)] = self.rate.of(batch, self._batch_pixels)
                return batch

    def expire(self, jobs: Sequence[Job]) -> None:
        """Ends jobs whose deadline passes wherever they are: a load and a device that hangs look at no clock."""
        now = time.monotonic()
        for job in jobs:
            if not job.gone:
                self._metrics.rejected.labels("deadline").inc()
                waited = now - job.queued
                job.future.set_exception(
                    DeadlineExceeded(f"the deadline passed after {waited:.1f} s, before the result")
                )

    def look_again(self) -> None:
        """Other tasks may have a turn now."""
        self._arrival.set()

    def began(self, batch: list[Job]) -> float:
        """A batch that was taken is on the device, and should take so many seconds."""
        seconds = self._taken.pop(id(batch))
        self._running_until = time.monotonic() + seconds
        return seconds

    def ended(self) -> None:
        """Nothing is on the device."""
        self._running_until = 0.0

    def failed(self, batch: list[Job]) -> None:
        """A batch that was taken will not run."""
        self._taken.pop(id(batch), None)

    def depths(self) -> dict[tuple[str, Op], int]:
        """Queued jobs by (model name, op)."""
        depths: dict[tuple[str, Op], int] = {}
        for jobs in self._queues.values():
            for job in jobs:
                key = (job.task.checkpoint.name, job.task.op)
                depths[key] = depths.get(key, 0) + 1
        return depths

    @property
    def items(self) -> int:
        """Items admitted and not yet on the device."""
        return self._items

    @property
    def pixels(self) -> int:
        """Pixels admitted and not yet on the device."""
        return self._pixels

    def oldest_age(self, now: float) -> float:
        """Seconds that the oldest queued job has waited."""
        return max((now - jobs[0].queued for jobs in self._queues.values()), default=0.0)

    def wait_seconds(self) -> float:
        """Seconds until all work that was admitted should be done, by the measured rate; lower ranks wait for it."""
        work = [jobs for (rank, _), jobs in self._queues.items() if not rank]
        queued = sum(self.rate.of(jobs, self._batch_pixels) for jobs in work)
        running = max(0.0, self._running_until - time.monotonic())
        return sum(self._unread.values()) + queued + sum(self._taken.values()) + running

    def drain(self, error: Exception) -> None:
        """Fails everything queued."""
        while self._queues:
            _, jobs = self._queues.popitem()
            for job in jobs:
                self._forget(job)
                if not job.gone:
                    job.future.set_exception(error)

    def _next_batch(self, queue: Queue) -> list[Job]:
        jobs = self._queues.pop(queue)
        batch: list[Job] = []
        rest: deque[Job] = deque()
        pixels = 0
        now = time.monotonic()
        for job in jobs:
            if self._dropped(job, now):
                continue
            fits = not batch or (job.key == batch[0].key and pixels + job.pixels <= self._batch_pixels)
            if not fits:
                rest.append(job)
                continue
            batch.append(job)
            pixels += job.pixels
            self._forget(job)
        if rest:
            self._queues[queue] = rest
        if batch:
            self._batches += 1
            self._served[queue] = self._batches
            self._served.move_to_end(queue)
            if len(self._served) > KNOWN:  # a model served so long ago is as good as one never served
                self._served.popitem(last=False)
        return batch

    def _turn(self, queue: Queue) -> tuple[int, int, float]:
        """All work first. Then the model served longest ago; of several that never were, the one that waits longest.

        The lower ranks take turns: a preview waits for one job of a fit, and a flood of previews does not stop the fit.
        """
        return min(queue[0], 1), self._served.get(queue, 0), self._queues[queue][0].queued

    def _dropped(self, job: Job, now: float) -> bool:
        if job.late(now):
            self.expire([job])
        if job.future.cancelled():
            self._metrics.cancelled.labels("queue").inc()
        elif not job.gone:
            return False
        self._forget(job)
        return True

    def _forget(self, job: Job) -> None:
        self._items -= 1
        self._pixels -= job.pixels


def _queue_of(task: Task) -> Queue:
    return RANKS.index(task.rank), task.network


class Admission:
    """Room in one device's queue for some arrays of one task; `run` takes it up, or it is given back."""

    def __init__(self, batcher: Batcher, ticket: Ticket, task: Task, deadline: float | None, origin: str = "") -> None:
        self._batcher = batcher
        self._ticket: Ticket | None = ticket
        self._task = task
        self._deadline = deadline
        self._origin = origin

    async def slices(self, arrays: AsyncIterable[np.ndarray]) -> AsyncGenerator[Result]:
        """Queues the slices of a clip one by one, each once the result of the one before it was taken.

        Where not even the first one fits with what the clip would carry over time, all of it runs as one slice, in
        bands: what these carry over rows may be less. A clip that ends early, for an error or because nobody wants
        more of it, lets go of all that it had.
        """
        clip = Clip()
        try:
            async for array in arrays:
                try:
                    result = await self._slice(array, clip)
                except OutOfMemory:
                    if clip.begun:
                        raise
                    rest = [array async for array in arrays]
                    if not rest:
                        raise
                    axis = 0 if self._task.op == "encode" else 1
                    result = await self._slice(np.concatenate((array, *rest), axis), Clip(carry=None))
                yield result
        finally:
            clip.end()

    async def _slice(self, array: np.ndarray, clip: Clip) -> Result:
        check_shape(self._task, array.shape)
        assert self._ticket is not None, "an admission runs once"
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        job = Job(self._task, array, self._deadline, future, origin=self._origin, clip=clip)
        self._ticket = self._batcher.put_slice(self._ticket, job)
        return (await self._ended([job]))[0]

    async def run(self, arrays: Sequence[np.ndarray]) -> list[Result]:
        """Queues one job an array and waits for all of them; the first error is raised, the others are dropped."""
        for array in arrays:
            check_shape(self._task, array.shape)
        loop = asyncio.get_running_loop()
        jobs = [Job(self._task, array, self._deadline, loop.create_future(), origin=self._origin) for array in arrays]
        ticket, self._ticket = self._ticket, None  # from here on the jobs stand for it, each leaves by itself
        assert ticket is not None, "an admission runs once"
        self._batcher.put(ticket, jobs)
        return await self._ended(jobs)

    async def _ended(self, jobs: Sequence[Job]) -> list[Result]:
        """Their results, or the first error; none outlives this call, nor the deadline."""
        loop = asyncio.get_running_loop()  # whose clock is time.monotonic
        end = loop.call_at(self._deadline, self._batcher.expire, jobs) if self._deadline is not None else None
        try:
            return list(await asyncio.gather(*(job.future for job in jobs)))
        finally:
            if end is not None:
                end.cancel()
            for job in jobs:
                job.future.cancel()

    def close(self) -> None:
        """Gives the room back if no job took it."""
        if self._ticket is not None:
            self._batcher.give_back(self._ticket)
