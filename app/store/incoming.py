"""Files on their way into a models folder, and out of it: whole and read before they are seen, never over another.

What is coming lies in a hidden folder beside its place, which no look at the models folder enters, and is locked by the
process that writes it: the lock of one that has died is free.
"""

import fcntl
import os
import secrets
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from app.errors import InvalidParameter, ModelExists, ModelKept
from app.store.checkpoint import Checkpoint
from app.store.declared import from_sidecar
from app.store.folder import source_of
from app.store.tree import ROOTS
from app.weights.files import SUFFIXES, suffix_for

HIDDEN = ".latentd-upload-"
UNSOUND = frozenset('/\\:*?"<>|\ufffd')
"""Of some system's file names; the last is what bytes that are no UTF-8 have become on their way here."""
LONGEST = 200
"""Bytes of a name: most file systems end at 255, suffix included."""


def stem_of(name: str) -> str:
    """What a file of this name would be called; a suffix of weights is taken off. Raises InvalidParameter."""
    stem = next((name[: -len(suffix)] for suffix in SUFFIXES if name.lower().endswith(suffix)), name)
    sound = stem.isprintable() and not stem.startswith(".") and stem == stem.strip() and not set(stem) & UNSOUND
    if not stem or not sound or len(stem.encode(errors="surrogateescape")) > LONGEST:
        raise InvalidParameter(
            f"a new model's name is a file's: up to {LONGEST} bytes without / \\ : * ? \" < > |, control characters, "
            f"bytes that are no UTF-8, a dot at its beginning or blanks around it; got {name[:80]!r}"
        )
    return stem


def place_for(folders: Sequence[Path]) -> Path:
    """Where new models go: the VAE folder of the first models folder, or itself where it has no such folders."""
    first = folders[0]
    roots = [path for path in sorted(first.iterdir()) if path.name.lower() in ROOTS and path.is_dir()]
    return next((path for path in roots if path.name.lower() == "vae"), first / "VAE" if roots else first)


class Incoming:
    """One file that is being written, out of sight. All methods block; `discard` at the end, whatever happened."""

    def __init__(self, place: Path, stem: str) -> None:
        place.mkdir(exist_ok=True)
        self._place, self._stem = place, stem
        self._home = place / f"{HIDDEN}{secrets.token_hex(8)}"
        self._home.mkdir()
        self.path = self._home / f"{stem}.part"
        self._file: BinaryIO = self.path.open("xb")
        with suppress(OSError):  # a file system without locks: what is left behind is then removed by hand
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def free(self) -> int:
        """Bytes that the file system has left for it."""
        return shutil.disk_usage(self._home).free

    def write(self, data: bytes | bytearray) -> None:
        """The next bytes. Raises OSError."""
        self._file.write(data)

    def finish(self) -> Path:
        """All bytes are there and on the disk; the file, with the suffix that its content has. Raises OSError."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self.path = self.path.rename(self.path.with_name(self._stem + suffix_for(self.path)))
        return self.path

    def publish(self, *, replace: bool) -> Path:
        """Moves it to its place at once. Raises ModelExists where something lies there, and OSError."""
        target = self._place / self.path.name
        if replace:
            return self.path.replace(target)
        try:
            os.link(self.path, target)  # unlike a rename, never over another file
        except FileExistsError:
            raise ModelExists(f"{target.name} is there already; replace=true puts this one in its place") from None
        except OSError:  # a file system without links
            if target.exists():
                raise ModelExists(f"{target.name} is there already; replace=true puts this one in its place") from None
            return self.path.rename(target)
        return target

    def discard(self) -> None:
        """Removes what is left."""
        self._file.close()
        shutil.rmtree(self._home, ignore_errors=True)


def sweep(folders: Sequence[Path]) -> None:
    """Removes what processes that have died left on its way into these folders; of living ones nothing."""
    for home in [home for folder in folders for home in (*folder.glob(f"{HIDDEN}*"), *folder.glob(f"*/{HIDDEN}*"))]:
        if not any(map(_locked, home.iterdir())):
            shutil.rmtree(home, ignore_errors=True)


def check_removable(checkpoint: Checkpoint) -> None:
    """Raises ModelKept for a model whose files hold more than it."""
    if checkpoint.format == "diffusers":
        raise ModelKept(f"{checkpoint.name} is a folder of diffusers: remove it by hand, there may be more in it")
    if checkpoint.baked:
        raise ModelKept(f"{checkpoint.name} is inside a full checkpoint, whose other networks are not this service's")


def remove(checkpoint: Checkpoint) -> None:
    """Deletes a model's file, or both of a pair, and what the operator wrote of it alone. Raises OSError."""
    sidecar = _own_sidecar(checkpoint)
    for path in (*checkpoint.files, *([sidecar] if sidecar else [])):
        path.unlink(missing_ok=True)


def _own_sidecar(checkpoint: Checkpoint) -> Path | None:
    """The NAME.json that a later model of the name would be read by: ours, and no other file's of this name."""
    try:
        source = source_of(checkpoint.path)
        if source.sidecar is None or from_sidecar(source.sidecar) is None:
            return None
    except FileNotFoundError:  # it went by itself
        return None
    weights = [path for path in source.path.parent.iterdir() if path.suffix.lower() in SUFFIXES]
    shared = any(path.stem == source.stem for path in weights if path not in source.files)
    return None if shared else source.sidecar


def _locked(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
