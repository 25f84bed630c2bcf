"""What models are called, and which one a request means: by name, by its sha256, or by being the only one."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from app.errors import InvalidParameter, UnknownModel, UnsupportedCheckpoint
from app.store.checkpoint import Checkpoint
from app.store.folder import Source
from app.store.tree import Stamp
from app.text import shown
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


@dataclass(frozen=True)
class Finding:
    """What a source was found to be when its files looked so."""

    source: Source
    stamps: tuple[Stamp | None, ...]
    entry: Entry  # its name is given when it is listed
    known: bool = False  # by its own sha256

    def of(self, source: Source, stamps: tuple[Stamp | None, ...]) -> bool:
        return (self.source, self.stamps) == (source, stamps)


def listed(findings: Iterable[Finding]) -> dict[str, Entry]:
    """What was found, by name and in order of names; copies name the model that they are copies of."""
    findings = list(findings)
    names = names_of(finding.source for finding in findings)
    findings = sorted(findings, key=lambda finding: names[finding.source].lower())
    originals: dict[str, tuple[bool, int, str]] = {}  # by tensors: the known one, then the shortest path
    for finding in findings:
        if isinstance(finding.entry, Checkpoint):
            path = finding.source.path.as_posix()
            rank = (not finding.known, len(path), path)
            tensors = finding.entry.tensors_sha256
            originals[tensors] = min(rank, originals.get(tensors, rank))
    named = {finding.source.path.as_posix(): names[finding.source] for finding in findings}
    entries: dict[str, Entry] = {}
    for finding in findings:
        name, entry = names[finding.source], finding.entry
        if isinstance(entry, Checkpoint):
            original = named[originals[entry.tensors_sha256][2]]
            entry = replace(entry, copy_of=original if original != name else None)
        entries[name] = entry if entry.name == name else replace(entry, name=name)
    return entries


def names_of(found: Iterable[Source]) -> dict[Source, str]:
    """A unique name for each: the stem, else folder/stem, else the file's name, else folder/name, else the path."""
    names: dict[Source, str] = {}
    left = list(found)
    for choice in range(5):
        wanted: dict[str, list[Source]] = {}
        for source in left:
            wanted.setdefault(_choice(source, choice), []).append(source)
        taken = set(names.values())
        names |= {same[0]: name for name, same in wanted.items() if len(same) == 1 and name not in taken}
        left = [source for source in left if source not in names]
    return names


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


def _choice(source: Source, choice: int) -> str:
    if choice == 0:  # nearly always
        return shown(source.stem)
    file, parent = source.path, source.path.parent.name
    name = source.stem + ("" if source.format == "diffusers" else file.suffix)
    return shown((f"{parent}/{source.stem}", name, f"{parent}/{name}", file.as_posix().lstrip("/"))[choice - 1])


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
