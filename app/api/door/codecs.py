"""Threads for what turns bytes into pixels and pixels into bytes.

They are as many as the cores: more would not be faster, and whatever is small (headers, the folder, a plan) has threads
of its own and never waits behind a picture.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from app.api.door.room import Room

T = TypeVar("T")


class Codecs:
    """Runs such work, within the room that there is. Belongs to the event loop; whoever makes it closes it."""

    def __init__(self, room: Room, threads: int) -> None:
        self._room = room
        self._threads = ThreadPoolExecutor(threads, "codec")

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """The result of `work`, which takes `size` bytes of memory; waits for room and for a thread.

        Work that is cancelled before it has begun never begins; begun, it holds its room to its end.
        """
        await self._room.enter(size)
        loop = asyncio.get_running_loop()
        future = self._threads.submit(work)
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._room.leave, size))
        return await asyncio.wrap_future(future)

    async def run_all(self, work: Sequence[tuple[int, Callable[[], T]]]) -> list[T]:
        """`run` for each of (size, work), as many at once as may be; the first error ends what has not begun."""
        tasks = [asyncio.ensure_future(self.run(size, one)) for size, one in work]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def close(self) -> None:
        """Waits for what has begun; nothing else begins."""
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)
