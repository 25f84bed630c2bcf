"""The published autoencoders that are known by their sha256: name, family, and how they behave in fp16."""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

Fp16 = Literal["ok", "overflows", "unknown"]


@dataclass(frozen=True)
class Known:
    """One published file, or one half of a tiny autoencoder's pair."""

    name: str
    sha256: str
    family: str
    fp16: Fp16 = "unknown"


@cache
def known_files() -> dict[str, Known]:
    """The rows of known.json by sha256."""
    rows = json.loads(files(__package__).joinpath("known.json").read_text(encoding="utf-8"))
    return {row["sha256"]: Known(**row) for row in rows}


def lookup(sha256: str, halves: tuple[str, ...] = ()) -> Known | None:
    """The row of a file's hash; of a pair, the encoder's row when both halves are known as one family's."""
    if row := known_files().get(sha256):
        return row
    rows = [known_files().get(half) for half in halves]
    if len(rows) == 2 and rows[0] and rows[1] and rows[0].family == rows[1].family:
        return rows[0]
    return None
