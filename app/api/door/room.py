"""Host memory that requests may take together: bodies that come, what codecs work on, answers that leave."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from app.errors import TooManyBytes

T = TypeVar("T")


class Room:
    """Counts bytes against a total. Belongs to the event loop.

    Bodies are refused where they do not fit, work waits. What is larger than the total gets in where it is alone, so
    that every request that the other limits allow can be served.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        self._at_work = 0  # pieces of work, whatever their size
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    def take(self, size: int, own: int) -> None:
        """Room for `size` bytes of a body of which `own` are counted already. Raises TooManyBytes."""
        if self.used > own and self.used + size > self.total:
            raise TooManyBytes(
                f"too many bytes in flight: this body's {own + size}, with the {self.used - own} that other requests "
                f"hold, are more than {self.total}"
            )
        self.used += size

    def add(self, size: int) -> None:
        """Counts bytes that are there already, as an answer's are."""
        self.used += size

    def give_back(self, size: int) -> None:
        """Undoes `take` or `add`."""
        self.used -= size
        self._let_in()

    async def enter(self, size: int) -> None:
        """Waits for room for work that takes `size` bytes, first come, first served; `leave` undoes it.

        A piece of work always gets in where no other is at work: what fills the room may be waiting here itself.
        """
        entry = (size, asyncio.get_running_loop().create_future())
        self._waiting.append(entry)
        self._let_in()
        try:
            await entry[1]
        except asyncio.CancelledError:
            if entry in self._waiting:
                self._waiting.remove(entry)
                self._let_in()
            elif not entry[1].cancelled():  # let in and cancelled at once
                self.leave(size)
            raise

    def leave(self, size: int) -> None:
        """The work is done, and its memory free."""
        self._at_work -= 1
        self.give_back(size)

    def _let_in(self) -> None:
        while self._waiting and (not self._at_work or self.used + self._waiting[0][0] <= self.total):
            size, entered = self._waiting.popleft()
            if not entered.done():
                self._at_work += 1
                self.used += size
                entered.set_result(None)


class Held:
    """What one request holds of the room, until it has its answer, or has no more use for it."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._size = 0

    def take(self, size: int) -> None:
        """As `Room.take`."""
        self._room.take(size, self._size)
        self._size += size

    def add(self, size: int) -> None:
        """As `Room.add`."""
        self._room.add(size)
        self._size += size

    def give_back(self, size: int | None = None) -> None:
        """So much of it, or all."""
        size = self._size if size is None else size
        self._size -= size
        self._room.give_back(size)


class Codecs:
    """Threads that turn bytes into pixels and pixels into bytes, within the room that there is.

    They are as many as the cores: more would not be faster, and whatever is small (headers, the folder, a plan) has
    threads of its own and never waits behind a picture. Belongs to the event loop; whoever makes it closes it.
    """

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
