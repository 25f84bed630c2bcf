"""Which model a request means: by name, by the beginning of a sha256, or by being the only one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from app.errors import InvalidParameter, UnknownModel, UnsupportedCheckpoint
from app.store.checkpoint import Checkpoint
from app.weights.files import Format

PREFIX = 8  # hex digits of a sha256 that may stand for a name
LISTED = 20  # names in an error


@dataclass(frozen=True)
class Unreadable:
    """A file in the models folder that is no usable autoencoder, and why."""

    name: str
    path: Path
    format: Format
    error: str


Entry = Checkpoint | Unreadable


def resolve(entries: Mapping[str, Entry], model: str | None, default: str | None = None) -> Checkpoint:
    """The checkpoint of a name or of a sha256 prefix; without one the default, else the only model there is.

    A demonstration steps back: it is meant only where it is alone.
    Raises UnknownModel, InvalidParameter when several models could be meant, UnsupportedCheckpoint for a file that is
    there but cannot be used.
    """
    wanted = default if model is None else model
    entry = _only(entries) if wanted is None else entries.get(wanted) or _by_hash(entries, wanted)
    if isinstance(entry, Unreadable):
        raise UnsupportedCheckpoint(f"model {entry.name}: {entry.error}")
    return entry


def _only(entries: Mapping[str, Entry]) -> Entry:
    usable = [entry for entry in entries.values() if isinstance(entry, Checkpoint)]
    meant = [entry for entry in usable if not entry.family.demonstration] or usable
    if len(meant) == 1:
        return meant[0]
    if not usable:
        raise UnknownModel(f"the models folder holds no usable model{_listing(entries, ' (unusable: {})')}")
    names = _listing({entry.name: entry for entry in usable}, "{}")
    raise InvalidParameter(f"model is required, as there are several: {names}")


def _by_hash(entries: Mapping[str, Entry], prefix: str) -> Entry:
    """The model whose sha256 begins so; files with the same bytes are the same model."""
    digits = prefix.lower()
    if len(digits) >= PREFIX and set(digits) <= set("0123456789abcdef"):
        found = [item for item in entries.values() if isinstance(item, Checkpoint) and item.sha256.startswith(digits)]
        if len({item.sha256 for item in found}) > 1:
            raise InvalidParameter(f"{prefix} begins the sha256 of several models: {', '.join(i.name for i in found)}")
        if found:
            return found[0]
    raise UnknownModel(f"no model {prefix!r}; {_listing(entries, 'there are: {}') or 'there are none'}")


def _listing(entries: Mapping[str, Entry], template: str) -> str:
    names = list(entries)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return template.format(", ".join(names[:LISTED]) + more) if names else ""
