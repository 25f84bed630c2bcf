"""Keeps a store up to date with its folder while a service runs: looks, waits for files to be whole, reads them.

Nothing tells of changes on every file system, so the folder is looked at every second: names and stamps alone.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from app.errors import Unavailable, UnknownModel
from app.store.checkpoint import Checkpoint
from app.store.folder import Source
from app.store.names import Entry
from app.store.store import ModelStore

log = logging.getLogger("app.store")

SETTLING_SECONDS = 0.2
"""Between two looks at the folder while a file in it is being written."""

IDLE_SECONDS = 1.0
"""Between two looks while nothing is being written."""

CHEAP_SECONDS = 0.05
"""A look that takes longer than this, in a large folder or on a slow disk, is followed by as much longer a pause: its
share of a core stays below 5 %, and below 20 % while a file is being written."""

FIRST_SECONDS = 2.0
"""The first scan does not wait longer for files that are being written."""

PATIENCE_SECONDS = 2.5
"""A request waits so long at most for files that are being written or read; who lists models, for new ones alone."""

LARGE_BYTES = 1 << 30
"""Full checkpoints are read beside smaller files, which then need not wait for them."""


class Follower:
    """Follows one store's folder from `start` to `stop`. All methods belong to the event loop."""

    def __init__(self, store: ModelStore) -> None:
        self.store = store
        self.scanned = False  # all that lay in the folder at the start has been read
        self._looked = False
        self._cost = 0.0  # seconds of the last look
        self._unread: dict[bool, dict[Source, int]] = {False: {}, True: {}}  # small or large, with their bytes
        self._reading: dict[Source, int] = {}
        self._settling = False  # something is being written
        self._settling_since = 0.0
        self._started = 0.0
        self._tasks: list[asyncio.Task[None]] = []
        self._looking: asyncio.Task[None] | None = None
        self._stopping = False
        self._poked = asyncio.Event()  # something may have changed: look
        self._news = asyncio.Event()  # what is listed or to be read may be another; replaced at each time

    def start(self) -> None:
        """Begins to follow."""
        self._started = time.monotonic()
        self._tasks = [
            asyncio.create_task(work) for work in (self._follow(), self._read(large=False), self._read(large=True))
        ]

    async def stop(self) -> None:
        """Ends, and ends what is being read."""
        self._stopping = True
        self.store.close()
        self._poked.set()
        self._tell()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def first_scan(self, seconds: float | None = None) -> bool:
        """Waits until all that lay in the folder at the start has been read, at most so long; whether it has."""
        await self._until(lambda: self.scanned, seconds)
        return self.scanned

    async def look(self) -> None:
        """A look at the folder that begins after this call; those who call at once share one. Reads no weights."""
        if self._looking is not None and not self._looking.done():  # it may have passed by what the caller has in mind
            await asyncio.shield(self._looking)
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        await asyncio.shield(self._looking)

    async def entries(self) -> list[Entry]:
        """All models as the folder is now; files that have just come are waited for, unless they are large."""
        await self.look()

        def read() -> bool:
            writing = self._settling and time.monotonic() - self._settling_since < PATIENCE_SECONDS
            small = self._unread[False] or not all(map(_large, self._reading.values()))
            return not small and not writing and (self.scanned or self._busy())

        await self._until(read, PATIENCE_SECONDS)
        return self.store.entries()

    async def find(self, model: str | None, default: str | None) -> Checkpoint:
        """As `ModelStore.resolve`; what is not there is looked for, and waited for where a file is just coming.

        Raises Unavailable instead of UnknownModel while the folder is being read for the first time, and where nothing
        is named then: what is to be read may be the one that is meant.
        """
        if model is None and default is None:
            await self._until(lambda: self.scanned, PATIENCE_SECONDS)
            if not self.scanned:
                raise Unavailable("the models folder is still being read: name a model, or come back")
        with suppress(UnknownModel):
            found = self.store.resolve(model, default)
            if not await asyncio.to_thread(found.changed):  # a removed model is unknown from the next request on
                return found
        await self.look()

        def decided() -> bool:
            with suppress(UnknownModel):
                self.store.resolve(model, default)
                return True
            return self.scanned and not (self._settling or self._busy())

        await self._until(decided, PATIENCE_SECONDS)
        try:
            return self.store.resolve(model, default)
        except UnknownModel as error:
            if not self.scanned:
                raise Unavailable(f"the models folder is still being read: {error} so far") from None
            raise

    async def replaced(self, checkpoint: Checkpoint, seconds: float) -> None:
        """Waits until a checkpoint whose file has changed is listed as what it is now, or not at all."""
        await self.look()
        await self._until(lambda: not self.store.lists(checkpoint), seconds)

    async def listed(self, path: Path, seconds: float) -> Entry | None:
        """What a file that was just put there is listed as; None where that takes longer."""
        await self.look()

        def found() -> Entry | None:
            return next((entry for entry in self.store.entries() if entry.path == path), None)

        def current() -> bool:
            entry = found()
            return entry is not None and not (isinstance(entry, Checkpoint) and entry.changed())

        await self._until(current, seconds)
        return found() if current() else None

    async def unlisted(self, path: Path, seconds: float) -> None:
        """Waits until nothing of this path is listed."""
        await self.look()
        await self._until(lambda: all(entry.path != path for entry in self.store.entries()), seconds)

    async def _follow(self) -> None:
        while not self._stopping:
            self._poked.clear()
            looking = asyncio.create_task(self.look())
            await asyncio.wait([looking])
            if (error := looking.exception()) is not None:
                log.error("a bug met in looking at %s", _names(self.store), exc_info=error)
            pause = SETTLING_SECONDS if self._settling else IDLE_SECONDS
            with suppress(TimeoutError):
                await asyncio.wait_for(self._poked.wait(), pause * max(1.0, self._cost / CHEAP_SECONDS))

    async def _look(self) -> None:
        begun = time.monotonic()
        look = await asyncio.to_thread(self.store.look)
        self._cost = time.monotonic() - begun
        self._unread = {False: {}, True: {}}
        for source, size in look.unread.items():
            if source not in self._reading:
                self._unread[_large(size)][source] = size
        self._looked = True
        self._note_settling(look.settling)
        self._tell()

    async def _read(self, *, large: bool) -> None:
        while not self._stopping:
            unread = self._unread[large]
            if not unread:
                await self._news.wait()
                continue
            source = next(iter(unread))
            self._reading[source] = unread.pop(source)
            reading = asyncio.create_task(asyncio.to_thread(self.store.identify, source, more=bool(unread)))
            await asyncio.wait([reading])
            del self._reading[source]
            error = reading.exception()
            if error is not None and not isinstance(error, Unavailable):
                log.error("a bug met in %s", source.path, exc_info=error)
                self.store.give_up(source)
            elif error is None and not reading.result():
                self._note_settling(True)  # until the next look decides
            self._tell()

    def _note_settling(self, settling: bool) -> None:
        if settling and not self._settling:
            self._settling_since = time.monotonic()
            self._poked.set()  # who follows may be idle: this look may be a request's
        self._settling = settling

    def _tell(self) -> None:
        if self._looked and not (self._busy() or self._stopping):
            self.scanned |= not self._settling or time.monotonic() - self._started >= FIRST_SECONDS
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _busy(self) -> bool:
        """Whether something is to be read, or being read."""
        return bool(self._reading or any(self._unread.values()))

    async def _until(self, true: Callable[[], bool], seconds: float | None) -> None:
        """Waits until it is so, at most so long, and not beyond `stop`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not true() and not self._stopping:
                    await self._news.wait()


def _names(store: ModelStore) -> str:
    return ", ".join(map(str, store.folders))


def _large(size: int) -> bool:
    return size >= LARGE_BYTES
