"""The models folders: names -> checkpoints, kept up to date with what lies there."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path

from app.errors import Unavailable, UnsupportedCheckpoint
from app.store.checkpoint import Checkpoint
from app.store.declared import Declared
from app.store.digests import Digest, DigestCache, digest_of
from app.store.folder import Source, names_of, source_of, sources
from app.store.identity import identify_source
from app.store.known import Known, lookup
from app.store.names import Entry, Unreadable, resolve
from app.store.rest import DOUBT_SECONDS, OLD_AT_FIRST, OLD_SECONDS, QUIET_SECONDS, Rest
from app.store.tree import Stamp, Tree, stamp, walk

REASON = 500  # characters of an error that is listed


@dataclass(frozen=True)
class Look:
    """What one look at the folder left to do."""

    tree: Tree
    unread: Mapping[Source, int]  # to be identified, with the bytes of its weights; the least first
    settling: bool  # something is being written: look again soon


@dataclass(frozen=True)
class _Finding:
    """What a source was found to be when its files looked so."""

    source: Source
    stamps: tuple[Stamp | None, ...]
    entry: Entry  # its name is given when it is listed
    known: bool = False  # by its own sha256

    def of(self, source: Source, stamps: tuple[Stamp | None, ...]) -> bool:
        return (self.source, self.stamps) == (source, stamps)


class ModelStore:
    """What the models folders hold, under names that are unique over all; safe to use from several threads.

    `scan`, or `look` and then `identify` for what it left unread, touch the disk. What is listed is one snapshot,
    replaced whole.
    """

    def __init__(self, folders: Sequence[Path], default_family: str | None = None) -> None:
        self.folders = tuple(folders)
        self._default_family = default_family
        self._digests = {folder: DigestCache(folder) for folder in folders}
        self._lock = threading.Lock()  # of all below; never held while a file is read
        self._rest = Rest()
        self._present: frozenset[Path] = frozenset()  # sources of the last look
        self._findings: dict[Path, _Finding] = {}  # listed, by the source's path
        self._doubts: dict[Path, _Finding] = {}  # errors that may pass
        self._entries: dict[str, Entry] = {}
        self._closing = threading.Event()

    def scan(self) -> None:
        """Looks at every file, and reads those that are new or changed, at once. A bad file never stops it."""
        for _ in range(2):  # again for those that a file read later tells the name of
            for source in self.look(patient=False).unread:
                self.identify(source, patient=False)

    def look(self, *, patient: bool = True) -> Look:
        """Unlists what has gone, and says what must be identified; opens no weights.

        While a file is being written, what was listed for it before stays, and a new one is not listed.
        """
        tree = walk(self.folders)
        found = sources(tree.stamps, self.folders)
        with self._lock:
            old = OLD_SECONDS if self._rest.looks else OLD_AT_FIRST
            self._rest.note(tree.stamps)
            findings: dict[Path, _Finding] = {}
            unread: list[Source] = []
            settling = False
            for source in found:
                stamps = self._rest.stamps(source.watched)
                last, doubt = self._findings.get(source.path), self._doubts.get(source.path)
                if last is not None:
                    findings[source.path] = last
                if last is not None and last.of(source, stamps):
                    continue
                if patient and not self._rest.rests(stamps, QUIET_SECONDS, old):
                    settling = True
                elif patient and doubt is not None and doubt.of(source, stamps):
                    if self._rest.rests(stamps, DOUBT_SECONDS, DOUBT_SECONDS):
                        findings[source.path] = doubt
                    else:
                        settling = True
                else:
                    unread.append(source)
            self._present = frozenset(source.path for source in found)
            self._findings = findings
            self._doubts = {path: doubt for path, doubt in self._doubts.items() if path in self._present}
            self._publish()
            sizes = sorted(((self._bytes(source), source) for source in unread), key=itemgetter(0))
        return Look(tree, {source: size for size, source in sizes}, settling)

    def identify(self, source: Source, *, patient: bool = True) -> bool:
        """Reads a source and lists what it is; false where another look must decide: it changed, or may be broken.

        Raises Unavailable once the store is closed.
        """
        before = _stamps(source)
        digest: list[Digest] = []

        def take(source: Source) -> Digest:
            digest.append(self._digest(source))
            return digest[0]

        entry: Entry
        try:
            entry = identify_source(source, source.stem, self._default_family, take, self._twin)
        except UnsupportedCheckpoint as error:
            reason = " ".join(str(error).split())  # keys and values of the file are in it, halves of surrogates too
            reason = reason.encode(errors="backslashreplace").decode()
            entry = Unreadable(source.stem, source.path, source.format, reason[:REASON])
        if _stamps(source) != before:
            return False
        known = bool(digest) and lookup(digest[0].sha256, digest[0].halves) is not None
        finding = _Finding(source, before, entry, known)
        self._digests_beside(source).save()
        with self._lock:
            if source.path not in self._present:
                return False
            broken = isinstance(entry, Unreadable)
            if patient and broken and not self._rest.rests(before, DOUBT_SECONDS, DOUBT_SECONDS):
                self._doubts[source.path] = finding
                return False
            self._findings[source.path] = finding
            self._doubts.pop(source.path, None)
            again = known and self._reconsider(digest[0].tensors)
            self._publish()
        return not again

    def give_up(self, source: Source) -> None:
        """Lists a source that `identify` failed for by a bug of ours."""
        reason = "it could not be read for an unexpected reason, which the log has"
        finding = _Finding(source, _stamps(source), Unreadable(source.stem, source.path, source.format, reason))
        with self._lock:
            if source.path in self._present:
                self._findings[source.path] = finding
                self._publish()

    def lists(self, checkpoint: Checkpoint) -> bool:
        """Whether the checkpoint is listed as it is, replaced by none."""
        return any(
            isinstance(entry, Checkpoint) and (entry.path, entry.stamps) == (checkpoint.path, checkpoint.stamps)
            for entry in self._entries.values()
        )

    def close(self) -> None:
        """Ends what is being read."""
        self._closing.set()

    def entries(self) -> list[Entry]:
        """All models by name, usable or not, as far as they have been identified."""
        return list(self._entries.values())

    def resolve(self, model: str | None, default: str | None = None) -> Checkpoint:
        """The checkpoint of a name, a sha256 prefix or None, as `resolve.resolve` finds it among those listed."""
        return resolve(self._entries, model, default)

    def _bytes(self, source: Source) -> int:
        return sum(item.size for item in self._rest.stamps(source.files) if item is not None)

    def _reconsider(self, tensors: str) -> bool:
        """A file is known by name now: files of the same tensors must be identified anew; whether there are any."""
        found = False
        for known in (self._findings, self._doubts):
            for path, finding in known.items():
                entry = finding.entry
                same = entry.tensors_sha256 == tensors and not entry.known_as if isinstance(entry, Checkpoint) else True
                if same and not finding.known and finding.stamps:
                    known[path] = replace(finding, stamps=())
                    found = True
        return found

    def _publish(self) -> None:
        names = names_of(finding.source for finding in self._findings.values())
        findings = sorted(self._findings.values(), key=lambda finding: names[finding.source].lower())
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
        self._entries = entries

    def _digest(self, source: Source) -> Digest:
        stamps = tuple(_stamp(path) for path in source.files)
        digests = self._digests_beside(source)
        digest = digests.get(stamps)
        if digest is None:
            digest = digest_of(source.files, self._check)
            if stamps == tuple(_stamp(path) for path in source.files):
                digests.put(stamps, digest)
        return digest

    def _digests_beside(self, source: Source) -> DigestCache:
        """Those of the folder that the source lies in."""
        return next(digests for folder, digests in self._digests.items() if source.path.is_relative_to(folder))

    def _twin(self, tensors: str) -> Known | None:
        """The known file of any of the folders that has these tensors."""
        return next((known for digests in self._digests.values() if (known := digests.twin(tensors))), None)

    def _check(self) -> None:
        if self._closing.is_set():
            raise Unavailable("the service is shutting down")


def open_checkpoint(path: Path, default_family: str | None = None, family: str | None = None) -> Checkpoint:
    """The checkpoint at a path: a file, with its other half if it is one of a pair, or a diffusers folder.

    `family` is somebody's word, over all that the files say. Raises UnsupportedCheckpoint, also when nothing is at
    the path.
    """
    try:
        source = source_of(path)
    except OSError as error:
        raise UnsupportedCheckpoint(f"{path} cannot be read: {error.strerror or error}") from error
    said = None if family is None else Declared("operator", "--family", family)
    return identify_source(source, source.stem, default_family, lambda source: digest_of(source.files), said=said)


def _stamp(path: Path) -> Stamp:
    try:
        return stamp(path)
    except OSError as error:
        raise UnsupportedCheckpoint(f"cannot be read: {error.strerror or error}") from error


def _stamps(source: Source) -> tuple[Stamp | None, ...]:
    """How the files are now; None for one that has gone."""
    found: list[Stamp | None] = []
    for path in source.watched:
        try:
            found.append(stamp(path))
        except OSError:
            found.append(None)
    return tuple(found)
