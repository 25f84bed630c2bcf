"""The files of the models folders, how they are, and for how long: names and stamps alone, nothing is opened.

The layout is the WebUI's and ComfyUI's.
"""

import os
import stat
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from app.weights.files import SUFFIXES

ROOTS = frozenset({"vae", "vae_approx", "vae-approx", "vae-taesd", "stable-diffusion", "checkpoints"})  # in any case
DEEPEST = 64  # folders in folders: os.walk calls itself
WANTED = (*SUFFIXES, ".json")  # in any case
DOWNLOADING = ".aria2"  # beside a file that aria2 has made as large as it will be, and is still filling

QUIET_SECONDS = 0.5
"""A file that was written a moment ago is read once it has been left alone for so long."""

DOUBT_SECONDS = 1.4
"""So long it must have been left alone before it is believed to be broken: a download may pause."""

OLD_SECONDS, OLD_AT_FIRST = 0.5, 0.05
"""Written so long ago, a file is not being written: it was moved here, or lay here at the first look."""


@dataclass(frozen=True)
class Stamp:
    """A file's state without its bytes; it changes when the file is written, replaced or made readable."""

    path: Path
    size: int
    mtime_ns: int
    inode: int
    mode: int


def stamp(path: Path) -> Stamp:
    """The state of a file; follows links. Raises OSError."""
    return _stamp(path, path.stat())


def stamps_of(paths: Iterable[Path]) -> tuple[Stamp | None, ...]:
    """How files are now; None for one that is gone or may not be looked at."""
    found: list[Stamp | None] = []
    for path in paths:
        try:
            found.append(stamp(path))
        except OSError:
            found.append(None)
    return tuple(found)


def walk(folders: Iterable[Path], before: Mapping[str, Stamp]) -> dict[str, Stamp]:
    """The stamps by path of every regular file under these models folders that could matter; opens none.

    Those that are as they were `before` are the same objects. Links are followed; a directory that was seen already,
    under another folder too, is not entered again. Hidden names are skipped, and so are partial downloads, whose last
    suffix is none of ours.
    """
    stamps: dict[str, Stamp] = {}
    seen: set[tuple[int, int]] = set()
    for root in [root for folder in folders for root in _roots(folder)]:
        for top, inside, names in os.walk(root, followlinks=True):
            place = _place(top)
            if place is None or place in seen:
                inside.clear()
                continue
            seen.add(place)
            deepest = len(Path(top).parts) - len(root.parts) >= DEEPEST
            inside[:] = [] if deepest else sorted(name for name in inside if not name.startswith("."))
            there = set(names)
            for name in sorted(names):
                if name.startswith(".") or not name.lower().endswith(WANTED) or name + DOWNLOADING in there:
                    continue
                path = os.path.join(top, name)  # noqa: PTH118  a Path for each file of each look is most of its cost
                if (item := _look(path, before.get(path))) is not None:
                    stamps[path] = item
    return stamps


class Rest:
    """How long each file of a folder has been left alone: what its stamps tell from one look to the next."""

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


def _stamp(path: Path, status: os.stat_result) -> Stamp:
    return Stamp(path, status.st_size, status.st_mtime_ns, status.st_ino, status.st_mode)


def _look(path: str, before: Stamp | None) -> Stamp | None:
    """The file's stamp; None for one that has gone, a link to nowhere, and what may hang when it is opened."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    state = (status.st_size, status.st_mtime_ns, status.st_ino, status.st_mode)
    if before is not None and state == (before.size, before.mtime_ns, before.inode, before.mode):
        return before
    return _stamp(Path(path), status) if stat.S_ISREG(status.st_mode) else None


def _roots(folder: Path) -> list[Path]:
    try:
        roots = [path for path in folder.iterdir() if path.name.lower() in ROOTS]
    except OSError:  # not there, or not a folder
        return []
    return sorted(path for path in roots if _is_dir(path)) or [folder]


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # pathlib raises where it may not look
        return False


def _place(path: str) -> tuple[int, int] | None:
    """Device and inode of a directory; None for one that has gone since it was listed."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    return status.st_dev, status.st_ino
