"""The models folder: names -> checkpoints, kept up to date with what lies there."""

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

from app.errors import InvalidParameter, UnknownModel, UnsupportedCheckpoint
from app.store.checkpoint import Checkpoint
from app.store.describe import Digest, identify_source
from app.store.folder import Source, Stamp, names_of, source_of, sources, stamp, walk
from app.store.formats import Format

CHUNK = 1 << 20
PREFIX = 8  # hex digits of a sha256 that may stand for a name
LISTED = 20  # names in an error
REASON = 500  # characters of an error that is listed


@dataclass(frozen=True)
class Unreadable:
    """A file in the models folder that is no usable autoencoder, and why."""

    name: str
    path: Path
    format: Format
    error: str


Entry = Checkpoint | Unreadable


@dataclass(frozen=True)
class _Snapshot:
    """One look at the folder; replaced whole, so that readers on any thread see one state."""

    stamps: tuple[Stamp, ...] | None = None  # None before the first scan
    entries: dict[str, Entry] = field(default_factory=dict)


class ModelStore:
    """What the models folder holds. `scan` and `stale` touch the disk and belong on a thread; the rest does not."""

    def __init__(self, folder: Path, default_family: str | None = None) -> None:
        self.folder = folder
        self._default_family = default_family
        self._snapshot = _Snapshot()
        self._hashes: dict[tuple[Stamp, ...], Digest] = {}

    def scan(self) -> None:
        """Looks at every file, and reads those that are new or changed. A bad file never stops it."""
        stamps = walk(self.folder)
        now = {item.path: item for item in stamps}
        before = {entry.path: entry for entry in self._snapshot.entries.values()}
        entries: dict[str, Entry] = {}
        for source, name in sorted(names_of(sources(stamps, self.folder)).items(), key=lambda item: item[1].lower()):
            last = before.get(source.path)
            if isinstance(last, Checkpoint) and last.stamps == tuple(now.get(path) for path in source.watched):
                entries[name] = replace(last, name=name)
            else:
                entries[name] = self._entry(source, name)
        self._hashes = {key: value for key, value in self._hashes.items() if set(key) <= set(stamps)}
        self._snapshot = _Snapshot(stamps, entries)

    def stale(self) -> bool:
        """Whether any file was added, replaced or removed since the last scan; true before the first."""
        return walk(self.folder) != self._snapshot.stamps

    def entries(self) -> list[Entry]:
        """All models by name, usable or not, as of the last scan."""
        return list(self._snapshot.entries.values())

    def resolve(self, model: str | None, default: str | None = None) -> Checkpoint:
        """The checkpoint of a name or of a sha256 prefix; without one the default, else the only model there is.

        Raises UnknownModel, InvalidParameter when several models could be meant, UnsupportedCheckpoint for a file
        that is there but cannot be used.
        """
        entries = self._snapshot.entries
        wanted = default if model is None else model
        entry = _only(entries) if wanted is None else entries.get(wanted) or _by_hash(entries, wanted)
        if isinstance(entry, Unreadable):
            raise UnsupportedCheckpoint(f"model {entry.name}: {entry.error}")
        return entry

    def _entry(self, source: Source, name: str) -> Entry:
        try:
            return identify_source(source, name, self._default_family, self._digest)
        except UnsupportedCheckpoint as error:
            reason = " ".join(str(error).split())  # keys and values of the file are in it
            return Unreadable(name, source.path, source.format, reason[:REASON])

    def _digest(self, source: Source) -> Digest:
        try:
            stamps = tuple(stamp(path) for path in source.files)
        except OSError as error:
            raise UnsupportedCheckpoint(f"cannot be read: {error.strerror or error}") from error
        if stamps not in self._hashes:
            self._hashes[stamps] = sha256_of(source.files)
        return self._hashes[stamps]


def open_checkpoint(path: Path, default_family: str | None = None) -> Checkpoint:
    """The checkpoint at a path: a file, with its other half if it is one of a pair, or a diffusers folder.

    Raises UnsupportedCheckpoint, also when there is nothing at the path.
    """
    try:
        source = source_of(path)
    except OSError as error:
        raise UnsupportedCheckpoint(f"{path} cannot be read: {error.strerror or error}") from error
    return identify_source(source, source.stem, default_family, lambda source: sha256_of(source.files))


def sha256_of(files: tuple[Path, ...]) -> Digest:
    """The hash over all bytes of these files in order, and each file's own where there are two.

    Raises UnsupportedCheckpoint when a file cannot be read.
    """
    total = hashlib.sha256()
    halves = [hashlib.sha256() for _ in files] if len(files) > 1 else []
    try:
        for index, path in enumerate(files):
            with path.open("rb") as file:
                while data := file.read(CHUNK):
                    total.update(data)
                    if halves:
                        halves[index].update(data)
    except OSError as error:
        raise UnsupportedCheckpoint(f"cannot be read: {error.strerror or error}") from error
    return Digest(total.hexdigest(), tuple(half.hexdigest() for half in halves))


def _only(entries: dict[str, Entry]) -> Entry:
    usable = [entry for entry in entries.values() if isinstance(entry, Checkpoint)]
    if len(usable) == 1:
        return usable[0]
    if not usable:
        raise UnknownModel(f"the models folder holds no usable model{_listing(entries, ' (unusable: {})')}")
    names = _listing({entry.name: entry for entry in usable}, "{}")
    raise InvalidParameter(f"model is required, as there are several: {names}")


def _by_hash(entries: dict[str, Entry], prefix: str) -> Entry:
    """The model whose sha256 begins so; files with the same bytes are the same model."""
    digits = prefix.lower()
    if len(digits) >= PREFIX and set(digits) <= set("0123456789abcdef"):
        found = [item for item in entries.values() if isinstance(item, Checkpoint) and item.sha256.startswith(digits)]
        if len({item.sha256 for item in found}) > 1:
            raise InvalidParameter(f"{prefix} begins the sha256 of several models: {', '.join(i.name for i in found)}")
        if found:
            return found[0]
    raise UnknownModel(f"no model {prefix!r}; {_listing(entries, 'there are: {}') or 'there are none'}")


def _listing(entries: dict[str, Entry], template: str) -> str:
    names = list(entries)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return template.format(", ".join(names[:LISTED]) + more) if names else ""
