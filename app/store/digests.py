"""What a source's weights are called for good: the sha256 of its bytes, and a digest over its tensors.

The digests of a folder are kept in a JSON file inside it, so that a restart reads headers and not gigabytes.
"""

import hashlib
import json
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from app.store.checkpoint import told_of
from app.store.known import Known, lookup
from app.store.tree import Stamp
from app.weights.files import WeightFile, open_regular
from app.weights.parts import parted
from app.weights.renames import canonical_keys

CACHE = ".latentd-hashes.json"  # hidden, so that no scan takes it for a sidecar
VERSION = 1  # of the file, and of what `Digest.tensors` is taken over
ROWS = 4096  # kept at most, those used last; files that have gone are among them
CACHE_LIMIT = 16 << 20  # bytes of the file that are read


@dataclass(frozen=True)
class Digest:
    """sha256 of a source's bytes, of each file where there are two, and over its autoencoder's tensors."""

    sha256: str
    halves: tuple[str, ...]
    tensors: str


def digest_of(files: Sequence[WeightFile], check: Callable[[], None] = lambda: None) -> Digest:
    """Reads these files once, each from its first byte to its last.

    `tensors` is one that a renamed, converted or extracted copy of an autoencoder shares: sha256 over the lines `NAME
    SHAPE SHA256` of its tensors in order of their LDM names. Values count as float16, so a float32 file and its float16
    conversion have one digest, and files that differ by less than that are not told apart; every NaN counts as one. A
    1x1 convolution has the shape of a linear layer. BatchNorm's counter is left out.

    `check` is called between pieces and may raise. Raises UnsupportedCheckpoint when a file cannot be read.
    """
    row = told_of(files)
    total, halves, lines = hashlib.sha256(), [], []
    for file in (parted(each, row) for each in files):
        halves.append(hashlib.sha256())
        take = partial(_feed, check, [total, halves[-1]] if len(files) > 1 else [total])
        names = canonical_keys(file.tensors, row, file.path.stem)
        for key, tensor in file.read_all(names, take):
            if names[key] not in row.counters:
                lines.append(f"{names[key]} {_line_of(tensor)}\n")
    tensors = hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
    each = tuple(half.hexdigest() for half in halves)
    return Digest(total.hexdigest(), each if len(files) > 1 else (), tensors)


def _feed(check: Callable[[], None], hashes: Iterable["hashlib._Hash"], data: bytearray) -> None:
    check()
    for each in hashes:
        each.update(data)


def _line_of(tensor: Tensor) -> str:
    shape = tuple(tensor.shape)
    if len(shape) == 4 and shape[2:] == (1, 1):
        shape = shape[:2]
    half = tensor.to(torch.float16).contiguous()
    half = half.masked_fill(half.isnan(), float("nan"))  # one pattern of bits
    return f"{'x'.join(map(str, shape))} {hashlib.sha256(half.numpy().data).hexdigest()}"


Key = tuple[tuple[str, int, int], ...]  # of each file: path in the folder, size, mtime in ns
Identity = tuple[tuple[int, int, int], ...]  # of each file: inode, size, mtime in ns


class DigestCache:
    """Digests by the state of their files, in memory and in the folder's CACHE; any thread may ask.

    A row of the file counts when its paths are met first: from then on this process sees for itself, and a file that
    takes another's place with the same size and time is another inode. A renamed file keeps its inode and digest.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock, self._saving = threading.Lock(), threading.Lock()
        self._rows: dict[Key, Digest] | None = None
        self._seen: dict[Identity, Digest] = {}
        self._met: set[tuple[str, ...]] = set()
        self._dirty = False

    def get(self, stamps: tuple[Stamp, ...]) -> Digest | None:
        """The digest of files in this state, if it was taken before."""
        with self._lock:
            rows, key, identity = self._loaded(), self._key(stamps), _identity(stamps)
            paths = tuple(path for path, _, _ in key)
            digest = self._seen.get(identity)
            if digest is None and paths not in self._met:
                digest = rows.get(key)
            self._met.add(paths)
            if digest is not None:
                self._keep(key, identity, digest)
            return digest

    def put(self, stamps: tuple[Stamp, ...], digest: Digest) -> None:
        """Remembers the digest of files in this state."""
        with self._lock:
            self._loaded()
            self._keep(self._key(stamps), _identity(stamps), digest)

    def twin(self, tensors: str) -> Known | None:
        """The known file, here now or once, that has these tensors."""
        with self._lock:
            same = [row for row in self._loaded().values() if row.tensors == tensors]
        return next((known for row in same if (known := lookup(row.sha256, row.halves))), None)

    def save(self) -> None:
        """Writes the file if there is something new; in a folder that cannot be written to, the memory must do."""
        with self._saving:  # whoever comes later has more to write
            self._save()

    def _keep(self, key: Key, identity: Identity, digest: Digest) -> None:
        self._seen[identity] = digest
        rows = self._loaded()
        if rows.get(key) == digest:
            return
        for other in [other for other in rows if _paths(other) == _paths(key)]:
            del rows[other]  # what lay there before
        rows[key] = digest
        self._dirty = True

    def _save(self) -> None:
        with self._lock:
            if not self._dirty:
                return
            self._dirty = False
            rows = self._loaded()
            paths = {_paths(key) for key in rows}
            others = {key: row for key, row in self._stored().items() if _paths(key) not in paths}  # of other processes
            merged = dict(list((others | rows).items())[-ROWS:])
        content = [
            {"files": key, "sha256": row.sha256, "halves": row.halves, "tensors": row.tensors}
            for key, row in merged.items()
        ]
        partial = self._folder / f"{CACHE}.{secrets.token_hex(4)}"  # in containers every service is process 1
        try:
            partial.write_text(json.dumps({"version": VERSION, "rows": content}))
            partial.replace(self._folder / CACHE)
        except OSError:
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def _key(self, stamps: tuple[Stamp, ...]) -> Key:
        return tuple((os.path.relpath(item.path, self._folder), item.size, item.mtime_ns) for item in stamps)

    def _loaded(self) -> dict[Key, Digest]:
        if self._rows is None:
            self._rows = self._stored()
        return self._rows

    def _stored(self) -> dict[Key, Digest]:
        """The rows of the file; none of one that is not ours, of another version, or torn."""
        try:
            with open_regular(self._folder / CACHE) as file:
                content = json.loads(file.read(CACHE_LIMIT))
            if content["version"] != VERSION:
                return {}
            return dict(_row(row) for row in content["rows"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return {}


def _row(row: dict[str, object]) -> tuple[Key, Digest]:
    match row:
        case {"files": [*files], "sha256": str(sha256), "halves": [*halves], "tensors": str(tensors)}:
            hashes = (sha256, tensors, *halves)
            sound = all(isinstance(each, str) and len(each) == 64 and int(each, 16) >= 0 for each in hashes)
            if sound and files:
                return tuple(_file(item) for item in files), Digest(sha256, tuple(map(str, halves)), tensors)
    raise ValueError("not a row of ours")


def _file(item: object) -> tuple[str, int, int]:
    match item:
        case [str(path), int(size), int(mtime)]:
            return path, size, mtime
    raise ValueError("not a file of ours")


def _paths(key: Key) -> tuple[str, ...]:
    return tuple(path for path, _, _ in key)


def _identity(stamps: Iterable[Stamp]) -> Identity:
    return tuple((item.inode, item.size, item.mtime_ns) for item in stamps)
