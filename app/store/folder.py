"""What lies in a models folder: weights, pairs of halves, diffusers folders, and the JSON files that belong to them.

Knows names and file stamps; opens nothing but `config.json`. The layout is the WebUI's and ComfyUI's.
"""

import json
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from app.store.formats import SUFFIXES, Format
from app.store.renames import half_of

ROOTS = frozenset({"vae", "vae_approx", "vae-approx", "vae-taesd", "stable-diffusion", "checkpoints"})  # in any case
DIFFUSERS_WEIGHTS = tuple(
    f"diffusion_pytorch_model{variant}" for variant in (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")
)
CONFIG_LIMIT = 1 << 20  # bytes of a JSON file beside weights
DEEPEST = 64  # folders in folders: os.walk calls itself
DOWNLOADING = ".aria2"  # beside a file that aria2 has made as large as it will be, and is still filling


@dataclass(frozen=True, order=True)
class Stamp:
    """A file's state without its bytes; it changes when the file is written, replaced or made readable."""

    path: Path
    size: int
    mtime_ns: int
    inode: int
    mode: int


@dataclass(frozen=True)
class Source:
    """The files that make one model."""

    path: Path  # the file, the pair's encoder, or the diffusers folder
    files: tuple[Path, ...]  # with weights: one, or encoder and decoder
    format: Format
    stem: str
    config: Path | None = None  # the diffusers config.json
    sidecar: Path | None = None  # the operator's NAME.json
    owner: Path | None = None  # of a NAME.vae.*: the full checkpoint NAME beside it, which knows the family

    @property
    def watched(self) -> tuple[Path, ...]:
        """All files whose change makes this another model."""
        return (*self.files, *(path for path in (self.config, self.sidecar, self.owner) if path))


@dataclass(frozen=True)
class Place:
    """A directory, as it is on the disk: another one of the same path is another place."""

    path: Path
    device: int
    inode: int


@dataclass(frozen=True)
class Tree:
    """One walk over a models folder."""

    stamps: tuple[Stamp, ...] = ()  # all files that could matter, in order of their paths
    places: frozenset[Place] = frozenset()  # where everything that comes or goes matters
    entries: frozenset[Path] = frozenset()  # what matters elsewhere: targets of links, the folder itself


def stamp(path: Path) -> Stamp:
    """The state of a file; follows links. Raises OSError."""
    status = path.stat()
    return Stamp(path, status.st_size, status.st_mtime_ns, status.st_ino, status.st_mode)


def walk(folder: Path) -> Tree:
    """Looks at every file under the model folders that could matter; opens none.

    Links are followed; a directory that was seen already is not entered again. Hidden names are skipped, and so are
    partial downloads, whose last suffix is none of ours.
    """
    stamps: list[Stamp] = []
    places = {place for place in [_place(folder)] if place}
    entries = {_landmark(folder)}
    seen: set[tuple[int, int]] = set()
    for root in _roots(folder):
        for top, folders, names in os.walk(root, followlinks=True):
            place = _place(Path(top))
            if place is None or (place.device, place.inode) in seen:
                folders.clear()
                continue
            seen.add((place.device, place.inode))
            places.add(place)
            deepest = len(Path(top).parts) - len(root.parts) >= DEEPEST
            folders[:] = [] if deepest else sorted(name for name in folders if not name.startswith("."))
            for item, target in _stamps(Path(top), names):
                stamps.append(item)
                entries.update(target)
    return Tree(tuple(sorted(stamps)), frozenset(places), frozenset(entries))


def _roots(folder: Path) -> list[Path]:
    try:
        roots = [path for path in folder.iterdir() if path.name.lower() in ROOTS]
    except OSError:  # not there, or not a folder
        return []
    return sorted(path for path in roots if _is_dir(path)) or [folder]


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # pathlib raises where it may not look
        return False


def _place(path: Path) -> Place | None:
    try:
        status = path.stat()
        return Place(path.resolve(), status.st_dev, status.st_ino)
    except OSError:  # gone since it was listed
        return None


def _landmark(folder: Path) -> Path:
    """Whose coming and going would be the folder's: itself, or the first part of its path that is missing."""
    path = folder.absolute()
    while not _is_dir(path.parent):
        path = path.parent
    return path.parent.resolve() / path.name


def _stamps(place: Path, names: Iterable[str]) -> Iterator[tuple[Stamp, tuple[Path, ...]]]:
    """(stamp, the link's target if it is one) of each file that could matter; to open a pipe or a device may hang."""
    there = set(names)
    for name in names:
        if name.startswith(".") or Path(name).suffix.lower() not in (*SUFFIXES, ".json") or name + DOWNLOADING in there:
            continue
        path = place / name
        try:
            item = stamp(path)
            if stat.S_ISREG(item.mode):
                yield item, (path.resolve(),) if path.is_symlink() else ()
        except OSError:  # gone since it was listed, or a link to nowhere
            continue


def sources(stamps: Iterable[Stamp], folder: Path) -> list[Source]:
    """The models that these files make, in order of their paths."""
    places: dict[Path, set[str]] = {}
    for item in stamps:
        places.setdefault(item.path.parent, set()).add(item.path.name)
    pipelines = {place for place, names in places.items() if "model_index.json" in names}
    found: list[Source] = []
    for place, names in places.items():
        if place.parent in pipelines and place.name != "vae":
            continue  # the other parts of a diffusers pipeline
        weights = {name for name in names if Path(name).suffix.lower() in SUFFIXES}
        if "config.json" in names and _is_autoencoder(place / "config.json"):
            chosen = _chosen(weights)
            own = {name for name in weights if name == chosen or name.startswith("diffusion_pytorch_model")}
            if own or not weights:
                found.append(_diffusers(place, chosen, folder, places))
            weights -= own
        found += _files(place, weights, names)
    return sorted(found, key=lambda source: source.path)


def source_of(path: Path) -> Source:
    """The model at a path that somebody named: a file, with its other half if there is one, or a diffusers folder.

    Raises OSError: FileNotFoundError, or for a pipe or a device, which would be waited for.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    path = path.absolute()  # the parents' names matter
    if path.is_dir():
        place = path / "vae" if (path / "vae" / "config.json").is_file() else path
        names = {entry.name for entry in place.iterdir()}
        chosen = _chosen({name for name in names if Path(name).suffix.lower() in SUFFIXES})
        beside = {place.parent, place.parent.parent}
        return _diffusers(
            place, chosen, None, {folder: {entry.name for entry in folder.iterdir()} for folder in beside}
        )
    if not path.is_file():
        raise OSError(f"{path.name} is no regular file")
    names = {entry.name for entry in path.parent.iterdir()}
    weights = {name for name in names if Path(name).suffix.lower() in SUFFIXES} | {path.name}
    return next(source for source in _files(path.parent, weights, names) if path in source.files)


def names_of(found: Iterable[Source]) -> dict[Source, str]:
    """A unique name for each: the stem, else folder/stem, else the file's name, else folder/name, else the path."""
    names: dict[Source, str] = {}
    left = list(found)
    for choice in range(5):
        wanted: dict[str, list[Source]] = {}
        for source in left:
            wanted.setdefault(_choice(source, choice), []).append(source)
        names |= {same[0]: name for name, same in wanted.items() if len(same) == 1}
        left = [source for source in left if source not in names]
    return names


def _choice(source: Source, choice: int) -> str:
    if choice == 0:  # nearly always; a large folder is named anew for each file that is read
        return shown(source.stem)
    file, parent = source.path, source.path.parent.name
    name = source.stem + ("" if source.format == "diffusers" else file.suffix)
    return shown((f"{parent}/{source.stem}", name, f"{parent}/{name}", file.as_posix().lstrip("/"))[choice - 1])


def shown(path: Path | str) -> str:
    """A name or path as text that any encoding can carry: bytes that are not UTF-8 become escapes."""
    return str(path).encode(errors="surrogateescape").decode(errors="backslashreplace")


def _files(place: Path, weights: set[str], names: set[str]) -> list[Source]:
    """The sources of a folder's plain files: pairs of the same suffix first, then pairs of two suffixes."""
    found: list[Source] = []
    left = sorted(weights)
    for same_suffix in (True, False):
        for name in [name for name in left if half_of(Path(name).stem) == "encoder"]:
            stem = Path(name).stem.removesuffix("_encoder")
            partner = next(
                (
                    other
                    for other in left
                    if Path(other).stem == f"{stem}_decoder"
                    and (not same_suffix or Path(other).suffix == Path(name).suffix)
                ),
                None,
            )
            if partner is not None:
                left = [other for other in left if other not in (name, partner)]
                found.append(_plain(place, (name, partner), stem, names))
    return found + [_plain(place, (name,), Path(name).stem, names) for name in left]


def _plain(place: Path, files: tuple[str, ...], stem: str, names: set[str]) -> Source:
    return Source(
        path=place / files[0],
        files=tuple(place / name for name in files),
        format=SUFFIXES.get(Path(files[0]).suffix.lower(), "bin"),
        stem=stem,
        sidecar=place / f"{stem}.json" if f"{stem}.json" in names else None,
        owner=_owner(place, stem, names),
    )


def _owner(place: Path, stem: str, names: set[str]) -> Path | None:
    """The full checkpoint that a NAME.vae.* is for, as the WebUI pairs them."""
    if not stem.lower().endswith(".vae"):
        return None
    name = stem[: -len(".vae")]
    return next((place / f"{name}{suffix}" for suffix in SUFFIXES if f"{name}{suffix}" in names), None)


def _diffusers(place: Path, weights: str | None, folder: Path | None, places: dict[Path, set[str]]) -> Source:
    inside_pipeline = place.name == "vae" and place.parent != folder
    home = place.parent if inside_pipeline else place
    sidecar = home.parent / f"{home.name}.json"
    return Source(
        path=place,
        files=(place / weights,) if weights else (),
        format="diffusers",
        stem=home.name,
        config=place / "config.json",
        sidecar=sidecar if sidecar.name in places.get(home.parent, ()) else None,
    )


def _chosen(weights: set[str]) -> str | None:
    """The weights that a diffusers config speaks of: those of diffusers' name, or the only ones in its folder."""
    named = next((name for name in DIFFUSERS_WEIGHTS if name in weights), None)
    return next(iter(weights)) if named is None and len(weights) == 1 else named


def _is_autoencoder(config: Path) -> bool:
    try:
        content = read_json(config)
    except (OSError, ValueError):
        return False  # somebody else's file
    return str(content.get("_class_name", "")).startswith("Autoencoder")


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a small file. Raises OSError, or ValueError with a one-line reason."""
    with path.open("rb") as file:
        text = file.read(CONFIG_LIMIT + 1)
    if len(text) > CONFIG_LIMIT:
        raise ValueError(f"{path.name} is larger than {CONFIG_LIMIT} bytes")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return content
