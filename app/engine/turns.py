"""Whose turn it is on one device: batches from the queue, and the loads of models that are not there yet.

While a model is loaded, batches whose models are there overtake it, as long as there is room for both.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from app.engine.batcher import Batcher
from app.engine.cache import ModelCache, Resident
from app.engine.jobs import Job, Task
from app.engine.planner import Planner
from app.errors import OutOfMemory
from app.store.checkpoint import Checkpoint
from app.terms import Dtype


@dataclass(eq=False)
class Turn:
    """A batch that was taken from the queue, the precisions to try, and its module if that had to be loaded."""

    jobs: list[Job]
    dtypes: tuple[Dtype, ...]
    loading: asyncio.Task[Resident] | None = None
    began: float = field(default_factory=time.monotonic)


class Turns:
    """Belongs to the event loop; one caller of `next`, which tells by `ended` of each turn that is over."""

    def __init__(
        self,
        batcher: Batcher,
        cache: ModelCache,
        planner: Planner,
        reserved: Callable[[], int],
        look: Callable[[], Awaitable[None]],
    ) -> None:
        self.cold: Turn | None = None  # whose model is being loaded
        self._batcher = batcher
        self._cache = cache
        self._planner = planner
        self._reserved = reserved  # forecast bytes of what runs
        self._look = look  # at the device, of which others may have let go
        self._out = 0  # turns that are not over
        self._quiet = asyncio.Event()  # there is none: no module is in use
        self._quiet.set()
        self._end = asyncio.Event()  # of one of them
        self._making_way = asyncio.Event()  # for the cold one's model: nothing new has a turn

    async def next(self) -> Turn:
        """The batch whose turn it is: the cold one once its model has come.

        Where there is no room for that beside what runs, nothing overtakes it any more.
        """
        while True:
            if self.cold is not None and self.cold.loading is None:  # put back by a batch that overtook it
                self._load_for(self.cold)
            if self.cold is not None and self.cold.loading is not None and self.cold.loading.done():
                turn, self.cold = self.cold, None
                break
            jobs = await self._taken()
            if jobs is None:
                continue
            task = jobs[0].task
            turn = Turn(jobs, _begun_in(jobs[0]) or self._planner.order_of_batch(task))
            if self.cold is not None or self._cache.holds(task.checkpoint, turn.dtypes[0]):
                break
            self._load_for(turn)
            self.cold = turn
        self._out += 1
        self._quiet.clear()
        return turn

    def ended(self) -> None:
        """A turn is over."""
        self._out -= 1
        self._end.set()
        if not self._out:
            self._quiet.set()
        self._batcher.look_again()

    async def module(self, turn: Turn) -> Resident:
        """The module of a turn, in its first precision; of a model that was there it may have been evicted since."""
        if turn.loading is not None:
            return turn.loading.result()
        checkpoint, dtype = turn.jobs[0].task.checkpoint, turn.dtypes[0]
        while True:
            try:
                return await self._cache.acquire(checkpoint, dtype, self._reserved())
            except OutOfMemory:
                if self._out > 1:
                    self._end.clear()
                    await self._end.wait()
                elif not await self._put_back():
                    break
        await self._look()
        return await self._cache.acquire(checkpoint, dtype)  # nothing is in the way any more: what it raises is true

    def let_go(self, turn: Turn) -> None:
        """Releases what a turn that will not come has loaded, or ends the load."""
        if turn.loading is not None and not turn.loading.cancel() and turn.loading.exception() is None:
            self._cache.release(turn.loading.result())

    async def _taken(self) -> list[Job] | None:
        """The next batch of the queue; None where the cold one's load has ended before there was one."""
        taking = asyncio.ensure_future(self._batcher.take(self._may_run))
        waits: set[asyncio.Future[Any]] = {taking}
        if self.cold is not None and self.cold.loading is not None:
            waits.add(self.cold.loading)
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            taking.cancel()  # no-op where it is done
        await asyncio.wait([taking])
        return None if taking.cancelled() else taking.result()

    def _may_run(self, task: Task) -> bool:
        """Whether a task may have a turn: while another one's model is loaded, only if its own is there.

        Lower ranks have none while anything is on the device: work that comes meanwhile would wait for them.
        """
        if task.rank != "work" and (self._out or self.cold is not None):
            return False
        return self.cold is None or (not self._making_way.is_set() and self._cache.holds(task.checkpoint))

    def _load_for(self, turn: Turn) -> None:
        turn.loading = asyncio.create_task(self._bring(turn.jobs[0].task.checkpoint, turn.dtypes[0]))

    async def _bring(self, checkpoint: Checkpoint, dtype: Dtype) -> Resident:
        """The module of a model that is not there yet."""
        try:
            return await self._cache.acquire(checkpoint, dtype, self._reserved())
        except OutOfMemory:
            pass  # tried again outside of it
        if self._quiet.is_set():
            await self._look()
        if self._quiet.is_set():  # what was in the way may have ended since it was counted
            return await self._cache.acquire(checkpoint, dtype)
        self._making_way.set()  # there may be room once what runs and what is staged has let go
        try:
            await self._quiet.wait()
            await self._look()
            return await self._cache.acquire(checkpoint, dtype)
        finally:
            self._making_way.clear()
            self._batcher.look_again()

    async def _put_back(self) -> bool:
        """Lets go of the module that an overtaken batch waits with; it asks for it again. Whether there was one."""
        cold = self.cold
        if cold is None or cold.loading is None or self._making_way.is_set():
            return False
        waiting = asyncio.ensure_future(self._making_way.wait())  # its load may fail, and then waits for this batch
        await asyncio.wait({cold.loading, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if not cold.loading.done():
            return True  # it holds nothing any more
        if cold.loading.cancelled() or cold.loading.exception() is not None:
            return False
        self._cache.release(cold.loading.result())
        cold.loading = None
        return True


def _begun_in(job: Job) -> tuple[Dtype, ...] | None:
    """The precision of the clip that a job goes on with: what it carries is of that."""
    return (job.clip.dtype,) if job.clip is not None and job.clip.dtype is not None else None
