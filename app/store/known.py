"""The published autoencoders that are known by their sha256: names, family, fp16 behaviour, and where to fetch them."""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import PurePosixPath

from app.errors import UnknownModel
from app.terms import Fp16


@dataclass(frozen=True)
class Known:
    """One published file, or one half of a tiny autoencoder's pair."""

    name: str
    sha256: str
    family: str
    fp16: Fp16 = "unknown"
    names: tuple[str, ...] = ()  # short ones: the first is its own or its pair's, others may be shared
    bytes: int | None = None
    repo: str | None = None  # on the Hugging Face hub, with `file`; None: not known where
    file: str | None = None

    @property
    def save_as(self) -> str:
        """The file name in a models folder: one that says what it is, where the hub's own does not."""
        path = PurePosixPath(self.file or "")
        return path.name if path.stem.endswith(("_encoder", "_decoder")) else f"{self.names[0]}{path.suffix}"


@cache
def known_files() -> dict[str, Known]:
    """The rows of known.json by sha256."""
    rows = json.loads(files(__package__).joinpath("known.json").read_text(encoding="utf-8"))
    return {row["sha256"]: Known(**(row | {"names": tuple(row.get("names", ()))})) for row in rows}


def fetchable() -> dict[str, tuple[Known, ...]]:
    """What can be fetched, by the first of its names: one file, or the two halves of a pair."""
    found: dict[str, tuple[Known, ...]] = {}
    for row in known_files().values():
        if row.repo is not None:
            found[row.names[0]] = (*found.get(row.names[0], ()), row)
    return found


def named(name: str) -> tuple[Known, ...]:
    """The rows to fetch for one of their names, upper or lower case, with or without the file's suffix.

    Raises UnknownModel for a name that is none, or that several share.
    """
    rows = fetchable()
    wanted = name.lower()
    if wanted in rows:
        return rows[wanted]
    found = {
        first: group
        for first, group in rows.items()
        if wanted in {other.lower() for row in group for other in (*row.names, row.save_as)}
    }
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise UnknownModel(f"{name} is a name of {' and of '.join(found)}: use one of these")
    raise UnknownModel(f"nothing known as {name!r} can be fetched; there are: {', '.join(rows)}")


def lookup(sha256: str, halves: tuple[str, ...] = ()) -> Known | None:
    """The row of a file's hash; of a pair, the encoder's row when both halves are known as one family's."""
    if row := known_files().get(sha256):
        return row
    rows = [known_files().get(half) for half in halves]
    if len(rows) == 2 and rows[0] and rows[1] and rows[0].family == rows[1].family:
        return rows[0]
    return None
