"""Whether a file is still being written: what its stamps tell from one look at a folder to the next."""

import time
from collections.abc import Iterable
from pathlib import Path

from app.store.tree import Stamp

QUIET_SECONDS = 0.5
"""A file that was written a moment ago is read once it has been left alone for so long."""

DOUBT_SECONDS = 1.4
"""So long it must have been left alone before it is believed to be broken: a download may pause."""

OLD_SECONDS, OLD_AT_FIRST = 1.0, 0.05
"""Written so long ago, a file is not being written: it was moved here, or lay here at the first look."""


class Rest:
    """How long each file of a folder has been left alone."""

    def __init__(self) -> None:
        self.looks = 0
        self._stamps: dict[Path, Stamp] = {}
        self._since: dict[Path, float] = {}  # when a file was first seen as it is, on time.monotonic()
        self._written: set[Path] = set()  # files that were seen to change in place

    def note(self, stamps: Iterable[Stamp]) -> None:
        """Takes in one look."""
        now, before, since, written = time.monotonic(), self._stamps, {}, set()
        self._stamps = {item.path: item for item in stamps}
        for path, item in self._stamps.items():
            last = before.get(path)
            since[path] = self._since[path] if last == item else now
            if last is not None and last.inode == item.inode and (last != item or path in self._written):
                written.add(path)
        self._since, self._written = since, written
        self.looks += 1

    def stamps(self, paths: Iterable[Path]) -> tuple[Stamp | None, ...]:
        """How these files were at the last look; None for one that was not there."""
        return tuple(self._stamps.get(path) for path in paths)

    def rests(self, stamps: Iterable[Stamp | None], quiet: float, old: float) -> bool:
        """Whether each file was seen unchanged for `quiet` seconds, or came here `old` seconds after its last write.

        Clocks of file servers may be off: of a file that was seen to change in place, the time of writing says nothing.
        """
        now, wall = time.monotonic(), time.time()
        return all(
            now - self._since.get(item.path, now) >= quiet
            or (item.path not in self._written and wall - item.mtime_ns / 1e9 >= old)
            for item in stamps
            if item is not None
        )
