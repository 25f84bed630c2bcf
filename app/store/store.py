"""The models folders: names -> checkpoints, kept up to date with what lies there."""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path

from app.errors import Unavailable, UnsupportedCheckpoint
from app.store.checkpoint import Checkpoint
from app.store.declared import Declared
from app.store.digests import Digest, DigestCache, digest_of
from app.store.folder import Source, source_of, sources
from app.store.identity import identify_source
from app.store.known import Known, lookup
from app.store.names import Entry, Finding, Unreadable, listed, resolve
from app.store.tree import DOUBT_SECONDS, OLD_AT_FIRST, OLD_SECONDS, QUIET_SECONDS, Rest, Stamp, stamps_of, walk
from app.weights.files import WeightFile

REASON = 500  # characters of an error that is listed
LISTING = 10  # times as long as it takes to list anew, it is not done again while more sources are read


@dataclass(frozen=True)
class Look:
    """What one look at the folder left to do."""

    unread: Mapping[Source, int]  # to be identified, with the bytes of its weights; the least first
    settling: bool  # something is being written: look again soon


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
        self._tree: Mapping[str, Stamp] = {}  # of the last look
        self._sources: list[Source] = []  # likewise
        self._calm = False  # that look left nothing to do, and nothing was found out since
        self._present: frozenset[Path] = frozenset()  # sources of the last look
        self._findings: dict[Path, Finding] = {}  # listed, by the source's path
        self._doubts: dict[Path, Finding] = {}  # errors that may pass
        self._entries: dict[str, Entry] = {}
        self._unlisted = False  # something was found that is not in `_entries` yet
        self._due = 0.0  # when to list anew though more is to come, on time.monotonic()
        self._closing = threading.Event()

    def scan(self) -> None:
        """Looks at every file, and reads those that are new or changed, at once. A bad file never stops it."""
        for _ in range(2):  # again for those that a file read later tells the name of
            unread = list(self.look(patient=False).unread)
            for source in unread:
                self.identify(source, patient=False, more=source is not unread[-1])

    def look(self, *, patient: bool = True) -> Look:
        """Unlists what has gone, and says what must be identified; opens no weights.

        While a file is being written, what was listed for it before stays, and a new one is not listed.
        """
        before = self._tree
        tree = walk(self.folders, before)
        with self._lock:
            if self._calm and tree == before and before is self._tree:
                return Look({}, settling=False)
        found = self._sources if _same_models(tree, before) else sources(tree.values(), self.folders)
        with self._lock:
            self._tree, self._sources = tree, found
            old = OLD_SECONDS if self._rest.looks else OLD_AT_FIRST
            self._rest.note(tree.values())
            findings: dict[Path, Finding] = {}
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
            self._unlisted |= findings != self._findings
            self._findings = findings
            self._doubts = {path: doubt for path, doubt in self._doubts.items() if path in self._present}
            if self._unlisted:
                self._publish()
            self._calm = not (unread or settling)
            sizes = sorted(((self._bytes(source), source) for source in unread), key=itemgetter(0))
        return Look({source: size for size, source in sizes}, settling)

    def identify(self, source: Source, *, patient: bool = True, more: bool = False) -> bool:
        """Reads a source and lists what it is; false where another look must decide: it changed, or may be broken.

        To list takes longer than to read a small file among thousands: where `more` sources follow at once, some are
        listed together. Raises Unavailable once the store is closed.
        """
        before = stamps_of(source.watched)
        digest: list[Digest] = []

        def take(files: tuple[WeightFile, ...]) -> Digest:
            digest.append(self._digest(source, files, before))
            return digest[0]

        entry: Entry
        try:
            entry = identify_source(source, before, self._default_family, take, self._twin)
        except UnsupportedCheckpoint as error:
            reason = " ".join(str(error).split())  # keys and values of the file are in it, halves of surrogates too
            reason = reason.encode(errors="backslashreplace").decode()
            entry = Unreadable(source.stem, source.path, source.format, reason[:REASON])
        changed = stamps_of(source.watched) != before
        known = bool(digest) and lookup(digest[0].sha256, digest[0].halves) is not None
        with self._lock:
            decided = not changed and self._found(Finding(source, before, entry, known), patient)
            self._calm, self._unlisted = False, True
            if due := not more or time.monotonic() >= self._due:
                self._publish()
        if due:
            for digests in self._digests.values():
                digests.save()
        return decided

    def give_up(self, source: Source) -> None:
        """Lists a source that `identify` failed for by a bug of ours."""
        reason = "it could not be read for an unexpected reason, which the log has"
        entry = Unreadable(source.stem, source.path, source.format, reason)
        with self._lock:
            if source.path in self._present:
                self._findings[source.path] = Finding(source, stamps_of(source.watched), entry)
            self._publish()

    def check(self, path: Path) -> Checkpoint:
        """What a file that is on its way into a models folder is; not listed. Its digest is not taken again there.

        Raises UnsupportedCheckpoint with the reason.
        """
        source = source_of(path)
        before = stamps_of(source.watched)
        take = partial(self._digest, source, watched=before)
        return identify_source(source, before, self._default_family, take, self._twin)

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

    def _found(self, finding: Finding, patient: bool) -> bool:
        """Notes what a source was found to be; false where another look must decide."""
        path, entry = finding.source.path, finding.entry
        if path not in self._present:
            return False
        broken = isinstance(entry, Unreadable)
        if patient and broken and not self._rest.rests(finding.stamps, DOUBT_SECONDS, DOUBT_SECONDS):
            self._doubts[path] = finding
            return False
        self._findings[path] = finding
        self._doubts.pop(path, None)
        return not (finding.known and isinstance(entry, Checkpoint) and self._reconsider(entry.tensors_sha256))

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
        begun = time.monotonic()
        self._entries = listed(self._findings.values())
        now = time.monotonic()
        self._unlisted = False
        self._due = now + LISTING * (now - begun)

    def _digest(self, source: Source, files: tuple[WeightFile, ...], watched: tuple[Stamp | None, ...]) -> Digest:
        stamps = tuple(item for item in watched[: len(files)] if item is not None)  # those of the weights come first
        digests = self._digests_beside(source)
        digest = digests.get(stamps)
        if digest is None:
            digest = digest_of(files, self._check)
            if stamps == stamps_of(file.path for file in files):
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


def _same_models(tree: Mapping[str, Stamp], before: Mapping[str, Stamp]) -> bool:
    """Whether the files of two looks make the same models: their names do, and what the diffusers folders say."""
    return tree.keys() == before.keys() and all(
        item is before[path] for path, item in tree.items() if path.endswith("config.json")
    )


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
    return identify_source(source, stamps_of(source.watched), default_family, digest_of, said=said)
