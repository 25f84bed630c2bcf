"""The files of the models folders, and how they are: names and stamps alone, nothing is opened.

The layout is the WebUI's and ComfyUI's.
"""

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from app.weights.files import SUFFIXES

ROOTS = frozenset({"vae", "vae_approx", "vae-approx", "vae-taesd", "stable-diffusion", "checkpoints"})  # in any case
DEEPEST = 64  # folders in folders: os.walk calls itself
DOWNLOADING = ".aria2"  # beside a file that aria2 has made as large as it will be, and is still filling


@dataclass(frozen=True, order=True)
class Stamp:
    """A file's state without its bytes; it changes when the file is written, replaced or made readable."""

    path: Path
    size: int
    mtime_ns: int
    inode: int
    mode: int


@dataclass(frozen=True)
class Place:
    """A directory, as it is on the disk: another one of the same path is another place."""

    path: Path
    device: int
    inode: int


@dataclass(frozen=True)
class Tree:
    """One walk over the models folders."""

    stamps: tuple[Stamp, ...] = ()  # all files that could matter, in order of their paths
    places: frozenset[Place] = frozenset()  # where everything that comes or goes matters
    entries: frozenset[Path] = frozenset()  # what matters elsewhere: targets of links, the folders themselves


def stamp(path: Path) -> Stamp:
    """The state of a file; follows links. Raises OSError."""
    status = path.stat()
    return Stamp(path, status.st_size, status.st_mtime_ns, status.st_ino, status.st_mode)


def walk(folders: Iterable[Path]) -> Tree:
    """Looks at every file under these models folders that could matter; opens none.

    Links are followed; a directory that was seen already, under another folder too, is not entered again. Hidden names
    are skipped, and so are partial downloads, whose last suffix is none of ours.
    """
    stamps: list[Stamp] = []
    folders = list(folders)
    places = {place for place in map(_place, folders) if place}
    entries = set(map(_landmark, folders))
    seen: set[tuple[int, int]] = set()
    for root in [root for folder in folders for root in _roots(folder)]:
        for top, inside, names in os.walk(root, followlinks=True):
            place = _place(Path(top))
            if place is None or (place.device, place.inode) in seen:
                inside.clear()
                continue
            seen.add((place.device, place.inode))
            places.add(place)
            deepest = len(Path(top).parts) - len(root.parts) >= DEEPEST
            inside[:] = [] if deepest else sorted(name for name in inside if not name.startswith("."))
            for item, target in _stamps(Path(top), names):
                stamps.append(item)
                entries.update(target)
    return Tree(tuple(sorted(stamps)), frozenset(places), frozenset(entries))


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


def _place(path: Path) -> Place | None:
    try:
        status = path.stat()
        return Place(path.resolve(), status.st_dev, status.st_ino)
    except OSError:  # gone since it was listed
        return None


def _landmark(folder: Path) -> Path:
    """Whose coming and going would be the folder's: itself, or the first part of its path that is missing."""
    path = folder.absolute()
    while not _is_dir(path.parent):
        path = path.parent
    return path.parent.resolve() / path.name


def _stamps(place: Path, names: Iterable[str]) -> Iterator[tuple[Stamp, tuple[Path, ...]]]:
    """(stamp, the link's target if it is one) of each file that could matter; to open a pipe or a device may hang."""
    there = set(names)
    for name in names:
        if name.startswith(".") or Path(name).suffix.lower() not in (*SUFFIXES, ".json") or name + DOWNLOADING in there:
            continue
        path = place / name
        try:
            item = stamp(path)
            if stat.S_ISREG(item.mode):
                yield item, (path.resolve(),) if path.is_symlink() else ()
        except OSError:  # gone since it was listed, or a link to nowhere
            continue
