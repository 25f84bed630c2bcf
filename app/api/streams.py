"""Streams of previews: between those who send latents and the one who looks on. The newest goes first, alone."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fastapi import Response

from app.api.door.room import Held
from app.api.errors import UnknownStream
from app.errors import Overloaded, ServiceError, Unavailable

STREAMS = 16
"""Looked on at once."""
IDLE_SECONDS = 300.0
"""A stream to which no latent comes for so long ends."""
WHOLE_SECONDS = 3600.0
"""So does one that has been looked on for so long: whoever still looks opens it again."""

Make = Callable[[], Awaitable[Response]]
"""Makes the picture of a latent."""


@dataclass(frozen=True)
class Waiting:
    """A latent that came."""

    make: Make
    nbytes: int


class Stream:
    """One that is looked on. Belongs to the event loop."""

    def __init__(self, held: Held) -> None:
        self._held = held
        self._waiting: Waiting | None = None
        self._moved = asyncio.Event()  # something waits, or it is over
        self._over = False
        self._lost: str | None = None

    def put(self, waiting: Waiting) -> str | None:
        """Shows a latent, instead of one that still waits; why the last one was not shown. Raises TooManyBytes."""
        self._held.take(waiting.nbytes)
        if self._waiting is not None:
            self._held.give_back(self._waiting.nbytes)
        self._waiting = waiting
        self._moved.set()
        lost, self._lost = self._lost, None
        return lost

    @property
    def waits(self) -> bool:
        """Whether a latent does."""
        return self._waiting is not None

    def end(self) -> None:
        """After the picture that is being made."""
        self._over = True
        self._moved.set()

    async def pictures(self) -> AsyncIterator[Response]:
        """The answers to its latents, until it ends, or for as long as they come."""
        end = asyncio.get_running_loop().time() + WHOLE_SECONDS
        while (waiting := await self._next(end)) is not None:
            try:
                picture = await waiting.make()
            except ServiceError as error:  # of this latent: the next one may be shown
                self._lost = str(error)
                continue
            finally:
                self._held.give_back(waiting.nbytes)
            yield picture

    async def _next(self, end: float) -> Waiting | None:
        left = end - asyncio.get_running_loop().time()
        try:
            await asyncio.wait_for(self._moved.wait(), min(left, IDLE_SECONDS))
        except TimeoutError:
            return None
        if self._over:
            return None
        self._moved.clear()
        waiting, self._waiting = self._waiting, None
        return waiting


class Streams:
    """All that are looked on, by name. Belongs to the event loop."""

    def __init__(self) -> None:
        self._streams: dict[str, Stream] = {}
        self._over = False

    @contextmanager
    def opened(self, name: str, held: Held) -> Iterator[Stream]:
        """A stream for as long as it is looked on; one of that name ends. Raises Overloaded and Unavailable.

        Whoever was cut off may look on again at once, before the service knows that the connection is lost.
        """
        if self._over:
            raise Unavailable("the service is shutting down")
        if name in self._streams:
            self._streams.pop(name).end()
        if len(self._streams) >= STREAMS:
            raise Overloaded(f"{len(self._streams)} streams of previews are looked on already", retry_after=10.0)
        stream = self._streams[name] = Stream(held)
        try:
            yield stream
        finally:
            stream.end()
            if self._streams.get(name) is stream:
                del self._streams[name]

    def get(self, name: str) -> Stream:
        """The stream of this name. Raises UnknownStream where nobody looks on."""
        if name not in self._streams:
            raise UnknownStream(f"nobody looks on at the stream {name}: GET /preview/stream?stream={name} first")
        return self._streams[name]

    def end(self) -> None:
        """Every one, and none begins."""
        self._over = True
        for stream in self._streams.values():
            stream.end()
