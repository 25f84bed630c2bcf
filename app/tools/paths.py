"""Which files a command takes, and where what it makes of them goes. Opens none; its time grows with their number."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.errors import InvalidInput

STDIO = "-"
NAMED = 3  # files that an error names


@dataclass(frozen=True)
class Kind:
    """What an operation reads and writes."""

    suffixes: frozenset[str]  # of the files that are taken out of a folder
    others: frozenset[str]  # files of a folder that somebody might expect to be taken, and that are not read
    media: Mapping[str, str]  # suffixes of what it writes, with their types; the first is the usual one

    @property
    def usual(self) -> str:
        """The suffix of what it writes into a folder."""
        return next(iter(self.media))


ENCODE = Kind(
    frozenset({".avif", ".png", ".jpg", ".jpeg", ".webp", ".mp4", ".webm", ".mkv"}),
    frozenset({".bmp", ".gif", ".heic", ".heif", ".ico", ".jp2", ".jxl", ".ppm", ".psd", ".tga", ".tif", ".tiff"}),
    {".npy": "application/x-npy", ".safetensors": "application/x-safetensors"},
)
DECODE = Kind(
    frozenset({".latent", ".npy", ".npz", ".pt", ".safetensors"}),
    frozenset({".bin", ".ckpt", ".pth"}),
    {
        ".png": "image/png",
        ".jpg": "image/jpeg",
        ".jpeg": "image/jpeg",
        ".webp": "image/webp",
        ".avif": "image/avif",
        ".zip": "application/zip",
        ".apng": "image/apng",
        ".mp4": "video/mp4",
        ".webm": "video/webm",
        ".mkv": "video/x-matroska",
    },
)


@dataclass(frozen=True)
class Item:
    """One file to read, and where what is made of it goes."""

    source: Path | None  # None: stdin
    target: Path | None  # None: stdout
    home: Path | None = None  # the folder that was given, or the one that the file lies in
    inside: str = ""  # the source's path in it

    @property
    def name(self) -> str:
        """For messages."""
        return "stdin" if self.source is None else str(self.source)


@dataclass(frozen=True)
class Found:
    """What is to be done."""

    items: Sequence[Item]
    folder: Path | None  # where the targets go, if into a folder
    passed_over: Mapping[str, int]  # files of folders that are not read, counted by suffix


def find(inputs: Sequence[str], output: str, kind: Kind) -> Found:
    """The files of the inputs and their targets; folders are walked, hidden names left out, and keep their layout.

    `output` is a folder; or for one file another file, which its suffix tells, or `-`. Raises InvalidInput when there
    is nothing to do, two inputs would be written to one file, or there are several for one file.
    """
    passed_over: Counter[str] = Counter()
    sources: list[tuple[Path | None, Path, str]] = []  # (file, home, path in it)
    homes: dict[str, Path] = {}
    for name in inputs:  # of a hundred thousand: paths as text, which takes half the time
        if name == STDIO:
            sources.append((None, Path(), f"stdin{kind.usual}"))
        elif os.path.isdir(name):  # noqa: PTH112
            home = Path(name)
            sources += [(home / inside, home, inside) for inside in _inside(home, kind, passed_over)]
        else:
            parent, inside = os.path.split(name)
            sources.append((Path(name), homes.setdefault(parent, Path(parent)), inside))
    if not sources:
        expected = ", ".join(sorted(kind.suffixes))
        raise InvalidInput(f"no files of {expected} in {', '.join(inputs)}{_passed_over(passed_over)}")
    single = output == STDIO or (Path(output).suffix.lower() in kind.media and not Path(output).is_dir())
    if single:
        if len(inputs) > 1 or (inputs[0] != STDIO and Path(inputs[0]).is_dir()):
            raise InvalidInput(f"-o {output} is one file, and there are {len(sources)} to write: name a folder")
        ((source, home, inside),) = sources
        return Found([Item(source, None if output == STDIO else Path(output), home, inside)], None, {})
    folder = Path(output)
    targets = [os.path.splitext(inside)[0] + kind.usual for _, _, inside in sources]  # noqa: PTH122  a Path each is slow
    if twice := sorted(target for target, count in Counter(targets).items() if count > 1):
        raise InvalidInput(f"several inputs would be written to {named(twice)}: give them different names")
    items = [
        Item(source, folder / target, home, inside)
        for (source, home, inside), target in zip(sources, targets, strict=True)
    ]
    return Found(items, folder, passed_over)


def named(names: Sequence[str]) -> str:
    """The first few of many, for a message."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _inside(folder: Path, kind: Kind, passed_over: Counter[str]) -> list[str]:
    """The paths in a folder of the files that are taken, in order."""
    found = []
    for top, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122
            if name.startswith(".") or suffix not in kind.suffixes | kind.others:
                continue
            path = os.path.join(top, name)  # noqa: PTH118
            if suffix in kind.others:
                passed_over[suffix] += 1
            elif os.path.isfile(path):  # noqa: PTH113  a pipe would be waited for
                found.append(os.path.relpath(path, folder))
    return sorted(found)


def _passed_over(counts: Mapping[str, int]) -> str:
    return f"; not read: {listed(counts)}" if counts else ""


def listed(counts: Mapping[str, int]) -> str:
    """`3 .gif, 1 .bmp`."""
    return ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items()))
