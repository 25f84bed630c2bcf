"""A checkpoint -> a .safetensors file or a diffusers folder: another layout, another dtype, out of a full checkpoint.

Tensors pass through one at a time; at the same dtype they keep every bit.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from app.errors import InvalidParameter, UnsupportedCheckpoint
from app.store.checkpoint import Checkpoint, CheckpointChanged
from app.store.declared import KEYS
from app.store.folder import DIFFUSERS_WEIGHTS
from app.text import shown
from app.tools.facts import file_layout
from app.vae.architectures import Architecture
from app.vae.families import FAMILIES
from app.weights.files import DTYPE_NAMES, SUFFIXES, TensorInfo, dtype_name, open_weights
from app.weights.parts import parted, whole_of
from app.weights.renames import Layout, canonical_keys, half_of
from app.weights.writing import TensorSpec, Write, file_order, publish, safetensors_writer

CAST_TO = {name: dtype for dtype, name in DTYPE_NAMES.items() if name != "fp64"}
"""What --dtype may say: fp16, bf16, fp32."""


@dataclass(frozen=True)
class Place:
    """Where a tensor of a checkpoint lies."""

    path: Path
    key: str
    info: TensorInfo
    architecture: Architecture


@dataclass(frozen=True)
class Output:
    """What is asked of the file to be written; None keeps what the source has."""

    target: Path
    layout: Layout | None = None
    dtype: torch.dtype | None = None
    force: bool = False


def convert(source: Checkpoint, output: Output) -> Path:
    """Writes the autoencoder of a checkpoint anew, without prefixes; returns the file with the weights.

    Raises InvalidParameter for a target that cannot be, UnsupportedCheckpoint when the source cannot be read, a weight
    overflows in the new dtype, or diffusers has no such network, and OSError.
    """
    places = places_of(source)
    row = source.architecture
    dtypes = {name: new_dtype(row, name, place.info.dtype, output.dtype) for name, place in places.items()}

    def tensors(names: Iterable[str]) -> Iterator[Tensor]:
        names = list(names)
        for name, tensor in zip(names, read_places(places[name] for name in names), strict=True):
            yield cast(name, tensor, dtypes[name])

    return write_checkpoint(source, dtypes, tensors, source_metadata(source), output, (source,))


def write_checkpoint(
    like: Checkpoint,
    dtypes: Mapping[str, torch.dtype],
    tensors: Callable[[Iterable[str]], Iterator[Tensor]],
    metadata: Mapping[str, str],
    output: Output,
    sources: tuple[Checkpoint, ...],
) -> Path:
    """Writes tensors of these canonical names and dtypes as an autoencoder like `like`; returns the weights' file.

    `tensors` gives those of the names that it is called with, in that order. Raises as `convert`, and
    CheckpointChanged when a source was written to meanwhile.
    """
    layout = output.layout or file_layout(like)
    weights, config = _targets(output.target, layout)
    for source in sources:
        _check_apart(source, weights)
    theirs = like.architecture.diffusers if layout == "diffusers" else None
    shapes = {name: like.architecture.shape(name, place.info.shape) for name, place in places_of(like).items()}
    if theirs:
        shapes = {name: theirs.shape(name, shape) for name, shape in shapes.items()}
        names = {key: [name] for name, key in theirs.keys(dtypes).items()}
    else:
        names = whole_of(dtypes, like.architecture)
    ordered = file_order(_spec(key, parts, dtypes, shapes) for key, parts in names.items())

    def shaped() -> Iterator[Tensor]:
        stream = tensors([name for spec in ordered for name in names[spec.key]])
        for spec in ordered:
            parts = [tensor.to(spec.dtype) for tensor in islice(stream, len(names[spec.key]))]
            yield (torch.cat(parts) if len(parts) > 1 else parts[0]).reshape(spec.shape)
        if next(stream, None) is not None:
            raise ValueError("more tensors came than were asked for")

    def check() -> None:
        for source in sources:
            if source.changed():
                raise CheckpointChanged(f"{source.path} was written to meanwhile; nothing was made of it")

    files: dict[Path, Write] = {weights: safetensors_writer(ordered, shaped(), metadata)}
    if config is None:
        publish(files, force=output.force, check=check)
        return weights
    text = json.dumps(config_json(like), indent=2, sort_keys=True) + "\n"
    files[config] = lambda file: file.write(text.encode())
    new = not output.target.exists()
    output.target.mkdir(exist_ok=True)
    try:
        publish(files, force=output.force, check=check)
    except BaseException:
        if new:
            with suppress(OSError):
                output.target.rmdir()
        raise
    return weights


def _spec(
    key: str, parts: list[str], dtypes: Mapping[str, torch.dtype], shapes: Mapping[str, tuple[int, ...]]
) -> TensorSpec:
    """What is written under a key: a tensor, or the rows of several."""
    dtype = reduce(torch.promote_types, (dtypes[name] for name in parts))
    rows = sum(shapes[name][0] for name in parts if shapes[name])
    shape = shapes[parts[0]]
    return TensorSpec(key, dtype, (rows, *shape[1:]) if shape else shape)


def places_of(checkpoint: Checkpoint) -> dict[str, Place]:
    """Where the tensors of a checkpoint lie, by canonical name. Raises UnsupportedCheckpoint."""
    places: dict[str, Place] = {}
    for path in checkpoint.files:
        tensors = parted(open_weights(path), checkpoint.architecture).tensors
        for key, name in canonical_keys(tensors, checkpoint.architecture, path.stem).items():
            places[name] = Place(path, key, tensors[key], checkpoint.architecture)
    return places


def read_places(places: Iterable[Place]) -> Iterator[Tensor]:
    """The tensors at these places in this order, as the files have them; each file is opened once."""
    places = list(places)
    readers = {
        path: parted(open_weights(path), row).read([place.key for place in places if place.path == path])
        for path, row in {place.path: place.architecture for place in places}.items()
    }
    for place in places:
        _, tensor = next(readers[place.path])
        if (tensor.dtype, tuple(tensor.shape)) != (place.info.dtype, place.info.shape):
            raise UnsupportedCheckpoint(f"{place.path.name} has changed since it was identified")
        yield tensor


def new_dtype(row: Architecture, name: str, dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """What a tensor's dtype becomes: statistics and counters keep theirs in every precision."""
    return dtype if wanted is None or name.startswith(row.statistics) else wanted


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype; itself if it has it. Raises UnsupportedCheckpoint where a finite weight overflows."""
    if tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    finite = result.to(torch.float64).isfinite()  # not every dtype has isfinite
    if not bool(finite.all()):
        exact = tensor.to(torch.float64)
        lost = exact[exact.isfinite() & ~finite]
        if lost.numel():
            raise UnsupportedCheckpoint(
                f"{name} has the value {lost[lost.abs().argmax()].item():g}, beyond the range of {dtype_name(dtype)}: "
                "bf16 and fp32 hold it"
            )
    return result


def source_metadata(source: Checkpoint) -> dict[str, str]:
    """The source's own metadata, what it was, and what makes the result identify itself wherever it is put."""
    metadata: dict[str, str] = {}
    for path in source.files:
        metadata.update(open_weights(path).metadata)
    for key in KEYS:
        metadata.pop(key, None)  # a sidecar may have overruled it
    family = source.family
    metadata |= {
        "format": "pt",
        "family": family.name,
        "family_source": source.family_source,
        "source_sha256": source.sha256,
        "source_name": shown(source.name if source.path.is_dir() else source.path.name),
    }
    row = FAMILIES.get(family.name)
    for key in ("scaling_factor", "shift_factor"):
        constant = getattr(family.latent_format, key)
        if row is None or getattr(row.latent_format, key) != constant:
            metadata[key] = json.dumps(constant)  # a list: one number a channel
    return metadata | {key: str(value) for key, value in source.architecture.untold(source.config).items()}


def config_json(checkpoint: Checkpoint) -> dict[str, object]:
    """The config.json with which diffusers loads these weights, in its layout.

    `_family` is ours: keys that begin with an underscore are ignored there. Raises UnsupportedCheckpoint where no
    class of diffusers builds such a network.
    """
    content = checkpoint.architecture.diffusers.config(checkpoint.config, checkpoint.fp16 == "ok")
    family = checkpoint.family
    if family.name in FAMILIES:
        content["_family"] = family.name
    if checkpoint.family_source == "default":
        content["_family_source"] = "default"  # a guess: its constants are read back as one
    form = family.latent_format
    if isinstance(form.scaling_factor, tuple):
        if FAMILIES.get(family.name) != family:  # a row's are built into its classes
            content["latents_std"] = [1 / each for each in form.scaling_factor]
            content["latents_mean"] = list(form.shift_factor if isinstance(form.shift_factor, tuple) else ())
    elif not form.statistics:
        content["scaling_factor"] = form.scaling_factor
        if form.shift_factor:
            content["shift_factor"] = form.shift_factor
    return content


def _targets(target: Path, layout: Layout) -> tuple[Path, Path | None]:
    """(file for the weights, file for the configuration where the target is a folder)."""
    if target.suffix.lower() == ".safetensors" and not target.is_dir():
        if half := half_of(target.stem):
            raise InvalidParameter(f"{target.name} would be taken for the {half} alone: give it a name without _{half}")
        return target, None
    if layout == "diffusers" and (target.is_dir() or target.suffix.lower() not in SUFFIXES):
        return target / DIFFUSERS_WEIGHTS[0], target / "config.json"
    raise InvalidParameter(
        f"cannot write to {target}: expected the name of a .safetensors file, or with --layout diffusers of a folder"
    )


def _check_apart(source: Checkpoint, weights: Path) -> None:
    for path in source.files:
        if weights.exists() and weights.samefile(path):
            raise InvalidParameter(f"{weights} is the source itself: write to another file")
