"""Room for so much at once, shared by the files of a command."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Room:
    """So much of something in flight at once, in `least` pieces at any rate: what is more than all of it goes too."""

    def __init__(self, limit: int, least: int = 1) -> None:
        self._limit = limit
        self._least = least
        self._taken = self._pieces = 0
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def of(self, amount: int) -> AsyncIterator[None]:
        """Waits for room, and holds it."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._pieces < self._least or self._taken + amount <= self._limit)
            self._taken += amount
            self._pieces += 1
        try:
            yield
        finally:
            self._taken -= amount
            self._pieces -= 1
            async with self._changed:
                self._changed.notify_all()
