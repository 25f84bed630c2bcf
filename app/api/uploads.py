"""Threads for what comes into the models folders, and the names of what is on its way there."""

import asyncio
import errno
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

from app.errors import DiskFull, ModelExists, Overloaded, Unavailable
from app.store.incoming import sweep

UPLOADS = 2
"""At once: each has a thread that writes, and that reads the file for its hash at the end."""

P = ParamSpec("P")
T = TypeVar("T")


class Uploads:
    """Belongs to the event loop."""

    def __init__(self, folders: Sequence[Path], most_bytes: int) -> None:
        self.folders = tuple(folders)
        self.most_bytes = most_bytes
        self._threads = ThreadPoolExecutor(UPLOADS, "upload")
        self._names: set[str] = set()

    async def start(self) -> None:
        """Removes what a process that died left half-way."""
        await self.run(sweep, self.folders)

    @contextmanager
    def named(self, name: str) -> Iterator[None]:
        """The name for as long as its file is on its way. Raises ModelExists and Overloaded."""
        key = name.casefold()  # some file systems take both for one
        if key in self._names:
            raise ModelExists(f"{name} is being uploaded already")
        if len(self._names) >= UPLOADS:
            raise Overloaded(f"{len(self._names)} models are being uploaded already", retry_after=10.0)
        self._names.add(key)
        try:
            yield
        finally:
            self._names.discard(key)

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of `work` on one of the threads. Raises DiskFull for what a full disk, or a quota, refuses."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, partial(work, *args, **kwargs))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFull(f"the disk of the models folder is full: {error.strerror}") from None
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise Unavailable(f"the models folder cannot be written to: {error.strerror}") from None
            raise

    async def close(self) -> None:
        """Waits for what is being written."""
        await asyncio.to_thread(self._threads.shutdown)
