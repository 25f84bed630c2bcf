"""A request's room in the queue, and its work there."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from app.engine.batcher import Ticket
from app.engine.jobs import Job, Result, Task, check_shape
from app.engine.worker import Worker
from app.store.checkpoint import Checkpoint

T = TypeVar("T")
Shape = tuple[int, ...]


class Admission:
    """Room in one device's queue for some arrays of one task; `run` takes it up, or it is given back."""

    def __init__(self, worker: Worker, ticket: Ticket, task: Task, deadline: float | None) -> None:
        self._worker = worker
        self._ticket: Ticket | None = ticket
        self._task = task
        self._deadline = deadline

    async def run(self, arrays: Sequence[np.ndarray]) -> list[Result]:
        """Queues one job an array and waits for all of them; the first error is raised, the others are dropped."""
        for array in arrays:
            check_shape(self._task, array.shape)
        loop = asyncio.get_running_loop()
        jobs = [Job(self._task, array, self._deadline, loop.create_future()) for array in arrays]
        ticket, self._ticket = self._ticket, None  # from here on the jobs stand for it, each leaves by itself
        assert ticket is not None, "an admission runs once"
        self._worker.batcher.put(ticket, jobs)
        try:
            return list(await asyncio.gather(*(job.future for job in jobs)))
        finally:
            for job in jobs:
                job.future.cancel()

    def close(self) -> None:
        """Gives the room back if no job took it."""
        if self._ticket is not None:
            self._worker.batcher.give_back(self._ticket)


@dataclass(frozen=True)
class Work(Generic[T]):
    """What a request wants of one checkpoint: arrays of these shapes for each task, and what is done once they may run.

    `do` is called with an `Admission` for each of `parts`.
    """

    parts: Sequence[tuple[Task, Sequence[Shape]]]
    do: Callable[..., Awaitable[T]]


Prepare = Callable[[Checkpoint], Work[T]]
"""The work of a request on the checkpoint that its model's name means; raises what refuses it."""
