"""Linear maps from latents to small pictures, as they were fitted, kept in each models folder by what they are of.

A map is (C + 1, 3 p^2): rows are the latent's channels and a constant, columns the colours, from 0 to 1, of the p x p
positions of the raw latent's grid that one position of the latent stands for (p is 1 but for packed latents).
"""

import json
import secrets
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from app.store.checkpoint import Checkpoint
from app.terms import Convention
from app.weights.files import open_regular

FILE = ".latentd-previews.json"
VERSION = 1  # of the file, and of the pictures and the way that maps are fitted
MOST_BYTES = 8 << 20  # of the file that are read
ROWS = 1024  # kept at most, those fitted last
CHANNELS = 1 << 12  # of a latent at most

Key = tuple[str, str, Convention]
"""sha256, family and convention of the latents."""


@dataclass(frozen=True, eq=False)
class Linear:
    """A map, and how near it comes to the full decode at its own size."""

    weights: np.ndarray  # float32 (C + 1, 3 p^2)
    psnr_db: float

    @property
    def channels(self) -> int:
        """Of the latents that it takes."""
        return len(self.weights) - 1


def key_of(checkpoint: Checkpoint, latents: Convention) -> Key:
    """What a map is kept by."""
    return checkpoint.sha256, checkpoint.family.name, latents


class LinearMaps:
    """The maps of these folders; any thread may ask. What is kept in one is of use in all."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = tuple(folders)
        self._lock = threading.Lock()
        self._maps: dict[Key, Linear] = {}
        self._read = False

    def load(self) -> None:
        """Reads the files, once. Blocking."""
        with self._lock:
            if not self._read:
                for folder in self._folders:
                    self._maps |= _stored(folder)
                self._read = True

    def get(self, key: Key) -> Linear | None:
        """The map, if there is one; does not read."""
        return self._maps.get(key)

    def put(self, key: Key, found: Linear, folder: Path) -> None:
        """Keeps a map, where the folder can be written to. Blocking."""
        with self._lock:
            self._maps[key] = found
            rows = _stored(folder)
            rows.pop(key, None)
            _write(folder, dict(list((rows | {key: found}).items())[-ROWS:]))

    def folder_of(self, path: Path) -> Path:
        """The models folder that a file lies in."""
        return next(folder for folder in self._folders if path.is_relative_to(folder))


def _write(folder: Path, rows: Mapping[Key, Linear]) -> None:
    content = [
        {
            "sha256": sha256,
            "family": family,
            "latents": latents,
            "psnr_db": row.psnr_db,
            "weights": row.weights.tolist(),
        }
        for (sha256, family, latents), row in rows.items()
    ]
    partial = folder / f"{FILE}.{secrets.token_hex(4)}"
    try:
        partial.write_text(json.dumps({"version": VERSION, "rows": content}))
        partial.replace(folder / FILE)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _stored(folder: Path) -> dict[Key, Linear]:
    """The rows of the folder's file; none of one that is not ours, of another version, or torn."""
    try:
        with open_regular(folder / FILE) as file:
            content = json.loads(file.read(MOST_BYTES))
        if content["version"] != VERSION:
            return {}
        return dict(map(_row, content["rows"]))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}


def _row(row: dict[str, object]) -> tuple[Key, Linear]:
    match row:
        case {
            "sha256": str(sha256),
            "family": str(family),
            "latents": "scaled" | "raw" as latents,
            "psnr_db": int() | float() as psnr,
            "weights": [*weights],
        } if len(weights) <= CHANNELS:
            array = np.array(weights, np.float32)
            if array.ndim == 2 and array.shape[1] % 3 == 0 and np.isfinite(array).all() and np.isfinite(psnr):
                return (sha256, family, latents), Linear(array, float(psnr))
    raise ValueError("not a row of ours")
