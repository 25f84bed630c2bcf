"""What the files of a models folder make: weights, pairs of halves, diffusers folders, and the JSON files beside them.

Knows names; opens nothing but `config.json`.
"""

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from app.store.tree import Stamp
from app.weights.files import SUFFIXES, Format, format_of, open_regular
from app.weights.renames import half_of

DIFFUSERS_WEIGHTS = tuple(
    f"diffusion_pytorch_model{variant}" for variant in (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")
)
CONFIG_LIMIT = 1 << 20  # bytes of a JSON file beside weights


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


def sources(stamps: Iterable[Stamp], folders: Collection[Path]) -> list[Source]:
    """The models that these files of the models folders make, in order of their paths."""
    places: dict[Path, set[str]] = {}
    for item in stamps:
        places.setdefault(item.path.parent, set()).add(item.path.name)
    pipelines = {place for place, names in places.items() if "model_index.json" in names}
    found: list[Source] = []
    for place, names in places.items():
        if place.parent in pipelines and place.name != "vae":
            continue  # the other parts of a diffusers pipeline
        weights = _weights(names)
        if "config.json" in names and _is_autoencoder(place / "config.json"):
            chosen = _chosen(weights)
            own = {name for name in weights if name == chosen or name.startswith("diffusion_pytorch_model")}
            if own or not weights:
                found.append(_diffusers(place, chosen, folders, places))
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
        chosen = _chosen(_weights(names))
        beside = {place.parent, place.parent.parent}
        return _diffusers(place, chosen, (), {folder: {entry.name for entry in folder.iterdir()} for folder in beside})
    if not path.is_file():
        raise OSError(f"{path.name} is no regular file")
    names = {entry.name for entry in path.parent.iterdir()}
    weights = _weights(names) | {path.name}
    return next(source for source in _files(path.parent, weights, names) if path in source.files)


def _weights(names: Iterable[str]) -> set[str]:
    return {name for name in names if name.lower().endswith(tuple(SUFFIXES))}


def _files(place: Path, weights: set[str], names: set[str]) -> list[Source]:
    """The sources of a folder's plain files: pairs of the same suffix first, then pairs of two suffixes."""
    found: list[Source] = []
    left = sorted(weights)
    for same_suffix in (True, False):
        for name in [name for name in left if "encoder" in name and half_of(Path(name).stem) == "encoder"]:
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
    paths = tuple(place / name for name in files)
    return Source(
        path=paths[0],
        files=paths,
        format=format_of(paths[0]),
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


def _diffusers(place: Path, weights: str | None, folders: Collection[Path], places: dict[Path, set[str]]) -> Source:
    inside_pipeline = place.name == "vae" and place.parent not in folders
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
    with open_regular(path) as file:
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
